"""DoRA: the length of each of a kernel's columns is trained apart from its direction, which LoRA moves.

    W' = magnitude * (W + s A B) / ||W + s A B||        norms, quotient and product column by column

One column belongs to one output. The norm follows A and B, but no gradient goes through it (section 4.3), so the
gradients of A and B are LoRA's times magnitude / norm.

Reference: Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5. PEFT takes the norm over the inputs of each
output too, which with its `(d_out, d_in)` weights is a row's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

#: A column scaled by less than this is kept when kernels are merged: dividing by the scale would not bring it back.
SMALLEST_DIVISOR = 1e-3


@jax.jit
def column_squares(kernel) -> jax.Array:
    """The sum of squares of each column in float32: (d_in, d_out) -> (d_out,)."""
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0)


def column_norms(kernel, squares, lora_a, lora_b, scaling: float) -> jax.Array:
    """`||kernel + scaling * lora_a @ lora_b||` of each column, without forming the sum.

    ||w + s A b||² = ||w||² + 2 s (Aᵀ w)·b + s² b·(AᵀA b) for a column w of the kernel and b of B. It takes as
    many multiplications as forming the sum, no more than `rank` tokens take in the layer's own product, and writes
    nothing larger than (rank, d_out); on two CPU cores it was a little faster. While B is zero it is the root of
    `squares` to the bit.

    Args:
        kernel: (d_in, d_out), any float dtype; not trained.
        squares: (d_out,) float32, `column_squares(kernel)`: it never changes.
        lora_a, lora_b: (d_in, rank) and (rank, d_out).
        scaling: Float, s.

    Returns:
        (d_out,) float32, without gradient.

    Example:

    >>> kernel, a, b = jnp.ones((4, 2)), jnp.zeros((4, 1)), jnp.zeros((1, 2))
    >>> column_norms(kernel, column_squares(kernel), a, b, 1.0).tolist()
    [2.0, 2.0]
    """
    # Accelerators round float32 factors unless told otherwise, and every output depends on these few numbers.
    exact = jax.lax.Precision.HIGHEST
    a, b = (jax.lax.stop_gradient(factor.astype(jnp.float32)) for factor in (lora_a, lora_b))
    projected = jnp.matmul(a.T, jax.lax.stop_gradient(kernel).astype(jnp.float32), precision=exact)  # (rank, d_out)
    gram = jnp.matmul(a.T, a, precision=exact)  # (rank, rank)
    cross = jnp.sum(projected * b, axis=0)  # (d_out,)
    own = jnp.sum(jnp.matmul(gram, b, precision=exact) * b, axis=0)
    return jnp.sqrt(jnp.maximum(squares + 2 * scaling * cross + scaling**2 * own, 0))  # rounding may end below 0


def column_scale(magnitude, norms) -> jax.Array:
    """`magnitude / norms`, (d_out,). A column of zeros has no direction: whatever it is scaled by, it stays zero."""
    return magnitude / jnp.where(norms > 0, norms, 1)


def output(straight, update, scale, rest=None):
    """What a layer gives: `rest + scale * (straight + update)`, in the dtype of `straight`.

    Args:
        straight: (…, d_out), the kernel's product, without bias.
        update: (…, d_out), LoRA's.
        scale: (d_out,) float32, or in d_out's own axes; the sum is scaled in float32.
        rest: (…, d_out) or what broadcasts to it: what is not scaled.
    """
    scaled = (scale * (straight + update)).astype(straight.dtype)
    return scaled if rest is None else rest + scaled


@dataclasses.dataclass(frozen=True)
class Undo:
    """What takes DoRA out of a merged kernel again.

    Invariants: `scale` is (d_out,) float32, as it was when merging. `columns` are the numbers of those that it makes
    next to nothing, `kept` (d_in, columns) is what they were.
    """

    scale: np.ndarray
    columns: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(cls, kernel, scale) -> Undo:
        """For a kernel (d_in, d_out) that is about to become `scale * (kernel + delta)`."""
        scale = np.asarray(scale)
        columns = np.flatnonzero(np.abs(scale) < SMALLEST_DIVISOR)
        return cls(scale, columns, np.asarray(kernel[:, columns]))

    def kernel(self, merged, delta) -> jax.Array:
        """The plain kernel from the merged one and `scaling * A @ B`: (d_in, d_out) float32."""
        divisor = np.where(np.abs(self.scale) < SMALLEST_DIVISOR, 1, self.scale)
        return (merged.astype(jnp.float32) / divisor - delta).at[:, self.columns].set(self.kept)
