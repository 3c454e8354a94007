"""How a query meets keys: one implementation of attention, and who sees whom in packed rows.

Generation adds its cache (`generation/engine.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.gemma.architectures import Architecture, Block
from gemma_lora.layers.mixed_precision import batched_product

#: From a block's number and its queries (B, T, heads, H), keys and values (B, T, kv_heads, H), rotated, to what the
#: queries see: (B, T, heads, H).
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
_UNSEEN = -1e9  # a logit whose softmax is 0 beside any that is seen


class Keys(NamedTuple):
    """Keys and values of some positions, in one block: (B, kv_heads, S, H) each; B may be 1 for all rows."""

    keys: jax.Array
    values: jax.Array


def attention(
    architecture: Architecture, q: jax.Array, pieces: Sequence[Keys], seen: jax.Array, rounded: bool = False
) -> jax.Array:
    """softmax(q kᵀ · scale, masked) v, of queries to several pieces of keys and values.

    With T before the heads of a group, and one key-value head as in Gemma 3 270M, nothing has to be transposed.

    Args:
        architecture: Heads, scale and soft cap.
        q: (B, T, heads, H).
        pieces: Keys and values, one piece behind the other, S of them together.
        seen: (B or 1, T, S) booleans, which key a query sees.
        rounded: Whether products round float32 factors to bfloat16 (`batched_product`); then there is one piece.

    Returns:
        (B, T, heads, H), of q's dtype. The softmax is float32.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1; Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245, for groups of queries that share a key.
    """
    batch, length, heads, size = q.shape
    kv_heads = architecture.kv_heads
    groups = heads // kv_heads
    q = (q * architecture.attention_scale).astype(q.dtype).reshape(batch, length, kv_heads, groups, size)
    q = jnp.transpose(q, (0, 2, 1, 3, 4)).reshape(batch, kv_heads, length * groups, size)
    rounded = rounded and q.dtype == jnp.float32
    scores = [_scores(q, piece.keys, rounded) for piece in pieces]
    logits = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    if (cap := architecture.attention_soft_cap) is not None:
        logits = jnp.tanh(logits / cap) * cap
    keys = logits.shape[-1]
    split = logits.astype(jnp.float32).reshape(batch, kv_heads, length, groups, keys)
    # Two axes: XLA on the CPU (jax 0.10.2) is many times slower at sums over the last axis where the first is 1.
    rows = jnp.where(seen[:, None, :, None], split, _UNSEEN).reshape(-1, keys)
    weights = jax.nn.softmax(rows, axis=-1).astype(q.dtype).reshape(logits.shape)
    ends = np.cumsum([piece.keys.shape[2] for piece in pieces])[:-1]
    shares = zip(jnp.split(weights, ends, axis=-1), pieces, strict=True)
    mixtures = [_mixture(share, piece.values, rounded) for share, piece in shares]
    result = functools.reduce(jnp.add, mixtures).reshape(batch, kv_heads, length, groups, size)
    return jnp.transpose(result, (0, 2, 1, 3, 4)).reshape(batch, length, heads, size)


def _scores(q, keys, rounded: bool):
    """(B, K, M, H) and (B or 1, K, S, H) -> (B, K, M, S)."""
    if rounded:
        return batched_product(q, jnp.swapaxes(keys, 2, 3))
    return _per_row("bkth,bksh->bkts", q, keys)


def _mixture(weights, values, rounded: bool):
    """(B, K, M, S) and (B or 1, K, S, H) -> (B, K, M, H)."""
    return batched_product(weights, values) if rounded else _per_row("bkts,bksh->bkth", weights, values)


def _per_row(equation: str, x, y):
    """`jnp.einsum` over (B, …) and (B, …), or (1, …) for all rows: then one product, without copies of y."""
    if y.shape[0] == 1 and x.shape[0] > 1:
        return jnp.einsum(equation.replace(",b", ","), x, y[0])
    return jnp.einsum(equation, x, y)


def in_window(block: Block, distance: jax.Array) -> jax.Array:
    """Whether a query sees a key that stands `distance` positions before it, as far as positions go."""
    seen = distance >= 0
    return seen if block.window is None else seen & (distance < block.window)


# --- packed rows -------------------------------------------------------------------------------------------


def packed_rows(architecture: Architecture, segment_ids: Any, rounded: bool = False) -> Attend:
    """Attention within the examples of packed rows: a token sees itself and the earlier ones of its own example.

    Queries are taken in up to four stretches, each with the keys up to its own last position: later ones are masked.

    Args:
        architecture: The model's.
        segment_ids: (B, T) integers: 1, 2, … for a row's examples, 0 for padding. A mask of zeros and ones is one
            example for each row.
        rounded: As in `attention`.

    Returns:
        An `Attend` for `forward`.
    """
    segments = jnp.asarray(segment_ids).astype(jnp.int32)
    length = segments.shape[1]
    place = jnp.arange(length)
    distance = place[:, None] - place[None, :]  # (T, T)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)  # (B, T, T)

    def attend(number: int, q, k, v):
        seen = same & in_window(architecture.blocks[number], distance)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # (B, kv_heads, T, H)
        results = []
        for start, end in _stretches(length):
            keys = Keys(k[:, :, :end], v[:, :, :end])
            results.append(attention(architecture, q[:, start:end], [keys], seen[:, start:end, :end], rounded))
        return results[0] if len(results) == 1 else jnp.concatenate(results, axis=1)

    return attend


def _stretches(length: int) -> list[tuple[int, int]]:
    """`(start, end)` of up to four stretches of positions, each of at least 192.

    With n stretches (n + 1) / 2n of the products are left. On two cores three of 128 positions were no faster than two
    of 192, and two of 128 no faster than one of 256.
    """
    size = math.ceil(length / max(1, min(4, length // 192)))
    return [(start, min(start + size, length)) for start in range(0, length, size)]
