"""A frozen matrix product in mixed precision: factors rounded to bfloat16, sums in float32.

Asking for a float32 result is what makes it fast on CPUs with AVX512-BF16 or AMX: with a bfloat16 result XLA (jax
0.10.2) widens the factors first and is slower than in float32.
"""

from __future__ import annotations

from typing import Any

from gemma_lora.backend import require_jax

require_jax()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402

from gemma_lora import linear  # noqa: E402


def _rounded_dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (axes, ((), ())), preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def frozen_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` for a kernel that is not trained.

    Args:
        x: (T, d_in) float32.
        kernel: (d_in, d_out), any float dtype. It gets no gradient: zeros.

    Returns:
        (T, d_out) float32. Each factor is off by a relative 2^-9 at most, the sum by nothing more.

    Example:

    >>> frozen_product(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)

    Reference: Micikevicius et al. 2018, "Mixed Precision Training" (https://arxiv.org/abs/1710.03740), section 3.3,
    with bfloat16, which has float32's range and needs no loss scaling.
    """
    return _rounded_dot(x, kernel, ((1,), (0,)))


def _forward(x, kernel):
    return frozen_product(x, kernel), kernel


def _backward(kernel, gradient):
    d_x = _rounded_dot(gradient, kernel, ((1,), (1,)))  # (T, d_out) x (d_in, d_out) -> (T, d_in)
    return d_x, jnp.zeros_like(kernel)  # frozen: XLA drops these zeros, nobody reads them


frozen_product.defvjp(_forward, _backward)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`; where only `kernel` is in bfloat16, `frozen_product`."""
    return frozen_product(x, kernel) if kernel.dtype == jnp.bfloat16 != x.dtype else x @ kernel


def _each(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Rounded products of the matrices in two arrays, (…, M, K) and (…, K, N) or one of them transposed.

    On the CPU one by one: XLA there (jax 0.10.2) widens the factors of a product with batch axes to float32 again.
    """
    batch = a.shape[:-2]
    if jax.default_backend() != "cpu":
        same = tuple(range(len(batch)))
        contracted = ((len(batch) + axes[0][0],), (len(batch) + axes[1][0],))
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a, b, (contracted, (same, same)), preferred_element_type=jnp.float32)
    pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    products = jnp.stack([_rounded_dot(left, right, axes) for left, right in pairs])
    return products.reshape(*batch, *products.shape[-2:])


@jax.custom_vjp
def batched_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` for many matrices, both with a gradient, as attention has it.

    Args:
        a: (…, M, K) float32.
        b: (…, K, N) float32, with a's first axes.

    Returns:
        (…, M, N) float32. Factors are rounded to bfloat16, in the gradients' products too; sums are float32.

    Example:

    >>> batched_product(jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))).shape
    (2, 3, 5)
    """
    return _each(a, b, ((1,), (0,)))


def _batched_forward(a, b):
    return batched_product(a, b), (a, b)


def _batched_backward(factors, gradient):
    a, b = factors
    return _each(gradient, b, ((1,), (1,))), _each(a, gradient, ((0,), (0,)))  # dA = dC Bᵀ, dB = Aᵀ dC


batched_product.defvjp(_batched_forward, _batched_backward)


def rounded_output(layer: keras.layers.Layer, inputs: Any, kernel: jax.Array) -> Any:
    """What a linear layer without bias computes with its kernel as a `(d_in, d_out)` bfloat16 matrix."""
    y = linear.in_rows(layer, inputs, lambda x: product(x, kernel))
    return y if layer.activation is None else layer.activation(y)


class _RoundedCall:
    """What a frozen linear layer computes while `round_layer` holds; outside training, what it always does."""

    def __init__(self, layer: keras.layers.Layer, kernel: keras.Variable):
        self.layer, self.kernel = layer, kernel

    def __call__(self, inputs: Any, training: bool | None = None) -> Any:
        if not training or inputs.dtype != "float32":
            return type(self.layer).call(self.layer, inputs, training=training)
        return rounded_output(self.layer, inputs, self.kernel.value)


def round_layer(layer: keras.layers.Layer, kernel: keras.Variable | None) -> None:
    """Lets a frozen `Dense` or `EinsumDense` layer without bias form its product in mixed precision while it trains.

    Args:
        layer: The layer. Its weights and its class stay what they are.
        kernel: Its kernel as a `(d_in, d_out)` bfloat16 matrix; None to undo this.
    """
    if kernel is not None:
        layer.call = _RoundedCall(layer, kernel)
    elif "call" in vars(layer):
        del layer.call
