"""Which token comes next: the likeliest, or one drawn from what the model finds probable.

A token is drawn from softmax(logits / temperature), restricted to likely tokens if that is asked for. What is drawn
depends on the seed, the row's number among the prompts and the token's number in its answer, and on nothing else: not
on the batch in which a row is answered.

Reference: Fan et al. 2018, https://arxiv.org/abs/1805.04833, section 5, for top-k; Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751, section 3.1, for top-p. Tokens as probable as the last one that stays all stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.settings import Answering
from gemma_lora.layers.loss import table_rows
from gemma_lora.quantization.rows import Bfloat16Rows, Int8Rows

_BLOCK = 4096  # entries of the vocabulary whose logits are formed at a time


class Sampling(NamedTuple):
    """How tokens are drawn, as a compiled program takes it; what is None is not in the program."""

    keys: jax.Array  # (B,), a random key for each row
    temperature: jax.Array  # scalar, above 0
    top_k: jax.Array | None
    top_p: jax.Array | None


def sampling_of(answering: Answering, numbers: Sequence[int] | np.ndarray) -> Sampling | None:
    """The `Sampling` of a batch; None where the likeliest token is taken.

    Args:
        answering: What was asked for.
        numbers: (B,) integers, each row's number among all prompts.
    """
    if answering.temperature == 0:
        return None
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(answering.seed), jnp.asarray(numbers))
    top_k = None if answering.top_k is None else jnp.asarray(answering.top_k, jnp.int32)
    top_p = None if answering.top_p is None else jnp.asarray(answering.top_p, jnp.float32)
    return Sampling(keys, jnp.asarray(answering.temperature, jnp.float32), top_k, top_p)


def drawn(table, hidden, soft_cap: float | None, sampling: Sampling, place) -> jax.Array:
    """Draws a token for each row.

    Args:
        table: (V, D): an array, `Int8Rows` or `Bfloat16Rows`.
        hidden: (B, D).
        soft_cap: Bound of the logits (Gemma 2), or None.
        sampling: The batch's.
        place: Scalar, the token's number in its answer.

    Returns:
        (B,) int32.
    """
    logits = _logits(table, hidden)  # (V, B)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = _restricted(logits / sampling.temperature, sampling)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(sampling.keys, place)
    # First a group of tokens, by its share, then one of the group: a few hundred random numbers, and not one a token.
    split = logits.reshape(math.gcd(len(logits), 512), -1, logits.shape[1])  # (groups, V / groups, B)
    group = _categorical(keys, 0, jax.nn.logsumexp(split, axis=1))
    chosen = jnp.take_along_axis(split, group[None, None], axis=0)[0]  # (V / groups, B)
    return (group * split.shape[1] + _categorical(keys, 1, chosen)).astype(jnp.int32)


def _categorical(keys, number: int, logits) -> jax.Array:
    """An index for each column of (K, B)."""
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, number), row))(keys, logits.T)


def _logits(table, hidden) -> jax.Array:
    """(V, B) float32; of a packed table `_BLOCK` rows are decoded at a time."""
    if not isinstance(table, (Int8Rows, Bfloat16Rows)):
        return (table @ hidden.T).astype(jnp.float32)

    def put(start, logits, result):
        return jax.lax.dynamic_update_slice_in_dim(result, logits, start, axis=0)

    return _over_blocks(table, hidden, put, jnp.zeros((table.shape[0], len(hidden)), jnp.float32))


def _restricted(logits, sampling: Sampling) -> jax.Array:
    """(V, B) logits with -inf where a token is not to be drawn: top-k first, then top-p of what is left."""
    if (top_k := sampling.top_k) is not None:
        wanted = jnp.minimum(top_k, len(logits))
        logits = _at_least(logits, lambda kept: jnp.sum(kept, axis=0) >= wanted)
    if (top_p := sampling.top_p) is not None:
        shares = jax.nn.softmax(logits, axis=0)
        logits = _at_least(logits, lambda kept: jnp.sum(jnp.where(kept, shares, 0), axis=0) >= top_p)
    return logits


def _at_least(logits, enough: Callable) -> jax.Array:
    """Keeps of each column the largest logits, as few as are enough.

    The bits of floats, as integers, have the floats' order. So the bound is found bit by bit, without sorting.

    Args:
        logits: (V, B) float32.
        enough: From which are kept, (V, B) booleans, to whether they are enough, (B,).
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    top = jnp.uint32(1 << 31)
    ordered = jnp.where(bits >= top, ~bits, bits | top)

    def one_bit(number, bound):
        higher = bound | (top >> number.astype(jnp.uint32))
        return jnp.where(enough(ordered >= higher), higher, bound)

    bound = jax.lax.fori_loop(0, 32, one_bit, jnp.zeros(logits.shape[1], jnp.uint32))
    return jnp.where(ordered >= bound, logits, -jnp.inf)


def likeliest(table, hidden) -> jax.Array:
    """The tokens (B,) with the largest logits; of equal ones, the first.

    Soft-capping (Gemma 2) is monotonic and changes none of them.

    Args:
        table: (V, D): an array, or `Int8Rows` or `Bfloat16Rows`, of which `_BLOCK` rows are used at a time.
        hidden: (B, D).
    """
    if not isinstance(table, (Int8Rows, Bfloat16Rows)):
        return _max_and_place(table @ hidden.T)[1]

    def better_of(start, logits, best):
        most, token = best
        here, place = _max_and_place(logits)
        better = here > most
        return jnp.where(better, here, most), jnp.where(better, start + place, token)

    nothing = (jnp.full(len(hidden), -jnp.inf), jnp.zeros(len(hidden), jnp.int32))
    return _over_blocks(table, hidden, better_of, nothing)[1]


def _over_blocks(table: Int8Rows | Bfloat16Rows, hidden, step: Callable, state):
    """Goes through the vocabulary: `step(start, logits (K, B) float32, state) -> state` for each block of rows."""
    vocabulary = table.shape[0]
    size = min(_BLOCK, vocabulary)
    if isinstance(table, Bfloat16Rows):
        hidden = hidden.astype(jnp.bfloat16)

    def one_block(index, state):
        start = jnp.minimum(index * size, vocabulary - size)  # the last block may reach back
        rows = table_rows(table, start, size, hidden.dtype)
        logits = jax.lax.dot_general(rows, hidden, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return step(start, logits, state)

    return jax.lax.fori_loop(0, -(-vocabulary // size), one_block, state)


def _max_and_place(logits):
    """Largest entry of each column of (K, B), and its row. XLA's `argmax` of it all is slow on the CPU (jax 0.10.2)."""
    rows, batch = logits.shape
    groups = math.gcd(rows, 64)
    split = logits.reshape(groups, -1, batch)
    tops = split.max(axis=1)  # (groups, B)
    group = jnp.argmax(tops, axis=0)
    chosen = jnp.take_along_axis(split, group[None, None], axis=0)[0]
    return tops.max(axis=0), (group * split.shape[1] + jnp.argmax(chosen, axis=0)).astype(jnp.int32)
