"""Which layers of a plain Keras model get LoRA: by name, by pattern, or all of them.

A layer is known by its path, the names from the model down to it, such as `encoder/block_0/dense`. A pattern is
compared with the end of the path, name by name, so `dense`, `block_0/dense` and `block_*/dense` all match that layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import layer_patterns
from gemma_lora.layers import linear
from gemma_lora.lora.layer import LoRALayer

#: How many names a message lists.
_LISTED = 8


def named_layers(model: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """`{path: layer}` of every layer in a model, containers included; the model itself is not in it.

    A layer that is used in several places has its first path. Layers of one path are told apart by a number.

    Example:

    >>> block = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")], name="block_0")
    >>> model = keras.Sequential([keras.Input((4,)), block, keras.layers.Dense(2, name="head")])
    >>> list(named_layers(model))
    ['block_0', 'block_0/dense', 'head']
    """
    found: dict[str, keras.layers.Layer] = {}
    for path, layer in _walk(model, "", {id(model)}):
        number, name = 1, path
        while name in found:
            number += 1
            name = f"{path} ({number})"
        found[name] = layer
    return found


def _walk(parent: keras.layers.Layer, prefix: str, seen: set[int]) -> Iterator[tuple[str, keras.layers.Layer]]:
    for layer in parent._layers:
        if id(layer) in seen or isinstance(layer, keras.layers.InputLayer):
            continue
        seen.add(id(layer))
        yield prefix + layer.name, layer
        if not isinstance(layer, LoRALayer):
            yield from _walk(layer, f"{prefix}{layer.name}/", seen)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is the end of a path, name by name; in each name `*`, `?` and `[…]` are `fnmatch`'s.

    Example:

    >>> [matches(pattern, "encoder/block_0/dense") for pattern in ("dense", "block_*/dense", "block_0", "*/dense")]
    [True, True, False, True]
    """
    wanted, names = pattern.split("/"), path.split(" (")[0].split("/")
    return len(wanted) <= len(names) and all(map(fnmatchcase, names[-len(wanted) :], wanted))


def trained_layers(model: keras.layers.Layer, train: str | Sequence[str]) -> dict[str, keras.layers.Layer]:
    """`{path: layer}` of the layers with weights that `train` names.

    Raises:
        ValueError: If a name matches no layer with weights.
    """
    if not train:
        return {}
    weighted = {path: layer for path, layer in named_layers(model).items() if layer.weights}
    return _chosen(weighted, layer_patterns(train, "train"), "train", "layers with weights")


def targeted_layers(
    model: keras.layers.Layer, targets: str | Sequence[str], trained: Iterable[keras.layers.Layer] = ()
) -> list[keras.layers.Layer]:
    """The `Dense` and `EinsumDense` layers that `targets` names, in the model's order.

    Args:
        model: A built Keras model.
        targets: `"all-linear"`, or names and patterns.
        trained: Layers that are trained as they are: neither they nor what is inside them gets LoRA.

    Raises:
        ValueError: If a name matches no linear layer, or a layer cannot have LoRA.
    """
    kept = {id(inner) for layer in trained for inner in layer._flatten_layers()}
    layers = named_layers(model)
    found = {path: layer for path, layer in layers.items() if _is_linear(layer)}
    if not found:
        raise ValueError(f"Model {model.name!r} holds no Dense or EinsumDense layer that could get LoRA.")
    if targets != "all-linear":
        patterns = layer_patterns(targets)
        for pattern in patterns:
            _refuse_others(pattern, layers, found)
        found = _chosen(found, patterns, "targets", "linear layers")
    found = {path: layer for path, layer in found.items() if id(layer) not in kept}
    if not found:
        raise ValueError("`targets` names no layer that `train` does not name too; nothing was changed.")
    for path, layer in found.items():
        if reason := _why_not(layer):
            raise ValueError(f"Layer {path!r} cannot have LoRA: {reason}. Nothing was changed.")
    return list(found.values())


def _is_linear(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense)


def _chosen(
    layers: dict[str, keras.layers.Layer], patterns: Sequence[str], argument: str, kind: str
) -> dict[str, keras.layers.Layer]:
    """Those of the layers that a pattern matches; each pattern must match one."""
    for pattern in patterns:
        if not any(matches(pattern, path) for path in layers):
            raise ValueError(
                f"`{argument}`: {pattern!r} matches none of the model's {kind}. {_near(pattern, list(layers))} "
                "Nothing was changed."
            )
    return {path: layer for path, layer in layers.items() if any(matches(pattern, path) for pattern in patterns)}


def _near(pattern: str, paths: list[str]) -> str:
    """The paths that are most like a pattern, or the first ones."""
    names = {path.rsplit("/", 1)[-1].lower(): path for path in reversed(paths)} | {path.lower(): path for path in paths}
    near = list(dict.fromkeys(names[name] for name in difflib.get_close_matches(pattern.lower(), names, n=4)))
    if near:
        return f"Near it: {', '.join(near)}."
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return f"There are {', '.join(paths[:_LISTED])}{more}."


def _refuse_others(pattern: str, layers: dict[str, keras.layers.Layer], linear_ones: dict) -> None:
    """Says what a pattern names where that is no linear layer: another kind of layer, or one that holds some."""
    hits = {path: layer for path, layer in layers.items() if matches(pattern, path)}
    if not hits or any(path in linear_ones for path in hits):
        return
    path, layer = next(iter(hits.items()))
    inside = [name for name in linear_ones if name.startswith(f"{path}/")]
    remedy = f"It holds {', '.join(inside[:_LISTED])}." if inside else "LoRA goes on Dense and EinsumDense layers."
    raise ValueError(f"`targets`: {path!r} is a {type(layer).__name__}. {remedy} Nothing was changed.")


def _why_not(layer: keras.layers.Layer) -> str | None:
    """Why a linear layer cannot have LoRA, or None."""
    if not layer.built:
        return "it is not built. Call the model once on a batch first"
    if not linear.is_matrix_product(layer):
        return f"its equation {layer.equation!r} is no matrix product over the input's last axes"
    if not hasattr(layer, "encoding") and not linear.is_plain(layer):
        return "Keras's own LoRA or quantization is on it"
    if getattr(layer, "activity_regularizer", None) is not None:
        return "its activity regularizer would not see the update"
    return None
