"""Putting one layer in another's place in a model that is built.

Keras offers no way to do so, and its own `enable_lora` unlocks a layer's tracker for the same purpose. Everything that
touches Keras's book-keeping for it is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gemma_lora.base.keras_on_jax import keras

#: What a compiled Keras model keeps of its last traces.
_PROGRAMS = ("train_function", "test_function", "predict_function", "generate_function")


def replace(parent: keras.layers.Layer, attribute: str, layer: keras.layers.Layer) -> None:
    """Sets a sub-layer of a built layer, in its attribute and in Keras's tracking of sub-layers.

    Args:
        parent: The layer that holds the old one.
        attribute: The attribute that holds it.
        layer: The new one.
    """
    old = getattr(parent, attribute)
    _set(parent, attribute, layer)
    others = [tracked for tracked in parent._layers if tracked is not layer]
    parent._layers[:] = [layer if tracked is old else tracked for tracked in others]


def _set(parent: keras.layers.Layer, attribute: str, value: Any) -> None:
    """Sets an attribute of a built layer."""
    # Keras locks a built layer's tracker; its own enable_lora unlocks it in the same way.
    parent._tracker.unlock()
    try:
        setattr(parent, attribute, value)
    finally:
        parent._tracker.lock()


def replace_in_graph(model: keras.Model, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Puts a layer in another's place wherever a model holds it: in graphs, attributes, lists and dictionaries.

    A functional model is a graph of nodes, each of which calls a layer. Inputs and outputs of the new layer must be
    those of the old one.

    Args:
        model: The outermost model; models inside it that share the layer are changed too.
        old: A layer of the model.
        new: A built layer.
    """
    parents = _holders(model)
    for number, node in enumerate(old._inbound_nodes):
        for parent in parents:
            nodes: set[str] = getattr(parent, "_nodes", set())  # keys of a layer's identity and the number of its call
            if (key := _key(old, number)) in nodes:
                nodes.discard(key)
                nodes.add(_key(new, number))
        node.operation = new
        for tensor in node.outputs:
            if hasattr(tensor, "_keras_history"):
                tensor._keras_history = tensor._keras_history._replace(operation=new)
    new._inbound_nodes, new._outbound_nodes = list(old._inbound_nodes), list(old._outbound_nodes)
    old._inbound_nodes, old._outbound_nodes = [], []
    for parent in parents:
        tracks = any(layer is old for layer in parent._layers)
        for attribute, value in list(vars(parent).items()):
            if value is old:
                replace(parent, attribute, new)
            elif not tracks or attribute == "_layers":
                continue  # what holds a layer in a list tracks it in `_layers`, which comes last
            elif isinstance(value, tuple) and (swapped := _in_tuple(value, old, new)) is not value:
                _set(parent, attribute, swapped)
            else:
                _in_container(value, old, new)
        _in_container(parent._layers, old, new)


def _holders(model: keras.layers.Layer) -> list[Any]:
    """Whatever may hold a layer of a model: its layers, and the functional model that a `Sequential` runs."""
    layers = list({id(layer): layer for layer in (model, *model._flatten_layers())}.values())
    hidden = [getattr(layer, "_functional", None) for layer in layers if isinstance(layer, keras.Sequential)]
    return layers + [functional for functional in hidden if functional is not None]


def _in_container(value: Any, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Puts a layer in another's place in a list or dictionary, and in those inside it."""
    if not isinstance(value, list | dict):
        return
    for key, entry in list(enumerate(value) if isinstance(value, list) else value.items()):
        if entry is old:
            # `dict`'s own: Keras's dictionaries would add the layer to what a built model tracks, which is locked.
            dict.__setitem__(value, key, new) if isinstance(value, dict) else value.__setitem__(key, new)
        elif isinstance(entry, tuple) and (swapped := _in_tuple(entry, old, new)) is not entry:
            dict.__setitem__(value, key, swapped) if isinstance(value, dict) else value.__setitem__(key, swapped)
        else:
            _in_container(entry, old, new)


def _in_tuple(value: tuple, old: keras.layers.Layer, new: keras.layers.Layer) -> tuple:
    """The tuple with a layer in another's place: a new one if it holds the old layer."""
    entries = [_in_tuple(entry, old, new) if isinstance(entry, tuple) else entry for entry in value]
    for entry in entries:
        _in_container(entry, old, new)
    entries = [new if entry is old else entry for entry in entries]
    if all(entry is was for entry, was in zip(entries, value, strict=True)):
        return value
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _key(layer: keras.layers.Layer, number: int) -> str:
    return f"{id(layer)}_ib-{number}"  # Keras's own form


def in_graphs(layer: keras.layers.Layer, models: Iterable[keras.Model]) -> bool:
    """Whether every call of a layer in a functional model belongs to one of these models' graphs."""
    nodes = {id(node) for model in models for depth in model._nodes_by_depth.values() for node in depth}
    return all(id(node) in nodes for node in layer._inbound_nodes)


def swap(model: keras.Model, exchange: Callable[[keras.layers.Layer], keras.layers.Layer]) -> None:
    """Puts `exchange(layer)` in the place of every layer of a model for which it gives another one."""
    for parent in [model, *model._flatten_layers()]:
        for attribute, layer in list(vars(parent).items()):
            if isinstance(layer, keras.layers.Layer) and (new := exchange(layer)) is not layer:
                replace(parent, attribute, new)
    for layer in list(model._flatten_layers()):
        if layer._inbound_nodes and (new := exchange(layer)) is not layer:
            replace_in_graph(model, layer, new)
    forget_programs(model)


def forget_programs(model: keras.layers.Layer) -> None:
    """Drops what Keras has compiled for a model and for the models inside it.

    A compiled function hands weights over by their places in a list. When another layer stands in a place whose weights
    have the same shapes, it would go on computing what the old one did.
    """
    for layer in [model, *model._flatten_layers()]:
        for name in _PROGRAMS:
            if vars(layer).get(name) is not None:
                setattr(layer, name, None)


def forget_replaced(model: keras.layers.Layer) -> None:
    """Frees the weights of layers that others have taken the place of, and drops compiled functions.

    A compiled model (KerasHub's are) remembers which of its layers were trainable then, and so keeps them in memory.
    """
    state = vars(model).get("_compiled_trainable_state") or {}
    held = {id(layer) for layer in model._flatten_layers()}
    for layer in [layer for layer in state if id(layer) not in held]:
        del state[layer]
    forget_programs(model)
