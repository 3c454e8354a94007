"""One pass of a chunk of tokens over the vocabulary, block by block: losses and gradients without the logits.

A block's logits are formed, added to a running softmax and to the running mean of the embeddings under it, and dropped
while they are still in the processor's cache. `layers/loss.py` makes a loss of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_lora.quantization.packed import Bfloat16Rows, Int8Rows

#: The gradient filter: the share of a token's softmax up to which a block adds nothing to the token's gradient.
NEGLIGIBLE = 2.0**-16
_FEW = (16, 64, 128)  # tokens that the filter may form a block's product for, when it is not for all of a chunk
PACKED = Int8Rows | Bfloat16Rows
_BLOCK = 1024  # vocabulary entries whose logits exist together: fastest on two cores of 1,024 to 32,768


class Chunk(NamedTuple):
    """Tokens that are worked on together: hidden (C, D), targets (C,) int32, weights (C,) float32.

    Invariants: targets are in [0, V); `hidden` is 0 where the weight is 0, and NaN where the token has no loss because
    its target was not in the vocabulary.
    """

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array

    @classmethod
    def of(cls, hidden, targets, weights) -> Chunk:
        """A chunk of any hidden states, with -1 for targets outside the vocabulary (`_known_targets`)."""
        # Chosen, not multiplied: 0 · inf is NaN.
        counted = jnp.where((targets >= 0)[:, None], hidden, jnp.nan)
        return cls(jnp.where((weights != 0)[:, None], counted, 0), jnp.maximum(targets, 0), weights)


class Shortcuts(NamedTuple):
    """What the loss may do to be faster: round factors to bfloat16, leave negligible blocks out of the gradient."""

    rounded: bool = False
    filtered: bool = False


def _dot(a, b, contract):
    """a · b over the given axes, summed in float32 whatever the inputs are."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _capped(logits, soft_cap):
    """`(logits, slope)`: soft-capped logits and their derivative by the plain ones; (logits, None) without a cap."""
    if soft_cap is None:
        return logits, None
    bounded = jnp.tanh(logits / soft_cap)
    return soft_cap * bounded, 1.0 - jnp.square(bounded)  # d tanh(x) = 1 - tanh(x)^2


def _block_logits(chunk: Chunk, embeddings, index, soft_cap):
    """Logits of one block of the vocabulary, for every token but its target.

    Returns:
        `(logits, slope, block, start)`: (C, K) with -inf at targets and at entries of the block before, (C, K) or
        None, (K, D), and where the block begins.
    """
    vocabulary = embeddings.shape[0]
    size = min(_BLOCK, vocabulary)
    start = jnp.minimum(index * size, vocabulary - size)  # the last block reaches back into the one before
    block = table_rows(embeddings, start, size, chunk.hidden.dtype)
    logits, slope = _capped(_dot(chunk.hidden, block, ((1,), (1,))), soft_cap)
    columns = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    counted = (columns != chunk.targets[:, None]) & (columns >= index * size)
    return jnp.where(counted, logits, -jnp.inf), slope, block, start


def table_rows(table, start, size: int, dtype):
    """Rows start … start + size of the table: as they are, or decoded to `dtype` where they are packed."""
    if isinstance(table, PACKED):
        return table.slice(start, size).decode(dtype)
    return jax.lax.dynamic_slice_in_dim(table, start, size, axis=0)


def rows_of(table, ids):
    """The rows of these tokens, (C, D) float32."""
    return table.take(ids).decode() if isinstance(table, PACKED) else table[ids].astype(jnp.float32)


