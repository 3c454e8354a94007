"""Cross-entropy over a large vocabulary, without ever holding all the logits.

Gemma's vocabulary has 262,144 entries. The logits of a batch of 4 × 256 tokens are 1 GiB in float32, their
softmax another, their gradient a third. Here the hidden states that carry loss are taken in chunks: a chunk's
logits are formed, give the loss and at once the gradient with respect to the hidden states, and are dropped.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def _chunk_loss(hidden, embeddings, targets, weights, soft_cap, with_gradients):
    """Loss of one chunk and its gradients with respect to hidden states and logits.

    Args:
        hidden: (C, D). embeddings: (V, D). targets: (C,) int32. weights: (C,) float32.

    Returns:
        `(loss, d_hidden, d_logits)`: sum of weights × negative log-likelihood, (C, D) float32 and
        (C, V); the latter two are None without gradients.
    """
    # (C, D) x (V, D) -> (C, V), summed in float32 whatever the inputs are.
    logits = jax.lax.dot_general(hidden, embeddings, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    maximum = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - maximum)
    normalizer = jnp.sum(exponentials, axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    losses = (jnp.log(normalizer) + maximum - at_target)[:, 0]
    loss = jnp.sum(losses * weights)
    if not with_gradients:
        return loss, None, None
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    d_logits = (exponentials / normalizer - (columns == targets[:, None])) * weights[:, None]
    if soft_cap is not None:
        d_logits = d_logits * (1.0 - jnp.square(logits / soft_cap))  # d tanh(x) = 1 - tanh(x)^2
    d_logits = d_logits.astype(embeddings.dtype)
    d_hidden = jax.lax.dot_general(d_logits, embeddings, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return loss, d_hidden, d_logits


def _loss_and_gradients(hidden, embeddings, targets, weights, chunk_size, soft_cap, d_hidden, d_embeddings):
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
        chunk = part(hidden)
        chunk_loss, chunk_hidden, chunk_logits = _chunk_loss(
            chunk, embeddings, part(targets), part(weights), soft_cap, d_hidden or d_embeddings
        )
        if d_hidden:
            grad_hidden = jax.lax.dynamic_update_slice_in_dim(grad_hidden, chunk_hidden, start, axis=0)
        if d_embeddings:  # (C, V) x (C, D) -> (V, D)
            grad_embeddings = grad_embeddings + jax.lax.dot_general(
                chunk_logits, chunk, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return loss + chunk_loss, grad_hidden, grad_embeddings

    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((tokens + padding if d_hidden else 0, width), jnp.float32),
        jnp.zeros(embeddings.shape if d_embeddings else (0, width), jnp.float32),
    )
    loss, grad_hidden, grad_embeddings = jax.lax.fori_loop(0, chunks, one_chunk, carry)
    if d_hidden:  # back to the order the tokens came in
        grad_hidden = jnp.zeros((tokens, width), jnp.float32).at[order].set(grad_hidden[:tokens])
    return loss, grad_hidden, grad_embeddings


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _summed_loss(hidden, embeddings, targets, weights, chunk_size, soft_cap, train_embeddings):
    loss, _, _ = _loss_and_gradients(hidden, embeddings, targets, weights, chunk_size, soft_cap, False, False)
    return loss


def _forward(hidden, embeddings, targets, weights, chunk_size, soft_cap, train_embeddings):
    loss, grad_hidden, grad_embeddings = _loss_and_gradients(
        hidden, embeddings, targets, weights, chunk_size, soft_cap, True, train_embeddings
    )
    empty = jnp.zeros((0,), hidden.dtype)
    return loss, (grad_hidden, grad_embeddings, embeddings if not train_embeddings else empty, empty)


def _backward(chunk_size, soft_cap, train_embeddings, residuals, cotangent):
    grad_hidden, grad_embeddings, embeddings, like = residuals
    d_hidden = (cotangent * grad_hidden).astype(like.dtype)
    if train_embeddings:
        return d_hidden, cotangent * grad_embeddings, None, None
    # Frozen: XLA drops these zeros, nobody reads them.
    return d_hidden, jnp.zeros_like(embeddings), None, None


_summed_loss.defvjp(_forward, _backward)


def chunked_cross_entropy(
    hidden: jax.Array,
    embeddings: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk_size: int = 256,
    soft_cap: float | None = None,
    train_embeddings: bool = False,
) -> jax.Array:
    """Mean cross-entropy of `softmax(hidden @ embeddings.T)` over the tokens that carry loss.

    `loss = Σ weights · (logsumexp(logits) - logits[target]) / Σ weights`

    Tokens of weight 0 cost nothing, and at most `chunk_size` rows of logits exist at a time. The gradient
    with respect to the hidden states is formed in the forward pass, while the logits are there.

    Args:
        hidden: (..., D), the backbone's output, any float dtype.
        embeddings: (V, D), the tied embedding matrix.
        targets: (...) integers in [0, V): the token to be predicted at each position.
        weights: (...) floats, 0 where a position carries no loss.
        chunk_size: Integer, tokens whose logits are formed together.
        soft_cap: Float or None; logits become soft_cap · tanh(logits / soft_cap), as in Gemma 2.
        train_embeddings: If False (the default), the embeddings are taken as frozen and get a zero
            gradient from this loss.

    Returns:
        Scalar float32. 0 where all weights are 0.

    Raises:
        ValueError: If shapes disagree or `chunk_size` is below 1.

    Example:

    >>> hidden = jnp.ones((2, 3, 4)); embeddings = jnp.eye(4)
    >>> targets = jnp.zeros((2, 3), "int32")
    >>> float(chunked_cross_entropy(hidden, embeddings, targets, jnp.ones((2, 3))).round(4))
    1.3863

    Reference: the idea of a loss that never stores the logits is from Wijmans et al. 2024, "Cut Your Losses"
    (https://arxiv.org/abs/2411.09009), section 4; here chunks run over tokens, not over the vocabulary.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1. Received: chunk_size={chunk_size!r}")
    if hidden.shape[:-1] != targets.shape or targets.shape != weights.shape:
        raise ValueError(
            "`targets` and `weights` must have the shape of `hidden` without its last axis. Received: "
            f"hidden {hidden.shape}, targets {targets.shape}, weights {weights.shape}"
        )
    if hidden.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            f"`hidden` and `embeddings` must agree in their last axis. Received: {hidden.shape}, {embeddings.shape}"
        )
    weights = weights.reshape(-1).astype(jnp.float32)
    total = _summed_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        embeddings,
        targets.reshape(-1).astype(jnp.int32),
        weights,
        chunk_size,
        soft_cap,
        train_embeddings,
    )
    weight = jnp.sum(weights)
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
