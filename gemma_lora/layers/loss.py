"""Cross-entropy over a large vocabulary, without ever holding the logits.

Gemma's vocabulary has 262,144 entries. The logits of a batch of 4 × 256 tokens are 1 GiB in float32, their
softmax another, their gradient a third. Here a chunk of tokens meets the vocabulary block by block: a block's logits
are formed, added to a running softmax and to the running mean of the embeddings under it, and dropped while they
are still in the processor's cache. That mean, less the target's embedding, is the gradient with respect to the
hidden state, so no second pass over the vocabulary is needed.

Two things make it faster on request. In mixed precision the factors of the large products are rounded to bfloat16. And
the gradient filter leaves a block out of the gradient of the tokens in whose softmax it has next to no share (its part
of the loss is counted).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.layers.vocabulary import NEGLIGIBLE as NEGLIGIBLE
from gemma_lora.layers.vocabulary import (
    PACKED,
    Chunk,
    Shortcuts,
    chunk_loss,
    embedding_gradient,
    over_vocabulary,
    rows_of,
    token_losses,
)
from gemma_lora.layers.vocabulary import table_rows as table_rows
from gemma_lora.quantization.packed import Bfloat16Rows, Int8Rows

_LONGEST = 256  # tokens in a chunk that `fitting_chunk` chooses


def _loss_and_gradients(hidden, embeddings, targets, weights, chunk_size, soft_cap, d_hidden, d_embeddings, shortcuts):
    """Walks the chunks that carry loss; the two flags say which gradients to form on the way."""
    tokens, width = hidden.shape
    padding = -tokens % chunk_size
    # Tokens with loss first: the loop below ends after them.
    order = jnp.argsort(weights == 0, stable=True)
    hidden = jnp.pad(hidden[order], ((0, padding), (0, 0)))
    targets = jnp.pad(targets[order], (0, padding))
    weights = jnp.pad(weights[order], (0, padding))
    chunks = (jnp.count_nonzero(weights) + chunk_size - 1) // chunk_size

    def one_chunk(index, carry):
        loss, grad_hidden, grad_embeddings = carry
        start = index * chunk_size
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk_size)
        chunk = Chunk.of(part(hidden), part(targets), part(weights))
        loss_of_chunk, chunk_hidden, log_normalizer = chunk_loss(chunk, embeddings, soft_cap, d_hidden, shortcuts)
        if d_hidden:
            grad_hidden = jax.lax.dynamic_update_slice_in_dim(grad_hidden, chunk_hidden, start, axis=0)
        if d_embeddings:
            grad_embeddings = embedding_gradient(chunk, embeddings, soft_cap, log_normalizer, grad_embeddings)
        return loss + loss_of_chunk, grad_hidden, grad_embeddings

    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((tokens + padding if d_hidden else 0, width), jnp.float32),
        jnp.zeros(embeddings.shape if d_embeddings else (0, width), jnp.float32),
    )
    loss, grad_hidden, grad_embeddings = jax.lax.fori_loop(0, chunks, one_chunk, carry)
    if d_hidden:  # back to the order the tokens came in
        grad_hidden = jnp.zeros((tokens, width), jnp.float32).at[order].set(grad_hidden[:tokens])
    return loss, grad_hidden, grad_embeddings


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _summed_loss(hidden, embeddings, targets, weights, chunk_size, soft_cap, train_embeddings, shortcuts):
    hidden, table = _factors(hidden, embeddings, shortcuts)
    return _loss_and_gradients(hidden, table, targets, weights, chunk_size, soft_cap, False, False, shortcuts)[0]


def _factors(hidden, embeddings, shortcuts: Shortcuts):
    if not isinstance(embeddings, PACKED) and (shortcuts.rounded or embeddings.dtype == jnp.bfloat16):
        embeddings = Bfloat16Rows.of(embeddings)
    return hidden.astype(jnp.bfloat16) if shortcuts.rounded else hidden, embeddings


def _forward(hidden, embeddings, targets, weights, chunk_size, soft_cap, train_embeddings, shortcuts):
    factor, table = _factors(hidden, embeddings, shortcuts)
    loss, grad_hidden, grad_embeddings = _loss_and_gradients(
        factor, table, targets, weights, chunk_size, soft_cap, True, train_embeddings, shortcuts
    )
    like = jnp.zeros((0,), hidden.dtype)
    return loss, (grad_hidden, grad_embeddings, like if train_embeddings else embeddings, like)


def _backward(chunk_size, soft_cap, train_embeddings, shortcuts, residuals, cotangent):
    grad_hidden, grad_embeddings, embeddings, like = residuals
    d_hidden = (cotangent * grad_hidden).astype(like.dtype)
    if train_embeddings:
        return d_hidden, cotangent * grad_embeddings, None, None
    # Frozen: XLA drops these zeros, nobody reads them.
    return d_hidden, None if isinstance(embeddings, PACKED) else jnp.zeros_like(embeddings), None, None


_summed_loss.defvjp(_forward, _backward)


def fitting_chunk(tokens: int) -> int:
    """The chunk size in which so many tokens fit with little room to spare.

    The smallest number of equal chunks of at most 256 tokens, with their size rounded up to a multiple of 16. A matrix
    product over fewer tokens is slower per token, and the last chunk's empty places are computed too.

    Args:
        tokens: Integer of at least 0, the tokens that carry loss.

    Returns:
        Integer, 16 to 256: tokens per chunk.

    Raises:
        ValueError: If `tokens` is negative.

    Example:

    >>> [fitting_chunk(tokens) for tokens in (1, 100, 256, 257, 1024)]
    [16, 112, 256, 144, 256]
    """
    if tokens < 0:
        raise ValueError(f"`tokens` must be at least 0. Received: tokens={tokens!r}")
    tokens = max(1, tokens)
    chunks = -(-tokens // _LONGEST)
    return -(-tokens // chunks // 16) * 16


def _is_known(array) -> bool:
    """Whether an array's numbers can be read now: neither traced nor on another process's devices."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def _known_targets(targets, weights, vocabulary: int) -> jax.Array:
    """`targets` as int32, with -1 in the place of those outside the vocabulary.

    Raises:
        ValueError: If `targets` are no integers, or one outside the vocabulary is at a token with loss. The second is
            seen only where both arrays' numbers are known; a traced program cannot raise.
    """
    kind = getattr(targets, "dtype", None) or np.asarray(targets).dtype
    if np.size(targets) and not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(f"`targets` must be integers. Received: targets of dtype {kind}")
    if not _is_known(targets):
        targets = jnp.asarray(targets)
        narrow = targets.astype(jnp.int32)
        # A number too large for int32 comes back as another one.
        return jnp.where((narrow >= 0) & (narrow < vocabulary) & (narrow == targets), narrow, -1)
    numbers = np.asarray(targets).astype(np.int64)
    outside = (numbers < 0) | (numbers >= vocabulary)
    if outside.any() and _is_known(weights) and (wrong := numbers[outside & (np.asarray(weights) != 0)]).size:
        raise ValueError(
            f"`targets` must be in [0, {vocabulary}), the vocabulary, where a token carries loss. Received: targets "
            f"{', '.join(map(str, np.unique(wrong)[:5]))} at {wrong.size} of {numbers.size} tokens"
        )
    return jnp.asarray(np.where(outside, -1, numbers), jnp.int32)


