"""What distinguishes one Gemma from another, read from a KerasHub backbone. A family is a row of `FAMILIES`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.layers.places import PLACES


@dataclasses.dataclass(frozen=True)
class Block:
    """One decoder block.

    Args:
        window: Positions that a token sees, itself included; None where it sees all before it.
        wavelength: The longest wavelength of the rotary embedding, in tokens.
        rope_scaling: What positions are divided by before they are rotated.
    """

    window: int | None
    wavelength: float
    rope_scaling: float


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A Gemma's shape and constants; hashable, so that compiled programs may depend on it.

    Invariants: `heads` is a multiple of `kv_heads`. Which norms there are is said by the weights.
    """

    family: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    attention_scale: float  # queries are multiplied by it
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    dtype: str  # of the computations
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a KerasHub backbone of one class keeps its parts, and how its architecture is read.

    Args:
        linear: Our name of a linear layer -> the attributes that lead to it from a block.
        norms: Our name of a norm -> the attributes that lead to it; a block may lack some.
        read: From a backbone to its `Architecture`.
    """

    linear: Mapping[str, str]
    norms: Mapping[str, str]
    read: Callable[[Any], Architecture]


_LINEAR = {name: place.attribute for name, place in PLACES.items()}
_NORMS = {
    "pre_attention": "pre_attention_norm",
    "query": "attention.query_norm",
    "key": "attention.key_norm",
    "post_attention": "post_attention_norm",
    "pre_mlp": "pre_ffw_norm",
    "post_mlp": "post_ffw_norm",
}


def _read(backbone: Any) -> Architecture:
    """The architecture of KerasHub's Gemma 1, 2 and 3."""
    attention = backbone.transformer_layers[0].attention
    per_head = attention.query_head_dim_normalize
    size = attention.head_dim if per_head else backbone.hidden_dim // backbone.num_query_heads
    return Architecture(
        family=type(backbone).__name__,
        width=backbone.hidden_dim,
        heads=backbone.num_query_heads,
        kv_heads=backbone.num_key_value_heads,
        head_dim=backbone.head_dim,
        vocabulary=backbone.vocabulary_size,
        epsilon=float(backbone.layer_norm_epsilon),
        attention_scale=size**-0.5,
        attention_soft_cap=attention.logit_soft_cap,
        logit_soft_cap=backbone.token_embedding.logit_soft_cap,
        dtype=backbone.token_embedding.compute_dtype,
        blocks=tuple(_block(block.attention) for block in backbone.transformer_layers),
    )


def _block(attention: Any) -> Block:
    window = attention.sliding_window_size if attention.use_sliding_window_attention else None
    rope = attention.rope_layer
    return Block(window, float(rope.max_wavelength), float(rope.scaling_factor))


#: KerasHub's class -> the family.
FAMILIES: dict[str, Family] = {
    "GemmaBackbone": Family(_LINEAR, _NORMS, _read),  # Gemma 1 and 2
    "Gemma3Backbone": Family(_LINEAR, _NORMS, _read),
}


def family_of(backbone: Any) -> Family:
    """The family that a backbone's class belongs to.

    Raises:
        GemmaLoraError: If it is none of `FAMILIES`.
    """
    for cls in type(backbone).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise GemmaLoraError(
        f"The backbone is a {type(backbone).__name__}; gemma_lora computes {', '.join(FAMILIES)}. "
        "Load a Gemma 1, 2 or 3."
    )


def architecture_of(backbone: Any) -> Architecture:
    """Reads a KerasHub backbone's architecture.

    Args:
        backbone: KerasHub's `GemmaBackbone` or `Gemma3Backbone`.

    Returns:
        An `Architecture`.

    Raises:
        GemmaLoraError: If the family is not known, or the backbone has a part that `forward` does not compute.

    Example:

    >>> architecture_of(load_gemma().backbone).blocks[5].window is None    # doctest: +SKIP
    True
    """
    family = family_of(backbone)
    if found := _what_is_not_computed(backbone):
        raise GemmaLoraError(f"The backbone has {found}, which gemma_lora does not compute. Load a plain text model.")
    return family.read(backbone)


def _what_is_not_computed(backbone: Any) -> str:
    """What `forward` would leave out without a word; empty if there is nothing."""
    attention = backbone.transformer_layers[0].attention
    rope = getattr(attention.rope_layer, "rope_type", "linear")
    found = {
        f"dropout={getattr(backbone, 'dropout', 0)}": bool(getattr(backbone, "dropout", 0)),
        "bidirectional attention": bool(getattr(backbone, "use_bidirectional_attention", False)),
        f"rotary embeddings of type {rope!r}": rope != "linear",
        "float16 computations": backbone.token_embedding.compute_dtype == "float16",
    }
    return ", ".join(what for what, is_there in found.items() if is_there)
