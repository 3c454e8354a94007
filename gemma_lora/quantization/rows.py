"""Tables of which a few rows are used at a time: an embedding, and the head that is tied to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.quantization import integers


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """A table `(V, D)` in 8 bits of which a few rows are used at a time: `codes (V, D)` int8, `scales (V, G)` float.

    Each row has G groups of D / G numbers, each with a scale of its own: 1 for an embedding that we quantize, D / 32
    for GGUF's Q8_0.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @classmethod
    def of(cls, table: np.ndarray, rows_at_once: int = 8192) -> Int8Rows:
        """Quantizes a table, some rows at a time: `scale = max |row| / 127`."""
        codes, scales = np.empty(table.shape, np.int8), np.empty((len(table), 1), np.float32)
        for start in range(0, len(table), rows_at_once):
            here = slice(start, start + rows_at_once)
            tensor = integers.quantize(np.asarray(table[here], np.float32), bits=8, axis=0)
            codes[here], scales[here] = tensor.qvalue, tensor.scale
        return cls(codes, scales)

    def slice(self, start, size: int) -> Int8Rows:
        """Rows start … start + size, which may be traced."""
        return jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, size, axis=0), self)

    def take(self, ids) -> Int8Rows:
        """The rows of these numbers, (…) -> (…, D)."""
        return jax.tree.map(lambda part: jnp.take(jnp.asarray(part), ids, axis=0), self)

    def decode(self, dtype: Any = jnp.float32) -> jax.Array:
        """The rows as numbers, (…, D)."""
        groups = self.scales.shape[-1]
        split = self.codes.reshape(*self.codes.shape[:-1], groups, -1).astype(jnp.float32)
        rows = split * self.scales[..., None].astype(jnp.float32)
        return rows.reshape(self.codes.shape).astype(dtype)

    def product(self, hidden: jax.Array, rows_at_once: int = 4096) -> jax.Array:
        """`table @ hidden.T`, (V, N) for hidden (N, D), without the whole table in floats."""
        size = min(rows_at_once, self.shape[0])
        blocks = -(-self.shape[0] // size)

        def one_block(index, result):
            start = jnp.minimum(index * size, self.shape[0] - size)  # the last block may reach back
            part = self.slice(start, size).decode(hidden.dtype) @ hidden.T
            return jax.lax.dynamic_update_slice_in_dim(result, part, start, axis=0)

        return jax.lax.fori_loop(0, blocks, one_block, jnp.zeros((self.shape[0], len(hidden)), hidden.dtype))

    def tree_flatten(self):
        return (self.codes, self.scales), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Bfloat16Rows:
    """A table `(V, D)` in bfloat16 of which a few rows are used at a time, held as integers: `bits (V, D)` uint16.

    As bfloat16, XLA on the CPU (jax 0.10.2) would widen the whole table to float32 before it takes rows out of it.
    """

    bits: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    @classmethod
    def of(cls, table: Any) -> Bfloat16Rows:
        """Rounds an array of floats. Inside a jitted function XLA copies it for that."""
        return cls(jax.lax.bitcast_convert_type(jnp.asarray(table, jnp.bfloat16), jnp.uint16))

    def slice(self, start, size: int) -> Bfloat16Rows:
        """Rows start … start + size, which may be traced."""
        return Bfloat16Rows(jax.lax.dynamic_slice_in_dim(self.bits, start, size, axis=0))

    def take(self, ids) -> Bfloat16Rows:
        """The rows of these numbers, (…) -> (…, D)."""
        return Bfloat16Rows(jnp.asarray(self.bits)[ids])

    def decode(self, dtype: Any = jnp.float32) -> jax.Array:
        """The rows as numbers, (…, D)."""
        return jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16).astype(dtype)

    def tree_flatten(self):
        return (self.bits,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
