"""Matrices as GGUF files hold them: rows of blocks of bytes, of ggml's types.

Reference: ggml's `block_*` structures and `dequantize_row_*`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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

    def decode(self, parts: dict[str, Any]) -> jax.Array:
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