def chunked_cross_entropy(
    hidden: jax.Array,
    embeddings: jax.Array | Int8Rows | Bfloat16Rows,
    targets: jax.Array,
    weights: jax.Array,
    chunk_size: int | None = None,
    soft_cap: float | None = None,
    train_embeddings: bool = False,
    normalizer: float | None = None,
    mixed_precision: bool = False,
    filter_gradient: bool | None = None,
) -> jax.Array:
    """Mean cross-entropy of `softmax(hidden @ embeddings.T)` over the tokens that carry loss.

    `loss = Σ weights · (logsumexp(logits) - logits[target]) / Σ weights`

    Tokens of weight 0 cost nothing and add nothing, whatever their hidden states and targets are (infinite, NaN, -100).
    At most `chunk_size` × 1,024 logits exist at a time. The gradient with respect to the hidden states is formed in the
    forward pass, while the logits are there. Sums are float32.

    A token with loss whose target is not in the vocabulary is an error. Inside a compiled program, which cannot raise
    one, it makes the loss and that token's gradient NaN, and training stops with "The loss is nan".

    Args:
        hidden: (..., D), the backbone's output, any float dtype.
        embeddings: (V, D), the tied embedding matrix; or `packed.Int8Rows` or `Bfloat16Rows`, of which 1,024
            rows are decoded at a time.
        targets: (...) integers in [0, V): the token to be predicted at each position. Any integer where the weight
            is 0.
        weights: (...) floats, 0 where a position carries no loss.
        chunk_size: Integer, tokens whose logits are formed together. None (the default): what fits the number of
            positions, `fitting_chunk`; where few of them carry loss, `fitting_chunk` of those is faster.
        soft_cap: Float or None; logits become soft_cap · tanh(logits / soft_cap), as in Gemma 2.
        train_embeddings: If False (the default), the embeddings are taken as frozen and get a zero
            gradient from this loss.
        normalizer: Float or None; what the sum is divided by, in place of Σ weights.
        mixed_precision: If True, `hidden` and `embeddings` are rounded to bfloat16 (give
            `Bfloat16Rows` to save that); sums stay float32.
        filter_gradient: If True, a block of 1,024 entries may be left out of the gradient with respect to `hidden` of
            tokens in whose softmax its share is at most `NEGLIGIBLE`; the loss is the same. By default as
            `mixed_precision`.

    Returns:
        Scalar float32. 0 where all weights are 0.

    Raises:
        ValueError: If shapes disagree, `chunk_size` is below 1, or `targets` are no integers or hold one outside the
            vocabulary at a token with loss.

    Example:

    >>> hidden = jnp.ones((2, 3, 4)); embeddings = jnp.eye(4)
    >>> targets = jnp.zeros((2, 3), "int32")
    >>> round(float(chunked_cross_entropy(hidden, embeddings, targets, jnp.ones((2, 3)))), 4)
    1.3863

    Reference: Wijmans et al. 2024, "Cut Your Losses" (https://arxiv.org/abs/2411.09009), section 4, a loss that never
    stores the logits. The running softmax is that of Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867),
    algorithm 3; that it gives the gradient too is flash attention's forward pass with the embeddings as keys and
    values. Leaving out blocks is the first paper's gradient filter, which drops what is below 2^-12 in all tokens of a
    tile. Deciding it token by token and keeping the target apart are ours.
    """
    if not isinstance(embeddings, PACKED):
        embeddings = jnp.asarray(embeddings)
    elif train_embeddings:
        raise ValueError("Packed embeddings cannot be trained. Received: train_embeddings=True")
    hidden = jnp.asarray(hidden)
    _check_shapes(hidden, embeddings, targets, weights)
    targets = _known_targets(targets, weights, embeddings.shape[0])
    chunk_size = _checked_size(fitting_chunk(targets.size) if chunk_size is None else chunk_size)
    weights = jnp.asarray(weights).reshape(-1).astype(jnp.float32)
    total = _summed_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        embeddings,
        targets.reshape(-1),
        weights,
        chunk_size,
        soft_cap,
        train_embeddings,
        Shortcuts(mixed_precision, mixed_precision if filter_gradient is None else filter_gradient),
    )
    if normalizer is not None:
        return total / normalizer
    weight = jnp.sum(weights)
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def _checked_size(chunk_size: int) -> int:
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1. Received: chunk_size={chunk_size!r}")
    return chunk_size


