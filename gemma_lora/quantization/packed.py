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
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.quantization import integers, nf4
from gemma_lora.quantization.gguf_blocks import GGUF_KINDS as GGUF_KINDS
from gemma_lora.quantization.gguf_blocks import GGUFBlocks as GGUFBlocks
from gemma_lora.quantization.rows import Bfloat16Rows as Bfloat16Rows
from gemma_lora.quantization.rows import Int8Rows as Int8Rows

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
        tensor = integers.quantize(matrix, bits=8, axis=0)
        return {"codes": tensor.qvalue, "scales": tensor.scale}

    def decode(self, parts: Parts) -> jax.Array:
        return parts["codes"].astype(jnp.float32) * parts["scales"]


@dataclasses.dataclass(frozen=True)
class Int4:
    """Symmetric codes −7 … 7, two to a byte, one float32 scale per block: 4.5 bits per number with blocks of 64."""

    shape: tuple[int, int]
    block_size: int = 64
    #: Both codes of a packed byte, the high nibble's first; a nibble is a code in two's complement.
    PAIRS: ClassVar[np.ndarray] = np.stack(
        [np.repeat(np.r_[0:8, -8:0], 16), np.tile(np.r_[0:8, -8:0], 16)], axis=1
    ).astype(np.float32)

    def encode(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        tensor = integers.quantize(matrix.reshape(1, -1), bits=4, block_size=self.block_size)
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


# --- schemes --------------------------------------------------------------------------------------------------

#: What a user names -> the encoding of a `(d_out, d_in)` matrix, from shape, double_quant and block_size.
SCHEMES: dict[str, Callable[[tuple[int, int], bool, int], Encoding]] = {
    "nf4": lambda shape, double_quant, block_size: NF4(shape, block_size, double_quant),
    "int8": lambda shape, double_quant, block_size: Int8(shape),
    "int4": lambda shape, double_quant, block_size: Int4(shape, block_size),
}


def encoding_for(scheme: str, shape: tuple[int, int], double_quant: bool = False, block_size: int = 64) -> Encoding:
    """The encoding that a scheme's name stands for.

    Args:
        scheme: One of `SCHEMES`: `"nf4"`, `"int8"` or `"int4"`.
        shape: `(d_out, d_in)`.
        double_quant: Boolean; NF4's scales in 8 bits too.
        block_size: Integer, numbers that share a scale in NF4 and int4.

    Raises:
        ValueError: If the scheme is unknown, or has no double quantization.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {', '.join(SCHEMES)}. Received: {scheme!r}")
    if double_quant and scheme != "nf4":
        raise ValueError(f"`double_quant` goes with 'nf4' only. Received: scheme={scheme!r}")
    return SCHEMES[scheme](shape, double_quant, block_size)
