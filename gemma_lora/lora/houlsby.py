"""Bottleneck adapters for Keras: a small network with a residual after a frozen layer.

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751, section 2.1 and figure 2) put a module of two thin layers
behind a layer of width d and train nothing but the module:

    adapter(h) = h + activation(h @ down_kernel + down_bias) @ up_kernel + up_bias

`down_kernel` is (d, bottleneck) and `up_kernel` is (bottleneck, d). It stands in series with the frozen layer, whose
output it reads, and holds a nonlinearity. So it cannot be merged into a kernel, unlike LoRA's update (`lora.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.apply import TARGETS
from gemma_lora.lora.bottleneck import AdaptedLayer as AdaptedLayer
from gemma_lora.lora.bottleneck import BottleneckAdapter as BottleneckAdapter
from gemma_lora.lora.bottleneck import parameter_count as parameter_count
from gemma_lora.lora.layer import LoRALayer

#: The last projections of a Gemma block's two sub-layers, in `lora.TARGETS`' names.
SUBLAYER_ENDS = ("attention_output", "down")
_WEIGHTS = ("down_kernel", "down_bias", "up_kernel", "up_bias")
_FORMAT = "gemma_lora adapters 1"


def apply_adapters(
    model: keras.Model,
    bottleneck: int,
    after: str | Sequence[str] = SUBLAYER_ENDS,
    activation="gelu",
    init_std: float = 1e-2,
    seed: int = 0,
) -> keras.Model:
    """Puts an adapter behind each of a model's named layers and freezes everything else.

    In a Gemma the default places are the paper's: behind the attention's output projection and behind the MLP's down
    projection, before the residual stream is added. Gemma 2 and 3 normalize a sub-layer's output once more (post-norm)
    before they add it. The adapter stands before that norm, for two reasons. The paper's adapter passes its output
    "directly into the following layer normalization". And the numbers suit it there: in Gemma 3 270M the projections
    give 0.06 to 9 (root mean square), the post-norms 4 to 350, with single numbers near 20,000, against which
    weights and biases that start near 0 would hardly count. The price: the norm undoes a change of length, so the
    adapter can turn a sub-layer's output and not lengthen it.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model.
        bottleneck: Integer, the features in each adapter's middle.
        after: Names of the layers: `lora.TARGETS`' for a Gemma, Keras's own names for any model.
        activation, init_std: As in `BottleneckAdapter`.
        seed: Integer; adapter i starts from seed + i.

    Returns:
        The model with adapters. It is the same object where the layers are attributes of other layers, as in
        KerasHub's models. The graph of a `Sequential` or functional model cannot be changed in place; for layers that
        stand in it the result is a new model over the same layers.

    Raises:
        ValueError: If the model has adapters already, or a name matches no built layer; nothing is changed then.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden"), keras.layers.Dense(2)])
    >>> model = apply_adapters(model, bottleneck=1, after="hidden")
    >>> sum(v.value.size for v in model.trainable_variables)
    10

    Reference: Houlsby et al. 2019, section 2.1 and figure 2. The paper trains the layer normalizations too, 2 d
    numbers each, and a new classifier; here they stay frozen, and a head is set trainable by the caller.
    """
    if adapter_layers(model):
        raise ValueError("The model has adapters already. Call `remove_adapters(model)` first.")
    adapted = _adapted(_places(model, _layer_names(after)), bottleneck, activation, init_std, seed)
    return _with_adapters(model, adapted)


def _adapted(places, bottleneck: int, activation, init_std: float = 1e-2, seed: int = 0) -> dict[str, AdaptedLayer]:
    """`{path: layer with a new adapter}` for `{path: layer}`; the model that holds the layers is not changed."""
    adapted: dict[str, AdaptedLayer] = {}
    for index, (name, layer) in enumerate(places.items()):
        adapter = BottleneckAdapter(
            bottleneck, activation, init_std, seed + index, name="adapter", dtype=layer.dtype_policy
        )
        adapter.build((None, _width(name, layer)))
        adapted[name] = AdaptedLayer(layer, adapter)
    return adapted


def _with_adapters(model: keras.Model, adapted: dict[str, AdaptedLayer]) -> keras.Model:
    """The model with these adapters, in place of any it has, and everything else frozen."""
    wrapped = {id(layer.base): layer for layer in adapted.values()}
    others = list(model.variables)

    def exchange(layer):
        base = layer.base if isinstance(layer, AdaptedLayer) else layer
        return wrapped.get(id(base), base)

    model = _swap(model, exchange)
    for variable in others:
        variable.trainable = False
    return model


def adapter_layers(model: keras.layers.Layer) -> list[AdaptedLayer]:
    """The model's layers that have an adapter behind them, in the order Keras walks through them."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, AdaptedLayer)]