def _blocks(embeddings) -> int:
    return -(-embeddings.shape[0] // _BLOCK)


class _Running(NamedTuple):
    """What a pass over the vocabulary knows of each token; `others` is Σ exp(logit - maximum) but for the target's."""

    target: jax.Array
    target_slope: jax.Array | None
    maximum: jax.Array
    others: jax.Array
    mean: jax.Array


def over_vocabulary(chunk: Chunk, embeddings, at_target, soft_cap, with_gradient: bool, shortcuts: Shortcuts):
    """Passes over the vocabulary block by block.

    Returns:
        `_Running`, with the mean of the embeddings under `others`, (C, D), if `with_gradient`.
    """
    factor = jnp.bfloat16 if shortcuts.rounded else jnp.float32
    plain = jnp.sum(chunk.hidden.astype(jnp.float32) * at_target, axis=-1)
    target, target_slope = _capped(plain, soft_cap)  # (C,)

    def one_block(index, carry):
        maximum, others, mean = carry
        logits, slope, block, _ = _block_logits(chunk, embeddings, index, soft_cap)
        new = jnp.maximum(maximum, jnp.max(logits, axis=-1))
        shrink = jnp.exp(maximum - new)
        exponentials = jnp.exp(logits - new[:, None])
        block_sum = jnp.sum(exponentials, axis=-1)
        others = others * shrink + block_sum
        if with_gradient:
            pull = exponentials if slope is None else exponentials * slope
            mean = mean * shrink[:, None]
            if shortcuts.filtered:
                # Of what has been seen so far, so never less than its share of the whole.
                share = jnp.where(chunk.weights > 0, block_sum / (others + jnp.exp(target - new)), 0.0)
                mean = _add_where(share > NEGLIGIBLE, mean, pull, block, factor)
            else:
                mean = mean + _dot(pull.astype(factor), block.astype(factor), ((1,), (0,)))  # (C, K) x (K, D)
        return new, others, mean

    empty = jnp.zeros(chunk.hidden.shape if with_gradient else (0,), jnp.float32)
    start = (target, jnp.zeros_like(target), empty)
    return _Running(target, target_slope, *jax.lax.fori_loop(0, _blocks(embeddings), one_block, start))


def _add_where(wanted, mean, pull, block, factor):
    """`mean + pull @ block` (C, D) for the tokens that are `wanted` (C,) bool, with factors rounded to `factor`.

    The product is formed for the smallest number of tokens in `_FEW` that holds them. After the first steps of a
    training most blocks matter to a handful of tokens.
    """
    tokens = wanted.shape[0]
    sizes = [size for size in _FEW if size < tokens]

    def for_few(size, mean):
        rows = jnp.nonzero(wanted, size=size, fill_value=tokens)[0]  # filled up with rows that there are not
        few = pull.at[rows].get(mode="fill", fill_value=0.0)
        add = _dot(few.astype(factor), block.astype(factor), ((1,), (0,)))
        return mean.at[rows].add(add, mode="drop")

    def for_all(mean):
        return mean + _dot(pull.astype(factor), block.astype(factor), ((1,), (0,)))

    branches: list[Callable] = [lambda mean: mean, *(partial(for_few, size) for size in sizes), for_all]
    enough = jnp.sum(jnp.count_nonzero(wanted) > jnp.array([0, *sizes]))
    return jax.lax.switch(enough, branches, mean)


def token_losses(seen: _Running):
    """`(losses, everything)`: -ln p(target) of each token, and Σ exp(logit - maximum), both (C,)."""
    everything = seen.others + jnp.exp(seen.target - seen.maximum)
    losses = jnp.log1p(seen.others * jnp.exp(seen.maximum - seen.target))
    # exp(maximum - target) overflows where the target is 88 below the best entry; the plain form is exact there.
    far = seen.maximum - seen.target > 60.0
    return jnp.where(far, jnp.log(everything) + seen.maximum - seen.target, losses), everything


def chunk_loss(chunk: Chunk, embeddings, soft_cap, with_gradient: bool, shortcuts: Shortcuts):
    """Loss of one chunk and its gradient with respect to the hidden states.

    The target is kept apart from the other entries: with `others` the sum of exp(logit - maximum) over them,
    the loss is log(1 + others / exp(target - maximum)) and 1 - p(target) is others / all. Both are exact
    however sure the model is, where logsumexp - target and p - 1 would cancel.

    Returns:
        `(loss, d_hidden, log_normalizer)`: weights · negative log-likelihood, summed; (C, D) float32 or None; (C,).
    """
    at_target = rows_of(embeddings, chunk.targets)  # (C, D)
    seen = over_vocabulary(chunk, embeddings, at_target, soft_cap, with_gradient, shortcuts)
    losses, everything = token_losses(seen)
    loss = jnp.sum(losses * chunk.weights)
    log_normalizer = jnp.log(everything) + seen.maximum
    if not with_gradient:
        return loss, None, log_normalizer
    miss = seen.others / everything  # 1 - p(target)
    if seen.target_slope is not None:
        miss = miss * seen.target_slope
    d_hidden = seen.mean / everything[:, None] - miss[:, None] * at_target
    return loss, d_hidden * chunk.weights[:, None], log_normalizer


def embedding_gradient(chunk: Chunk, embeddings, soft_cap, log_normalizer, gradient):
    """Adds the chunk's gradient with respect to the embeddings to `gradient` (V, D) float32, block by block."""
    hidden = chunk.hidden.astype(jnp.float32)

    def one_block(index, gradient):
        logits, slope, block, start = _block_logits(chunk, embeddings, index, soft_cap)
        d_logits = jnp.exp(logits - log_normalizer[:, None]) * chunk.weights[:, None]
        if slope is not None:
            d_logits = d_logits * slope
        rows = jax.lax.dynamic_slice_in_dim(gradient, start, block.shape[0], axis=0)
        rows = rows + _dot(d_logits, hidden, ((0,), (0,)))  # (C, K) x (C, D) -> (K, D)
        return jax.lax.dynamic_update_slice_in_dim(gradient, rows, start, axis=0)

    gradient = jax.lax.fori_loop(0, _blocks(embeddings), one_block, gradient)
    plain = jnp.sum(hidden * rows_of(embeddings, chunk.targets), axis=-1)
    target, target_slope = _capped(plain, soft_cap)
    d_target = jnp.expm1(target - log_normalizer) * chunk.weights  # (p - 1) · weight
    if target_slope is not None:
        d_target = d_target * target_slope
    return gradient.at[chunk.targets].add(d_target[:, None] * hidden)