def _check_shapes(hidden, embeddings, targets, weights) -> None:
    if hidden.shape[:-1] != np.shape(targets) or np.shape(targets) != np.shape(weights):
        raise ValueError(
            "`targets` and `weights` must have the shape of `hidden` without its last axis. Received: "
            f"hidden {hidden.shape}, targets {np.shape(targets)}, weights {np.shape(weights)}"
        )
    if hidden.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            f"`hidden` and `embeddings` must agree in their last axis. Received: {hidden.shape}, {embeddings.shape}"
        )


def token_scores(
    hidden: jax.Array,
    embeddings: jax.Array | Int8Rows | Bfloat16Rows,
    targets: jax.Array,
    chunk_size: int = 256,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each token's loss, and whether its target is the likeliest entry of the vocabulary; no logits are kept.

    Args:
        hidden: (N, D), the backbone's output, any float dtype.
        embeddings, soft_cap: As in `chunked_cross_entropy`.
        targets: (N,) integers in [0, V).
        chunk_size: Integer, tokens that meet the vocabulary together.

    Returns:
        `(losses, likeliest)`: (N,) float32, -ln softmax(hidden @ embeddings.T)[target]; (N,) bool, True where no other
        entry's logit is larger.

    Raises:
        ValueError: If shapes disagree, `chunk_size` is below 1, or a target is not in the vocabulary. Inside a compiled
            program, which cannot raise, such a token's loss is NaN, and its target is not the likeliest.

    Example:

    >>> losses, likeliest = token_scores(3 * jnp.eye(3, 4), jnp.eye(4), jnp.array([0, 1, 3]))
    >>> likeliest.tolist()
    [True, True, False]
    """
    hidden, embeddings = jax.tree.map(jnp.asarray, (hidden, embeddings))
    _checked_size(chunk_size)
    if hidden.ndim != 2 or hidden.shape[:1] != np.shape(targets) or hidden.shape[1] != embeddings.shape[-1]:
        raise ValueError(
            "`hidden` must be (N, D), `targets` (N,) and `embeddings` (V, D). Received: "
            f"{hidden.shape}, {np.shape(targets)}, {embeddings.shape}"
        )
    targets = _known_targets(targets, np.ones(1), embeddings.shape[0])
    count = hidden.shape[0]
    chunks = max(1, -(-count // chunk_size))
    size = max(1, -(-count // chunks))  # equal ones, with little room to spare
    fill = chunks * size - count
    hidden, embeddings = _factors(hidden, embeddings, Shortcuts())
    hidden = jnp.pad(hidden, ((0, fill), (0, 0))).reshape(chunks, size, -1)
    targets = jnp.pad(targets, (0, fill)).reshape(chunks, size)

    def one_chunk(part):
        hidden, targets = part
        chunk = Chunk.of(hidden, targets, jnp.ones(size, jnp.float32))
        at_target = rows_of(embeddings, chunk.targets)
        seen = over_vocabulary(chunk, embeddings, at_target, soft_cap, False, Shortcuts())
        return token_losses(seen)[0], seen.maximum <= seen.target

    losses, likeliest = jax.lax.map(one_chunk, (hidden, targets))
    return losses.reshape(-1)[:count], likeliest.reshape(-1)[:count]
