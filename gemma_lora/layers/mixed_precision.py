"""Matrix products in mixed precision: factors rounded to bfloat16, sums in float32.

Asking for a float32 result is what makes it fast on CPUs with AVX512-BF16 or AMX: with a bfloat16 result XLA (jax
0.10.2) widens the factors first and is slower than in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _rounded_dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    return jax.lax.dot_general(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (axes, ((), ())), preferred_element_type=jnp.float32
    )


def _dot_of_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """`aᵀ @ b` with rounded factors, (T, M) and (T, N) to (M, N) float32.

    On the CPU the narrower factor is transposed in memory first: XLA there (jax 0.10.2) forms products over both
    factors' first axes in float32, attention's in twice the time.
    """
    if jax.default_backend() != "cpu":
        return _rounded_dot(a, b, ((0,), (0,)))
    if a.shape[1] <= b.shape[1]:
        return _rounded_dot(_transposed(a), b, ((1,), (0,)))
    # Without barriers XLA would swap the factors again, into a product that it has no code for, and make the
    # transposition part of what the gradient is multiplied with next, which then is formed in float32.
    barrier = jax.lax.optimization_barrier
    return barrier(barrier(_rounded_dot(_transposed(b), a, ((1,), (0,)))).T)


def _transposed(a: jax.Array) -> jax.Array:
    """A matrix rounded to bfloat16 and transposed in memory: a barrier, or XLA makes it part of the product again.

    A large one in blocks of 32 rows, which stay in the processor's cache.
    """
    barrier = jax.lax.optimization_barrier
    a, (rows, columns) = a.astype(jnp.bfloat16), a.shape
    if rows % 32 or columns < 32:
        return barrier(a.T)
    blocks = barrier(a.reshape(rows // 32, 32, columns).transpose(0, 2, 1))
    return barrier(blocks.transpose(1, 0, 2).reshape(columns, rows))


@jax.custom_vjp
def frozen_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` for a kernel that is not trained.

    Args:
        x: (T, d_in) float32.
        kernel: (d_in, d_out), any float dtype. It gets no gradient: zeros.

    Returns:
        (T, d_out) float32. Each factor is off by a relative 2^-8 at most, the sum by nothing more.

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


@jax.custom_vjp
def low_rank_product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x @ a @ b` for two thin matrices that are trained: LoRA's update.

    Args:
        x: (T, d_in) float32.
        a: (d_in, rank) float32.
        b: (rank, d_out) float32.

    Returns:
        (T, d_out) float32. Factors are rounded to bfloat16, x @ a and those of the gradients' products too; sums are
        float32, and so are the gradients.

    Example:

    >>> low_rank_product(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones((1, 4))).shape
    (2, 4)

    Reference: Hu et al. 2021, "LoRA" (https://arxiv.org/abs/2106.09685), section 4.1, in the mixed precision of
    `frozen_product`.
    """
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x, a, b):
    x = x.astype(jnp.bfloat16)  # the frozen product rounds it too, and XLA does so once
    inner = _rounded_dot(x, a, ((1,), (0,)))  # (T, rank)
    return _rounded_dot(inner, b, ((1,), (0,))), (x, inner, a, b)


def _low_rank_backward(factors, gradient):
    x, inner, a, b = factors
    gradient = gradient.astype(jnp.bfloat16)
    d_inner = _rounded_dot(gradient, b, ((1,), (1,)))  # (T, rank)
    return _rounded_dot(d_inner, a, ((1,), (1,))), _dot_of_columns(x, d_inner), _dot_of_columns(inner, gradient)


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def _each(form: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """What `form` makes of each pair of matrices in two arrays, (…, M, K) and (…, K, N) or one of them transposed.

    On the CPU one by one: XLA there (jax 0.10.2) widens the factors of a product with batch axes to float32 again.
    """
    batch = a.shape[:-2]
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    if jax.default_backend() != "cpu":
        products = jax.vmap(form)(a, b)
    else:
        products = jnp.stack([form(left, right) for left, right in zip(a, b, strict=True)])
    return products.reshape(*batch, *products.shape[-2:])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return _rounded_dot(a, b, ((1,), (0,)))


def _dot_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    return _rounded_dot(a, b, ((1,), (1,)))


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
    return _each(_dot, a, b)


def _batched_forward(a, b):
    return batched_product(a, b), (a, b)


def _batched_backward(factors, gradient):
    a, b = factors
    return _each(_dot_of_rows, gradient, b), _each(_dot_of_columns, a, gradient)  # dA = dC Bᵀ, dB = Aᵀ dC


batched_product.defvjp(_batched_forward, _batched_backward)
