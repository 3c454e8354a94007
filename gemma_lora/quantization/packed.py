"""Frozen matrices in few bits: decoded when a product needs them, in the forward and in the backward pass, never kept.

An encoding knows how a matrix is packed into arrays and decoded from them; `packed_product` multiplies by it. Matrices
are `(d_out, d_in)` here, rows of inputs one after the other, as bitsandbytes, GGUF and torch store them: a block of
numbers that share a scale lies along d_in.

Reference: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equations 5 and 6: the stored type is decoded to the
computing type, and gradients pass through the decoded matrix to what is trained, not into the codes.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.quantization import integers as quantization
from gemma_lora.quantization import nf4

Parts = dict[str, Any]


class Encoding(Protocol):
    """How a matrix `(d_out, d_in)` is packed; hashable, so that compiled programs may depend on it."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        ...

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Packs a `(d_out, d_in)` matrix into named arrays."""
        ...

    def decode(self, parts: Parts) -> jax.Array:
        """The `(d_out, d_in)` float32 matrix that the arrays stand for."""
        ...


@dataclasses.dataclass(frozen=True)
class NF4:
    """`nf4.py`'s four bits, bit for bit bitsandbytes'; with `double_quant` 4.127 bits a number, else 4.5."""

    shape: tuple[int, int]
    block_size: int = nf4.BLOCK_SIZE
    double_quant: bool = False

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        tensor = nf4.quantize(matrix, self.block_size, self.double_quant)
        if tensor.scale_scales is None:
            return {"codes": tensor.packed, "scales": tensor.scales}
        return {
            "codes": tensor.packed,
            "scale_codes": tensor.scales,
            "scale_scales": tensor.scale_scales,
            "offset": np.array([tensor.offset], np.float32),
        }

    def decode(self, parts: Parts) -> jax.Array:
        if not self.double_quant:
            return _pairs(nf4.PAIRS, parts["codes"], parts["scales"], self.block_size, self.shape)
        codes = parts["scale_codes"]
        levels = jnp.take(jnp.asarray(nf4.DYNAMIC_CODE), codes, mode="clip")
        of_scale = jnp.repeat(parts["scale_scales"], nf4.SCALES_A_BLOCK)[: codes.size]
        scales = levels * of_scale + parts["offset"]
        return _pairs(nf4.PAIRS, parts["codes"], scales, self.block_size, self.shape)


@dataclasses.dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit codes with one float32 scale for each output: 8 + 32 / d_in bits a number."""

    shape: tuple[int, int]

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        tensor = quantization.quantize(matrix, bits=8, axis=0)
        return {"codes": tensor.qvalue, "scales": tensor.scale}

    def decode(self, parts: Parts) -> jax.Array:
        return parts["codes"].astype(jnp.float32) * parts["scales"]


@dataclasses.dataclass(frozen=True)
class Int4:
    """Symmetric codes −7 … 7, two to a byte, one float32 scale a block: 4.5 bits a number with blocks of 64."""

    shape: tuple[int, int]
    block_size: int = 64
    #: Both codes of a packed byte, the high nibble's first; a nibble is a code in two's complement.
    PAIRS: ClassVar[np.ndarray] = np.stack(
        [np.repeat(np.r_[0:8, -8:0], 16), np.tile(np.r_[0:8, -8:0], 16)], axis=1
    ).astype(np.float32)

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        tensor = quantization.quantize(matrix.reshape(1, -1), bits=4, block_size=self.block_size)
        codes = tensor.qvalue.ravel().astype(np.uint8) & 15
        codes = np.pad(codes, (0, codes.size % 2))
        return {"codes": codes[0::2] << 4 | codes[1::2], "scales": tensor.scale.ravel()}

    def decode(self, parts: Parts) -> jax.Array:
        return _pairs(self.PAIRS, parts["codes"], parts["scales"], self.block_size, self.shape)


def _pairs(table: np.ndarray, packed, scales, block_size: int, shape: tuple[int, int]) -> jax.Array:
    """Two levels a byte by one look-up, times their block's scale."""
    count = math.prod(shape)
    levels = jnp.take(jnp.asarray(table), packed, axis=0, mode="clip").reshape(-1)  # (bytes, 2) -> (n,)
    levels = levels[:count]
    if short := -count % block_size:
        levels = jnp.pad(levels, (0, short))
    return (levels.reshape(-1, block_size) * scales[:, None]).reshape(-1)[:count].reshape(shape)


