"""LoRA on a whole model: attach, merge, unmerge, detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.layers import linear
from gemma_lora.layers.places import PLACES
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer

#: Our names for a Gemma block's linear layers -> KerasHub's layer names.
TARGETS = {name: place.layer for name, place in PLACES.items()}
#: What `targets="all-linear"` means.
ALL_LINEAR = tuple(TARGETS)


def target_names(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Checks `targets` and returns them as a tuple in the block's order.

    Args:
        targets: `"all-linear"`, or any of query, key, value, attention_output, gate, up, down.

    Raises:
        ValueError: If a name is unknown or none is given.
    """
    if targets == "all-linear":
        return ALL_LINEAR
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise ValueError(
            f"`targets` must name layers among {', '.join(TARGETS)}, or be 'all-linear'. Received: targets={targets!r}"
        )
    return tuple(name for name in TARGETS if name in names)


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


def apply_lora(
    model: keras.Model,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] = ("query", "value"),
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
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
        ValueError: If the model has LoRA already, or no layer matches a target.
    """
    if lora_layers(model):
        raise ValueError("The model has LoRA already. Call `detach_lora(model)` first.")
    wanted = {TARGETS[name]: name for name in target_names(targets)}
    found = [hit for hit in linear_layers(model) if hit[2].name in wanted]
    missing = set(wanted) - {layer.name for _, _, layer in found}
    if missing:
        raise ValueError(f"No layer of the model is named {', '.join(sorted(missing))}; nothing was changed.")
    for variable in model.variables:
        variable.trainable = False
    for index, (parent, attribute, layer) in enumerate(found):
        cls = LoRADense if isinstance(layer, keras.layers.Dense) else LoRAEinsumDense
        new = cls(
            layer,
            rank,
            alpha=2.0 * rank if alpha is None else alpha,
            dropout=dropout,
            rslora=rslora,
            dora=dora,
            seed=seed + index,
        )
        replace(parent, attribute, new)
    forget_programs(model)
    return model


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
