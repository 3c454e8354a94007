"""A block whose activations are computed twice and kept not at all (rematerialization, gradient checkpointing)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gemma_lora.base.keras_on_jax import keras


def recomputed(block: keras.layers.Layer, x, padding_mask, others: Sequence[keras.Variable] = (), **named):
    """`block(x, padding_mask=padding_mask)`, of which the backward pass keeps only what goes in.

    `jax.checkpoint` asks for the same, but XLA on the CPU (jax 0.10.2) takes away the barriers it sets, finds the same
    products in both passes, and keeps them all. Here the second pass also depends on the gradient that comes in, by a
    term of zero, so that it can be neither shared with the first nor begun before it is needed. Frozen weights that
    are no plain matrices get that term too, or what the first pass makes of them would be kept for the second.

    Args:
        block: A built Keras layer without dropout (it would differ from pass to pass).
        x: Hidden states (B, T, D).
        padding_mask: Integers (B, T): segment ids.
        others: Variables that the block reads but does not own, such as rounded kernels.
        **named: More arguments of the block, which are no arrays.

    Returns:
        Hidden states (B, T, D). Values and gradients are those of the plain call.

    Reference:
        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174), section 4.
    """
    trained = list(block.trainable_variables)
    frozen = [*block.non_trainable_variables, *others]

    def plain(trained_values, frozen_values, x, padding_mask):
        mapping = [*zip(trained, trained_values, strict=True), *zip(frozen, frozen_values, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return block(x, padding_mask=padding_mask, **named)

    function = jax.custom_vjp(plain)
    function.defvjp(lambda *inputs: (plain(*inputs), inputs), lambda inputs, g: _backward(plain, inputs, g))
    return function([v.value for v in trained], [v.value for v in frozen], x, padding_mask)


def _backward(plain, inputs, gradient):
    """Runs the block again and pulls the gradient through it; frozen weights and the mask have none."""
    trained_values, frozen, x, padding_mask = inputs
    zero = 0 * gradient[0, 0, 0].astype(x.dtype)  # no constant to XLA: 0 · infinity is not 0
    # A matrix goes into its product as it is; of the others something is made: codes are decoded, kernels with three
    # axes copied into the product's layout, norms' scales repeated for every token.
    made_anew = [
        v if jnp.issubdtype(v.dtype, jnp.floating) and v.ndim == 2 else v + zero.astype(v.dtype) for v in frozen
    ]
    _, pull = jax.vjp(lambda values, x: plain(values, made_anew, x, padding_mask), trained_values, x + zero)
    d_trained, d_x = pull(gradient)
    return d_trained, None, d_x, None