def remove_adapters(model: keras.Model) -> keras.Model:
    """Takes the adapters out and gives the base layers back, frozen as they are.

    Returns:
        The model without adapters: the same object or a new one, as in `apply_adapters`.
    """
    return _swap(model, lambda layer: layer.base if isinstance(layer, AdaptedLayer) else layer)


def save(model: keras.Model, path: str | os.PathLike) -> None:
    """Writes a model's adapters, and nothing of the model itself, to one safetensors file, whole or not at all.

    A tensor is named by the layer's path in the model and the weight, such as
    `decoder_block_0/ffw_linear/down_kernel`; the metadata holds the bottleneck, the activation and the layers' names.
    The text around a prompt (`Template`) is not in it.

    Args:
        model: A model of `apply_adapters`.
        path: Where the file goes.

    Raises:
        GemmaLoraError: If the model has no adapters, or their activation is a function that has no name in Keras.
    """
    from safetensors.numpy import save_file

    layers = adapter_layers(model)
    if not layers:
        raise GemmaLoraError("The model has no adapters to save. Call `apply_adapters` first.")
    activation = keras.activations.serialize(layers[0].adapter.activation)
    if not isinstance(activation, str):
        raise GemmaLoraError(f"The activation {activation!r} has no name in Keras, and code is not saved.")
    tensors = {
        f"{_place_name(model, layer.base)}/{weight}": np.ascontiguousarray(getattr(layer.adapter, weight), np.float32)
        for layer in layers
        for weight in _WEIGHTS
    }
    metadata = {
        "format": _FORMAT,
        "bottleneck": str(layers[0].adapter.bottleneck),
        "activation": activation,
        "after": json.dumps(sorted({layer.base.name for layer in layers})),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(model: keras.Model, path: str | os.PathLike) -> keras.Model:
    """Gives a model the adapters of a file, in place of any it has.

    Args:
        model: A model of the kind that the file was saved from, with adapters or without.
        path: A file that `save` wrote.

    Returns:
        The model with adapters: the same object or a new one, as in `apply_adapters`.

    Raises:
        GemmaLoraError: If the file is missing or damaged, or is for another model. Nothing is changed then: the new
            adapters are made, with the file's numbers, before the old ones go.
    """
    tensors, metadata = _read(path)
    bottleneck, activation, after = _settings(path, metadata)
    try:
        places = _places(model, after)
    except ValueError as error:
        raise GemmaLoraError(f"{path}: the adapters are for another model ({error})") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in places.items():
        width = _width(name, layer)
        sizes = ((width, bottleneck), (bottleneck,), (bottleneck, width), (width,))
        shapes |= {f"{name}/{weight}": size for weight, size in zip(_WEIGHTS, sizes, strict=True)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        name = min(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise GemmaLoraError(
            f"{path}: the adapters are for another model: {name} needs shape {shapes.get(name, 'none')}, the file has "
            f"{found.get(name, 'none')}."
        )
    adapted = _adapted(places, bottleneck, activation)
    for name, layer in adapted.items():
        for weight in _WEIGHTS:
            getattr(layer.adapter, weight).assign(tensors[f"{name}/{weight}"])
    return _with_adapters(model, adapted)


def _read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a file that `save` wrote."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise GemmaLoraError(f"{path}: no such file. Give the file that `adapters.save` wrote.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}). Save the adapters again.") from error
    if metadata.get("format") != _FORMAT:
        raise GemmaLoraError(f"{path}: holds no adapters of this version (format {metadata.get('format')!r}).")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise GemmaLoraError(f"{path}: {name} holds numbers that are not finite.")
    return tensors, metadata


def _settings(path: str | os.PathLike, metadata: dict[str, str]) -> tuple[int, str, list[str]]:
    """`(bottleneck, activation, after)` of a file's metadata, each checked."""
    bottleneck, activation, after = (metadata.get(name) for name in ("bottleneck", "activation", "after"))
    if bottleneck is None or not (bottleneck.isascii() and bottleneck.isdigit()) or int(bottleneck) < 1:
        raise GemmaLoraError(f"{path}: bottleneck must be an integer of at least 1. Received: {bottleneck!r}")
    try:
        known = activation is not None and callable(keras.activations.get(activation))
    except ValueError:
        known = False
    if activation is None or not known:
        raise GemmaLoraError(f"{path}: activation must be a name that Keras knows. Received: {activation!r}")
    try:
        names = json.loads(after or "")
    except ValueError:
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise GemmaLoraError(f"{path}: after must be a list of layers' names. Received: {after!r}")
    return int(bottleneck), activation, names


# --- finding and swapping layers ---------------------------------------------------------------------------


def _layer_names(after: str | Sequence[str]) -> list[str]:
    """Keras's names of the layers in `after`."""
    names = [after] if isinstance(after, str) else list(after)
    if not names:
        raise ValueError(f"`after` must name at least one layer. Received: after={after!r}")
    return [TARGETS.get(name, name) for name in names]


def _held(model: keras.layers.Layer) -> list[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """`(parent, attribute, layer)` for each layer that is another layer's attribute, wrappers' inner layers apart."""
    return [
        (parent, attribute, layer)
        for parent in model._flatten_layers()
        if not isinstance(parent, AdaptedLayer | LoRALayer)
        for attribute, layer in list(vars(parent).items())
        if isinstance(layer, keras.layers.Layer)
    ]


def _in_graph(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that stand in a `Sequential` or functional model's own graph."""
    return model.layers if isinstance(model, keras.Sequential) or hasattr(model, "operations") else []


def _places(model: keras.Model, names: Sequence[str]) -> dict[str, keras.layers.Layer]:
    """`{path in the model: layer}` of every layer with one of the names, without its adapter."""
    layers = [layer for _, _, layer in _held(model)] + _in_graph(model)
    found: dict[str, keras.layers.Layer] = {}
    for layer in layers:
        base = layer.base if isinstance(layer, AdaptedLayer) else layer
        if base.name in names and found.setdefault(_place_name(model, base), base) is not base:
            raise ValueError(f"`after`: two layers have the path {_place_name(model, base)!r}; name them apart.")
    missing = sorted(set(names) - {layer.name for layer in found.values()})
    if missing:
        raise ValueError(f"`after`: no layer of the model is named {', '.join(missing)}; nothing was changed.")
    return found


def _place_name(model: keras.Model, layer: keras.layers.Layer) -> str:
    """A layer's path in the model, without the model's own name, which Keras numbers."""
    layer = layer.base if isinstance(layer, LoRALayer) else layer  # the path it was built at
    return layer.path.removeprefix(f"{model.name}/") if layer.path else layer.name


def _width(name: str, layer: keras.layers.Layer) -> int:
    """Features that a layer gives: the last axis of its kernel (or of a norm's scale)."""
    base = layer.base if isinstance(layer, LoRALayer) else layer
    if not base.variables:
        raise ValueError(f"Layer {name!r} has no weights (or is not built), so its width is not known.")
    return int(base.variables[0].shape[-1])


def _swap(model: keras.Model, exchange: Any) -> keras.Model:
    """Puts `exchange(layer)` in each layer's place and returns the model, a new one if its graph had to change.

    An error on the way puts back what was exchanged.
    """
    done = []
    try:
        for parent, attribute, layer in _held(model):
            if (new := exchange(layer)) is not layer:
                done.append((parent, attribute, layer))
                replace(parent, attribute, new)
        forget_programs(model)
        if any(exchange(layer) is not layer for layer in _in_graph(model)):
            return keras.models.clone_model(model, clone_function=exchange)
    except BaseException:
        for parent, attribute, layer in done:
            if getattr(parent, attribute) is not layer:  # the last one may not have been exchanged yet
                replace(parent, attribute, layer)
        raise
    return model
