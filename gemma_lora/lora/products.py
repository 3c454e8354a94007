"""What a layer with LoRA or DoRA multiplies by: a base matrix with an update beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma_lora.layers.mixed_precision import low_rank_product
from gemma_lora.layers.products import Kernel, Matrix, pytree, static
from gemma_lora.lora import dora

#: What dropout does to an update's inputs; its state is the layer's.
_Dropout = Callable[[jax.Array], jax.Array]


@pytree
class WithLoRA(Matrix):
    """`base + scaling * lora_a @ lora_b`, the two thin factors multiplied one after the other.

    Invariants: `lora_a` is (d_in, rank), `lora_b` (rank, d_out), both float32; `scaling` is a scalar, 0 while the
    update is merged into the base.

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3.
    """

    base: Matrix
    lora_a: Any
    lora_b: Any
    scaling: Any
    rounded: bool = static(default=False)
    dropout: _Dropout | None = static(default=None)

    def dense(self) -> jax.Array:
        kernel = self.base.dense()
        return (kernel.astype(jnp.float32) + self.scaling * (self.lora_a @ self.lora_b)).astype(kernel.dtype)

    def update(self, x: jax.Array) -> jax.Array:
        """The update's product with x, (tokens, d_out)."""
        lora_a = self.lora_a.astype(x.dtype)
        lora_b = (self.lora_b * self.scaling).astype(x.dtype)
        if self.rounded and x.dtype == jnp.float32:
            return low_rank_product(x, lora_a, lora_b)
        return (x @ lora_a) @ lora_b

    def dropped_update(self, x: jax.Array) -> jax.Array:
        """The update's product with what dropout leaves of x."""
        return self.update(x if self.dropout is None else self.dropout(x))

    def multiply(self, x):
        return self.base.multiply(x) + self.dropped_update(x)

    def settled(self, rounded: bool = False) -> Matrix:
        """One product for a token instead of three; packed weights stay packed, since nothing can be added to them."""
        return Kernel(self.dense()).settled(rounded) if isinstance(self.base, Kernel) else self


@pytree
class WithDoRA(Matrix):
    """`scale * (base + scaling * lora_a @ lora_b)`, where `scale = magnitude / norm` for each output.

    Invariants: those of `WithLoRA`; `exact` is the base in floats or packed, from which the norms are computed;
    `magnitude` and `kernel_squares` are (d_out,) float32. While merged, `merged` is True and nothing is scaled.
    `scale` (d_out,) holds the factors where they have been computed already.

    Reference: Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5.
    """

    lora: WithLoRA
    exact: Matrix
    magnitude: Any
    kernel_squares: Any
    merged: Any
    scale: Any = None

    def column_scale(self) -> jax.Array:
        """The factor of each output, (d_out,) float32."""
        if self.scale is not None:
            return self.scale
        factors = (self.lora.lora_a, self.lora.lora_b)
        norms = dora.column_norms(self.exact.dense(), self.kernel_squares, *factors, self.lora.scaling)
        return jnp.where(self.merged, 1.0, dora.column_scale(self.magnitude, norms))

    def dense(self) -> jax.Array:
        kernel = self.exact.dense()
        update = self.lora.scaling * (self.lora.lora_a @ self.lora.lora_b)
        return (self.column_scale() * (kernel.astype(jnp.float32) + update)).astype(kernel.dtype)

    def multiply(self, x):
        # Where dropout gives the update other inputs, DoRA's change to the kernel's product takes them too, as PEFT
        # has it: y + (scale - 1) * (dropped @ kernel) + scale * update.
        lora, straight = self.lora, self.lora.base.multiply(x)
        if lora.dropout is None:
            return dora.output(straight, lora.update(x), self.column_scale())
        dropped = lora.dropout(x)
        again = lora.base.multiply(dropped)
        return dora.output(again, lora.update(dropped), self.column_scale(), straight - again)

    def settled(self, rounded: bool = False) -> Matrix:
        if isinstance(self.exact, Kernel):
            return Kernel(self.dense()).settled(rounded)
        return WithDoRA(
            self.lora, self.exact, self.magnitude, self.kernel_squares, self.merged, scale=self.column_scale()
        )
