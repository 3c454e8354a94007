"""The one forward pass: training, scoring, perplexity and generation all call `forward`.

KerasHub holds the weights; this walks a Gemma's blocks over them. It is lesson 04's transformer with a batch axis:
what distinguishes one Gemma from another is in `Architecture`, how a product is formed is in the weights, and who sees
whom is in `attend`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.attention import Attend, packed_rows
from gemma_lora.gemma.weights import BlockWeights, Weights, backbone_of, collect
from gemma_lora.layers.gated_gelu import gated_gelu
from gemma_lora.layers.remat import recomputed

_Rotations = dict[tuple[float, float], tuple[jax.Array, jax.Array]]


def forward(
    architecture: Architecture, weights: Weights, token_ids: Any, positions: Any, attend: Attend, remat: bool = False
) -> jax.Array:
    """From tokens to the hidden states that logits are formed of.

    Args:
        architecture: From `architecture_of`.
        weights: From `collect`.
        token_ids: (B, T) integers.
        positions: (B, T) or (1, T) numbers, which the rotary embeddings turn by. Only their differences count. A numpy
            array is a constant of the program.
        attend: How queries meet keys: `packed_rows`, or generation's cache.
        remat: Whether activations inside a block are computed again in the backward pass; see `recomputed`.

    Returns:
        (B, T, D) in the architecture's dtype. Logits are `hidden @ weights.head.T`, soft-capped in Gemma 2.

    Example:

    >>> hidden = forward(architecture_of(backbone), collect(backbone), ids, np.arange(9)[None],
    ...                  packed_rows(architecture, np.ones_like(ids)))           # doctest: +SKIP

    Reference: Gemma 3 report, https://arxiv.org/abs/2503.19786, section 2; Gemma 2 report,
    https://arxiv.org/abs/2408.00118, section 2, for the norms on both sides and the soft caps.
    """
    x = weights.embed(jnp.asarray(token_ids), architecture.dtype)  # (B, T, D)
    x = x * jnp.sqrt(jnp.float32(architecture.width)).astype(x.dtype)
    rotations = _rotations(architecture, positions)
    for number, block in enumerate(weights.blocks):

        def one_block(block: BlockWeights, x: jax.Array, number: int = number) -> jax.Array:
            return _block(architecture, number, block, x, rotations, attend)

        x = recomputed(one_block, block, x) if remat else one_block(block, x)
    return rms_norm(x, weights.final_norm, architecture.epsilon)


def hidden_states(model: Any, token_ids: Any, segment_ids: Any = None) -> jax.Array:
    """Hidden states of packed rows, by the model as it is now; compiled once for each shape.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, with or without LoRA, packed or not.
        token_ids: (B, T) integers.
        segment_ids: (B, T) integers: 1, 2, … for a row's examples, 0 for padding; None for one example in each row.

    Returns:
        (B, T, D).

    Example:

    >>> hidden_states(load_gemma(), [[2, 818, 5279]]).shape    # doctest: +SKIP
    (1, 3, 640)
    """
    token_ids = jnp.asarray(token_ids)
    segments = jnp.ones_like(token_ids) if segment_ids is None else jnp.asarray(segment_ids)
    return packed_hidden(architecture_of(backbone_of(model)), collect(model), token_ids, segments)


@partial(jax.jit, static_argnames=("architecture",))
def packed_hidden(architecture: Architecture, weights: Weights, token_ids: Any, segment_ids: Any) -> jax.Array:
    """`forward` of packed rows, compiled: (B, T) tokens and segment ids -> (B, T, D)."""
    positions = np.arange(token_ids.shape[1])[None]
    return forward(architecture, weights, token_ids, positions, packed_rows(architecture, segment_ids))


def _block(architecture: Architecture, number: int, weights: BlockWeights, x, rotations: _Rotations, attend: Attend):
    """One block: attention, then the MLP, each normalized and added to the residual stream. (B, T, D) -> (B, T, D)."""

    def normed(name: str, y):
        scale = weights.norms.get(name)
        return y if scale is None else rms_norm(y, scale, architecture.epsilon)

    x = x + normed("post_attention", _attention(architecture, number, weights, normed, x, rotations, attend))
    rows = normed("pre_mlp", x).reshape(-1, x.shape[-1])  # (B·T, D)
    hidden = gated_gelu(weights.linear["gate"].multiply(rows), weights.linear["up"].multiply(rows))
    return x + normed("post_mlp", weights.linear["down"].multiply(hidden).reshape(x.shape))


def _attention(architecture: Architecture, number: int, weights: BlockWeights, normed, x, rotations, attend: Attend):
    """A block's attention with its four projections: (B, T, D) -> (B, T, D)."""
    batch, length, width = x.shape
    rows = normed("pre_attention", x).reshape(-1, width)

    def heads(name: str):
        return weights.linear[name].multiply(rows).reshape(batch, length, -1, architecture.head_dim)

    block = architecture.blocks[number]
    cos, sin = rotations[block.wavelength, block.rope_scaling]
    q, k = (_rotated(normed(name, heads(name)), cos, sin) for name in ("query", "key"))
    mixed = attend(number, q, k, heads("value"))  # (B, T, heads, H)
    return weights.linear["attention_output"].multiply(mixed.reshape(batch * length, -1)).reshape(x.shape)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x / √(mean(x²) + epsilon) · (1 + scale)` over the last axis, computed in float32, in x's dtype.

    On two axes: XLA on the CPU (jax 0.10.2) takes up to 25 times as long for the sum of a product over the last axis,
    which the gradient needs, where the first axis is 1: a batch of one row.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(rows), axis=-1, keepdims=True)
    result = rows * jax.lax.reciprocal(jnp.sqrt(mean_square + epsilon)) * (1.0 + scale.astype(jnp.float32))
    return result.astype(x.dtype).reshape(x.shape)


# --- rotary embeddings -------------------------------------------------------------------------------------


def _rotations(architecture: Architecture, positions: Any) -> _Rotations:
    """Cosines and sines for each kind of block: {(wavelength, scaling): two arrays (B or 1, T, 1, H)}.

    XLA on the CPU (jax 0.10.2) otherwise computes those of constant positions anew for every row, head and gradient.
    """
    kinds = {(block.wavelength, block.rope_scaling) for block in architecture.blocks}
    if isinstance(positions, jax.Array) or jax.default_backend() != "cpu":
        return {kind: _angles(architecture, positions, *kind) for kind in kinds}
    with jax.ensure_compile_time_eval():
        return {kind: _angles(architecture, positions, *kind) for kind in kinds}


def _angles(architecture: Architecture, positions: Any, wavelength: float, scaling: float):
    """Coordinates i and i + H/2 are a pair, which turns by position · wavelength^(−2i/H) / scaling radians."""
    half = jnp.arange(0, architecture.head_dim, 2, dtype=jnp.float32) / architecture.head_dim
    speeds = jnp.power(jnp.float32(wavelength), -half) / jnp.float32(scaling)  # (H/2,)
    angles = jnp.asarray(positions, jnp.float32)[:, :, None] * speeds  # (B, T, H/2)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]  # (B, T, 1, H)
    return jnp.cos(angles).astype(architecture.dtype), jnp.sin(angles).astype(architecture.dtype)


def _rotated(x, cos, sin):
    """(B, T, heads, H), turned pair by pair."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