# --- GGUF's blocks --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GGUFBlocks:
    """A matrix as a GGUF file holds it: rows of blocks of bytes, of one of ggml's types.

    `kind` is Q8_0 (8.5 bits a number), Q6_K (6.56), Q5_0 (5.5) or Q4_K (4.5).

    Reference: ggml's `block_*` structures and `dequantize_row_*`; the `gguf` library's decoder is what tests compare
    with.
    """

    shape: tuple[int, int]
    kind: str

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Refuses: these blocks come from a file. (The `gguf` library encodes Q8_0 and Q5_0, not the K types.)"""
        raise ValueError(f"{self.kind} blocks are read from a GGUF file; a matrix cannot be packed into them here.")

    def decode(self, parts: Parts) -> jax.Array:
        blocks = parts["blocks"]  # (d_out, bytes of a row) uint8
        _, size, decode = _GGUF[self.kind]
        return decode(blocks.reshape(-1, size)).reshape(self.shape)


def _half(bytes_):
    """Pairs of bytes as float16 numbers, in float32: (..., 2) -> (...)."""
    return jax.lax.bitcast_convert_type(bytes_, jnp.float16).astype(jnp.float32)


def _signed(bytes_):
    return jax.lax.bitcast_convert_type(bytes_, jnp.int8).astype(jnp.float32)


def _q8_0(blocks):
    """32 numbers: a float16 scale and 32 signed bytes."""
    return _half(blocks[:, :2])[:, None] * _signed(blocks[:, 2:])


def _q5_0(blocks):
    """32 numbers: a float16 scale, 32 fifth bits, and 16 bytes whose low nibbles come first; codes less 16."""
    fifth = (blocks[:, 2:6, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1  # (n, 4, 8): bit j of byte i is number 8i + j
    low = jnp.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1)
    codes = (low | fifth.reshape(-1, 32) << 4).astype(jnp.float32) - 16
    return _half(blocks[:, :2])[:, None] * codes


def _q4_k(blocks):
    """256 numbers in 8 groups: `scale · 6-bit factor · code − minimum scale · 6-bit factor`."""
    scale, least = _half(blocks[:, 0:2])[:, None], _half(blocks[:, 2:4])[:, None]
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    factors = jnp.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1).astype(jnp.float32)
    least_factors = jnp.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1).astype(jnp.float32)
    bytes_ = blocks[:, 16:].reshape(-1, 4, 1, 32)  # each 32 bytes hold two groups: low nibbles, then high ones
    codes = jnp.concatenate([bytes_ & 15, bytes_ >> 4], axis=2).reshape(-1, 8, 32).astype(jnp.float32)
    return (scale * factors)[:, :, None] * codes - (least * least_factors)[:, :, None]


def _q6_k(blocks):
    """256 numbers in 16 groups: a float16 scale, a signed byte a group, codes of 4 + 2 bits less 32."""
    low, high, factors = blocks[:, :128], blocks[:, 128:192], _signed(blocks[:, 192:208])
    low = low.reshape(-1, 2, 1, 64)
    low = jnp.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
    high = (high.reshape(-1, 2, 1, 32) >> shifts) & 3  # (n, 2, 4, 32)
    codes = ((low | high << 4).astype(jnp.float32) - 32).reshape(-1, 16, 16)
    return (_half(blocks[:, 208:210])[:, None] * factors)[:, :, None] * codes


#: Numbers in a block, bytes of a block, and how (blocks, bytes) become (blocks, …) numbers.
_GGUF = {"Q8_0": (32, 34, _q8_0), "Q5_0": (32, 22, _q5_0), "Q4_K": (256, 144, _q4_k), "Q6_K": (256, 210, _q6_k)}
GGUF_KINDS = tuple(_GGUF)


# --- the product ----------------------------------------------------------------------------------------------


def _dot(x, matrix, axes, mixed: bool) -> jax.Array:
    factor = jnp.bfloat16 if mixed else x.dtype
    product = jax.lax.dot_general(
        x.astype(factor), matrix.astype(factor), (axes, ((), ())), preferred_element_type=jnp.float32
    )
    return product.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def packed_product(x: jax.Array, parts: Parts, encoding: Encoding, mixed_precision: bool = False) -> jax.Array:
    """`x @ matrix.T` for a packed matrix that is not trained.

    The backward pass keeps the packed arrays and nothing decoded. It decodes again; a term of zero, which depends on
    the incoming gradient, keeps XLA from finding the two decodings equal and holding on to the first.

    Args:
        x: (T, d_in) floats.
        parts: What `encoding.encode` gave. They get no gradient.
        encoding: An `Encoding` of a `(d_out, d_in)` matrix.
        mixed_precision: If True, both factors are rounded to bfloat16; sums are float32 in any case.

    Returns:
        (T, d_out) in x's dtype.

    Example:

    >>> encoding = Int8((3, 4))
    >>> packed_product(jnp.ones((2, 4)), encoding.encode(np.ones((3, 4))), encoding).shape
    (2, 3)
    """
    return _dot(x, encoding.decode(parts), ((1,), (1,)), mixed_precision)


def _forward(x, parts, encoding, mixed_precision):
    return packed_product(x, parts, encoding, mixed_precision), parts


def _backward(encoding, mixed_precision, parts, gradient):
    zero = 0 * gradient[0, 0].astype(jnp.float32)  # no constant to XLA: 0 · infinity is not 0
    again = jax.tree.map(lambda part: part + zero.astype(part.dtype), parts)
    return _dot(gradient, encoding.decode(again), ((1,), (0,)), mixed_precision), None


packed_product.defvjp(_forward, _backward)


# --- rows of a table ------------------------------------------------------------------------------------------


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
            tensor = quantization.quantize(np.asarray(table[here], np.float32), bits=8, axis=0)
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
