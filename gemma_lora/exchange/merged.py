"""A Gemma's weights as other programs keep them: one float matrix per place, the adapter merged in.

Nothing in the model is changed. Packed layers (NF4, int8, int4, a GGUF file's blocks) are decoded, and each matrix is
formed when it is read, so the model is never whole in memory a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.gemma.architectures import Architecture, architecture_of, family_of
from gemma_lora.gemma.weights import backbone_of
from gemma_lora.layers import linear
from gemma_lora.layers.places import PLACES, parent_and_attribute
from gemma_lora.layers.products import LayerCall, product_of
from gemma_lora.lora.layer import LoRALayer

#: The norms of each generation's blocks, as `Part.place` names them.
_NORMS = {
    1: {"pre_attention_norm", "pre_mlp_norm"},
    2: {"pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm"},
    3: {"pre_attention_norm", "query_norm", "key_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm"},
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a Gemma.

    Invariants: `place` is "embedding", a name of `PLACES`, or a norm's: "final_norm", or one of `FAMILIES` with "_norm"
    behind it. `block` is None for the embedding and the final norm. `read()` gives float32 of `shape`: a matrix is
    (d_out, d_in), a norm (width,), which multiplies by 1 + what it holds. Where it is `adapted`, `update()` gives the
    squared Frobenius norm of what the adapter adds to it, or None where that cannot be told any more.
    """

    place: str
    block: int | None
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    adapted: bool = False
    update: Callable[[], float | None] = lambda: 0.0


def generation_of(model: keras.Model) -> int:
    """Which Gemma a model is: 1, 2 or 3.

    Raises:
        GemmaLoraError: If it has a part that no Gemma of other programs has, or lacks one.
    """
    backbone = backbone_of(model)
    architecture = architecture_of(backbone)
    norms = {name for name, _ in _norms(backbone, backbone.transformer_layers[0])}
    newer = architecture.family == "Gemma3Backbone"
    found = [number for number, names in _NORMS.items() if names == norms and (number == 3) == newer]
    if not found or (found == [1] and _has_gemma_2s_parts(architecture)):
        raise GemmaLoraError(
            f"The {architecture.family} has norms or soft caps that neither Gemma 1, 2 nor 3 has. "
            "Other programs cannot load it."
        )
    return found[0]


def _has_gemma_2s_parts(architecture: Architecture) -> bool:
    caps = (architecture.attention_soft_cap, architecture.logit_soft_cap)
    return caps != (None, None) or any(block.window is not None for block in architecture.blocks)


def parts(model: keras.Model) -> Iterator[Part]:
    """Every array of a Gemma, in the order of the file formats: the embedding, the blocks, the last norm.

    Args:
        model: A KerasHub Gemma, with or without LoRA or DoRA, merged or not, packed or not.

    Raises:
        GemmaLoraError: If a layer computes something else than a product with one matrix.
    """
    backbone = backbone_of(model)
    family = family_of(backbone)
    table = _table(backbone.token_embedding)
    yield Part("embedding", None, (backbone.vocabulary_size, backbone.hidden_dim), table)
    for number, block in enumerate(backbone.transformer_layers):
        for name in PLACES:
            parent, attribute = parent_and_attribute(block, family.linear[name])
            yield _linear_part(name, number, getattr(parent, attribute))
        for name, norm in _norms(backbone, block):
            yield _norm_part(name, number, norm)
    yield _norm_part("final_norm", None, backbone.layer_norm)


def _norms(backbone: Any, block: Any) -> Iterator[tuple[str, Any]]:
    for name, path in family_of(backbone).norms.items():
        parent, attribute = parent_and_attribute(block, path)
        if (norm := getattr(parent, attribute, None)) is not None:
            yield f"{name}_norm", norm


def _norm_part(name: str, number: int | None, norm: Any) -> Part:
    return Part(name, number, tuple(norm.scale.shape), lambda: np.asarray(norm.scale, np.float32))


def _table(embedding: Any) -> Callable[[], np.ndarray]:
    if getattr(embedding, "lora_enabled", False) or getattr(embedding, "quantization_mode", None):
        raise GemmaLoraError(
            f"Layer {embedding.name!r} has Keras's own LoRA or quantization, which is not exported. Load the model "
            "anew, and use apply_lora or quantize_base."
        )
    return lambda: np.asarray(embedding.embeddings, np.float32)


def _linear_part(name: str, number: int, layer: Any) -> Part:
    adapted = hasattr(layer, "product") and hasattr(layer, "base")  # LoRA, DoRA, or a method of a user's own
    base = layer.base if adapted else layer
    if any(isinstance(product_of(one), LayerCall) for one in (layer, base)) or getattr(base, "bias", None) is not None:
        raise GemmaLoraError(
            f"Block {number}'s {name} is a {type(layer).__name__} that is no product with one matrix (bottleneck "
            "adapters, Keras's own LoRA or quantization, BitNet). Only LoRA and DoRA of `apply_lora` are exported."
        )
    d_in, d_out = linear.matrix_shape(base)

    def read() -> np.ndarray:
        return np.ascontiguousarray(_dense(layer).T)

    def update() -> float | None:
        if not getattr(layer, "merged", False):
            return _squares(_dense(layer) - _dense(base))
        return _squares(np.asarray(layer.delta())) if isinstance(layer, LoRALayer) and not layer.dora else None

    return Part(name, number, (d_out, d_in), read, adapted, update)


def _dense(layer: Any) -> np.ndarray:
    """A layer's matrix with its update, (d_in, d_out) float32."""
    return np.asarray(product_of(layer).dense(), np.float32)


def _squares(array: np.ndarray) -> float:
    return float(np.sum(np.square(array, dtype=np.float64)))


class Rounding:
    """What writing weights in fewer bits costs, summed over the matrices that an adapter changes."""

    def __init__(self) -> None:
        self._error = self._update = self._weights = 0.0
        self._known = True

    def add(self, part: Part, exact: np.ndarray, written: np.ndarray) -> None:
        """Counts one part that is adapted: its values before and after rounding, both float32."""
        update = part.update()
        if update is None:
            self._known = False
        else:
            self._update += update
            self._error += _squares(written - exact)
            self._weights += _squares(exact)

    @property
    def share_of_update(self) -> float | None:
        """|written − exact| / |update|, Frobenius norms; None without an adapter, or where a merged DoRA hides it."""
        return (self._error / self._update) ** 0.5 if self._known and self._update else None

    @property
    def share_of_weights(self) -> float | None:
        """|written − exact| / |exact|, Frobenius norms; None without an adapter."""
        return (self._error / self._weights) ** 0.5 if self._weights else None

    def sentence(self, kind: str) -> str:
        """What it means for a user; empty where there is nothing to tell."""
        share = self.share_of_update
        if share is None or not self._error:
            return ""
        more = " More is lost than was learned: take more bits." if share > 1 else ""
        return (
            f"Rounding the merged weights to {kind} moves them by {share:.2%} of what the adapter changed "
            f"({self.share_of_weights:.2%} of the weights).{more}"
        )
