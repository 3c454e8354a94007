"""A function whose inner results are computed twice and kept not at all (rematerialization, gradient checkpointing)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def recomputed(function: Callable[[Any, jax.Array], jax.Array], weights: Any, x: jax.Array) -> jax.Array:
    """`function(weights, x)`, of which the backward pass keeps only what goes in.

    `jax.checkpoint` asks for the same, but XLA on the CPU (jax 0.10.2) takes away the barriers it sets, finds the same
    products in both passes, and keeps them all. Here the second pass also depends on the gradient that comes in, by a
    term of zero, so that it can be neither shared with the first nor begun before it is needed. Weights that are no
    plain matrices get that term too, or what the first pass makes of them would be kept for the second.

    Args:
        function: Pure, without dropout (it would differ from pass to pass), such as a transformer's block.
        weights: A pytree of arrays. Gradients of those that nobody asks for are not computed: XLA drops them.
        x: (B, T, D) floats.

    Returns:
        (B, T, D). Values and gradients are those of the plain call.

    Example:

    >>> x = jnp.ones((1, 2, 3))
    >>> jax.grad(lambda w: recomputed(lambda w, x: w * x * x, w, x).sum())(2.0).item()
    6.0

    Reference:
        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174), section 4.
    """
    leaves, structure = jax.tree.flatten(weights)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    # Integers (codes) have no gradient: apart from the floats, which do.
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def plain(trained, codes, x):
        parts = {True: iter(trained), False: iter(codes)}
        return function(jax.tree.unflatten(structure, [next(parts[is_float]) for is_float in floats]), x)

    whole = jax.custom_vjp(plain)
    whole.defvjp(lambda *inputs: (plain(*inputs), inputs), lambda inputs, gradient: _backward(plain, inputs, gradient))
    trained = [leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float]
    return whole(trained, [leaf for leaf, is_float in zip(leaves, floats, strict=True) if not is_float], x)


def _backward(plain, inputs, gradient):
    """Runs the function again and pulls the gradient through it."""
    trained, codes, x = inputs
    zero = 0 * gradient[(0,) * gradient.ndim].astype(x.dtype)  # no constant to XLA: 0 · infinity is not 0
    # A matrix goes into its product as it is; of the others something is made: codes are decoded, kernels with three
    # axes copied into the product's layout, norms' scales repeated for every token.
    made_anew = [value if value.ndim == 2 else value + zero.astype(value.dtype) for value in trained]
    codes_anew = [value ^ (zero != 0) if value.dtype == bool else value + zero.astype(value.dtype) for value in codes]
    _, pull = jax.vjp(lambda values, x: plain(values, codes_anew, x), made_anew, x + zero)
    d_trained, d_x = pull(gradient)
    return d_trained, None, d_x
