"""LoRA on a whole model: attach, merge, unmerge, detach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS, TARGET_NAMES, check
from gemma_lora.base.settings import target_names as target_names
from gemma_lora.layers import linear
from gemma_lora.layers.places import PLACES
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer

#: Our names for a Gemma block's linear layers -> KerasHub's layer names.
TARGETS = {name: place.layer for name, place in PLACES.items()}
#: What `targets="all-linear"` means.
ALL_LINEAR = TARGET_NAMES


def linear_layers(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """Yields `(parent, attribute, layer)` for each linear layer held as another layer's attribute."""
    for parent in model._flatten_layers():
        if isinstance(parent, LoRALayer):
            continue
        for attribute, value in list(vars(parent).items()):
            if isinstance(value, keras.layers.Dense | keras.layers.EinsumDense | LoRALayer):
                yield parent, attribute, value


def plain_layers(model: keras.layers.Layer) -> Iterator[tuple[keras.layers.Layer, str, keras.layers.Layer]]:
    """Those of `linear_layers` that are matrix products of a kernel in floats, without LoRA."""
    for parent, attribute, layer in linear_layers(model):
        if not isinstance(layer, LoRALayer) and not hasattr(layer, "encoding") and linear.is_matrix_product(layer):
            yield parent, attribute, layer


def adapt(
    model: keras.Model,
    make: Callable[[keras.layers.Layer, int], keras.layers.Layer],
    targets: str | Sequence[str] = DEFAULTS.targets,
) -> keras.Model:
    """Puts layers of a parameter-efficient method in the places of a model's linear layers; the rest is frozen.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model that holds layers of these names as
            attributes of other layers.
        make: From a layer and its number among the targets to the layer that takes its place. Its variables decide what
            is trained; with a method `product` the forward pass knows how to multiply by it (`layers.products`).
        targets: Any of query, key, value, attention_output, gate, up, down, or `"all-linear"`.

    Returns:
        The same model.

    Raises:
        ValueError: If no layer matches a target; nothing is changed then.
    """
    wanted = {TARGETS[name] for name in target_names(targets)}
    found = [hit for hit in linear_layers(model) if hit[2].name in wanted]
    missing = wanted - {layer.name for _, _, layer in found}
    if missing:
        raise ValueError(f"No layer of the model is named {', '.join(sorted(missing))}; nothing was changed.")
    trainable = [variable.trainable for variable in model.variables]
    for variable in model.variables:
        variable.trainable = False
    try:
        made = [make(layer, number) for number, (_, _, layer) in enumerate(found)]
    except BaseException:
        for variable, was in zip(model.variables, trainable, strict=True):
            variable.trainable = was
        raise
    for (parent, attribute, _), layer in zip(found, made, strict=True):
        replace(parent, attribute, layer)
    forget_programs(model)
    return model


def apply_lora(
    model: keras.Model,
    rank: int = DEFAULTS.rank,
    alpha: float | None = DEFAULTS.alpha,
    targets: str | Sequence[str] = DEFAULTS.targets,
    dropout: float = DEFAULTS.dropout,
    rslora: bool = DEFAULTS.rslora,
    dora: bool = DEFAULTS.dora,
    seed: int = DEFAULTS.seed,
) -> keras.Model:
    """Gives a model's targeted linear layers LoRA, in place, and freezes everything else.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, or any built Keras model that holds layers of
            these names as attributes of other layers.
        rank: Integer, the update's rank.
        alpha: Float; scaling is alpha / rank. Defaults to `2 * rank`.
        targets: Any of query, key, value, attention_output, gate, up, down, or `"all-linear"`.
        dropout: Float in [0, 1).
        rslora: If True scaling is alpha / sqrt(rank).
        dora: If True, DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): each output's column of the kernel is
            split into its length, which is trained as it is, and its direction, which LoRA changes. With dropout a
            training step then forms each frozen product twice.
        seed: Integer; layer i starts from seed + i.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument is not as above, the model has LoRA already, or no layer matches a target. Nothing
            is changed then.
    """
    named = check(rank=rank, alpha=alpha, targets=targets, dropout=dropout, rslora=rslora, dora=dora, seed=seed)
    if lora_layers(model):
        raise ValueError("The model has LoRA already. Call `detach_lora(model)` first.")
    targets, seed = named.pop("targets"), named.pop("seed")

    def make(layer: keras.layers.Layer, number: int) -> LoRALayer:
        cls = LoRADense if isinstance(layer, keras.layers.Dense) else LoRAEinsumDense
        return cls(layer, seed=seed + number, **named)

    return adapt(model, make, targets)


def lora_layers(model: keras.layers.Layer) -> list[LoRALayer]:
    """The model's LoRA layers, in the model's order."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, LoRALayer)]


def _required_layers(model: keras.layers.Layer) -> list[LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise GemmaLoraError("The model has no LoRA layers. Call `apply_lora` or `load_adapter` first.")
    return layers


def merge_lora(model: keras.Model) -> None:
    """Adds every update to its kernel; the model then runs at the base model's speed."""
    for layer in _required_layers(model):
        layer.merge()


def unmerge_lora(model: keras.Model) -> None:
    """Undoes `merge_lora`, exact to rounding."""
    for layer in _required_layers(model):
        layer.unmerge()


def detach_lora(model: keras.Model) -> None:
    """Takes the LoRA layers out and gives the base layers back; a merged update stays in the kernels."""
    for parent, attribute, layer in list(linear_layers(model)):
        if isinstance(layer, LoRALayer):
            if isinstance(layer, LoRADense):
                layer.base.activation = layer.activation
            replace(parent, attribute, layer.base)
    forget_programs(model)
