"""Ternary weights and 8-bit activations as plain numpy arrays, and ternary codes packed into bytes.

    W ≈ qvalue · γ,  qvalue in {−1, 0, 1},  γ = mean |W|          one γ a matrix
    x ≈ qvalue · s,  qvalue in −127 … 127,  s = max |x| / 127     one s a token

Reference: Ma et al. 2024, "The Era of 1-bit LLMs", https://arxiv.org/abs/2402.17764, section 2. What it leaves open
follows the authors' "Training Tips, Code and FAQ" (microsoft/unilm): 1e-5 is the least that is divided by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gemma_lora.quantization.integers import QuantizedTensor

TRITS_A_BYTE = 5  # 3⁵ = 243 ≤ 256 < 3⁶
_LEAST = 1e-5  # of γ and of max |x|: a matrix or a token of zeros must not be divided by zero


# --- codes and scales --------------------------------------------------------------------------------------


def ternary_codes(kernel, xp=np):
    """The codes −1, 0, 1 of a matrix and its γ (1, 1), both floats; `xp` is numpy or jax.numpy."""
    scale = xp.maximum(xp.mean(xp.abs(kernel), keepdims=True), xp.float32(_LEAST))
    return xp.clip(xp.rint(kernel / scale), -1, 1), scale


def activation_codes(x, xp=np):
    """The codes −127 … 127 of activations and each token's s (..., 1), both floats; `xp` is numpy or jax.numpy."""
    scale = xp.maximum(xp.max(xp.abs(x), axis=-1, keepdims=True), xp.float32(_LEAST)) / 127
    return xp.rint(x / scale), scale


def ternary_quantize(kernel: Any) -> QuantizedTensor:
    """Quantizes a matrix to −1, 0 and 1 with the mean of its absolute values as scale (absmean).

    γ = mean |W|,  qvalue = clip(round(W / γ), −1, 1). A weight becomes 0 where |W| ≤ γ/2. Two bits could tell four
    codes apart; the fourth is never used, and `pack_ternary` makes use of that.

    Args:
        kernel: (d_in, d_out) finite floats.

    Returns:
        A `QuantizedTensor` of 2 bits: `qvalue` (d_in, d_out) int8, `scale` (1, 1) float32.

    Raises:
        ValueError: If `kernel` is not a matrix of finite numbers.

    Example:

    >>> tensor = ternary_quantize(np.array([[0.5, -1.5], [3.0, -1.0]]))  # γ = 1.5
    >>> tensor.qvalue.tolist(), tensor.scale.tolist()
    ([[0, -1], [1, -1]], [[1.5]])

    Reference: Ma et al. 2024, equations 1 to 3. They divide by γ + ε; here γ is at least 1e-5 and nothing is added.
    """
    values = _finite("kernel", kernel)
    if values.ndim != 2:
        raise ValueError(f"`kernel` must be a matrix (d_in, d_out). Received: shape={values.shape}")
    codes, scale = ternary_codes(values)
    return QuantizedTensor(codes.astype(np.int8), scale, None, bits=2)


def activation_quantize(x: Any) -> QuantizedTensor:
    """Quantizes activations to 8 bits, with a scale for each token (absmax).

    s = max |x| / 127 over a token's d_in numbers,  qvalue = round(x / s), in −127 … 127. Nothing is clipped.

    Args:
        x: (..., d_in) finite floats; each vector of the last axis is a token's.

    Returns:
        A `QuantizedTensor` of 8 bits: `qvalue` (..., d_in) int8, `scale` (..., 1) float32.

    Raises:
        ValueError: If `x` does not hold finite numbers, of rank 1 or more.

    Example:

    >>> tensor = activation_quantize(np.array([[1.0, -0.5], [254.0, 2.0]]))
    >>> tensor.qvalue.tolist(), tensor.scale[1].tolist()
    ([[127, -64], [127, 1]], [2.0])

    Reference: Wang et al. 2023, equations 4 and 5, with Q_b = 127 instead of 128, as in the FAQ's code.
    """
    codes, scale = activation_codes(_finite("x", x))
    return QuantizedTensor(codes.astype(np.int8), scale, None, bits=8)


# --- packing -----------------------------------------------------------------------------------------------


def pack_ternary(qvalue: Any) -> np.ndarray:
    """Packs codes −1, 0, 1 five to a byte: 1.6 bits a weight, where log2(3) = 1.585 would be the least.

    byte = Σ_k (code_k + 1) · 3^k,  k = 0 … 4, the first code in the lowest place. Codes of 0 fill the last byte.

    Args:
        qvalue: Integers in {−1, 0, 1}, of any shape; they are read in C order.

    Returns:
        (ceil(size / 5),) uint8, each at most 242.

    Raises:
        ValueError: If there is a number other than −1, 0 and 1.

    Example:

    >>> pack_ternary([1, 0, -1, -1, -1]).tolist()  # 2·1 + 1·3
    [5]

    Reference: 3⁵ = 243 codes in a byte is also the idea of llama.cpp's TQ1_0, whose order of digits is another.
    """
    return _packed(qvalue, 3, TRITS_A_BYTE)


def unpack_ternary(packed: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Gives back what `pack_ternary` packed.

    Args:
        packed: (ceil(size / 5),) uint8.
        shape: The codes' shape, `size` numbers.

    Returns:
        int8 of that shape, in {−1, 0, 1}.

    Raises:
        ValueError: If there are not so many bytes, or a byte is above 242.

    Example:

    >>> unpack_ternary(np.array([5], np.uint8), (5,)).tolist()
    [1, 0, -1, -1, -1]
    """
    return _unpacked(packed, shape, 3, TRITS_A_BYTE)


def pack_two_bits(qvalue: Any) -> np.ndarray:
    """Packs codes −1, 0, 1 four to a byte, two bits each: larger than `pack_ternary`, and unpacked by shifts alone.

    byte = Σ_k (code_k + 1) · 4^k,  k = 0 … 3. Args, Raises and padding as in `pack_ternary`.

    Returns:
        (ceil(size / 4),) uint8.

    Example:

    >>> pack_two_bits([1, 0, -1, -1]).tolist()  # binary 00 00 01 10, read from the right
    [6]

    Reference: bitnet.cpp (Wang et al. 2025, https://arxiv.org/abs/2502.11880) has both kinds; its orders are others.
    """
    return _packed(qvalue, 4, 4)


def unpack_two_bits(packed: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Gives back what `pack_two_bits` packed. Arguments, result and errors as in `unpack_ternary`, four codes a byte.

    Example:

    >>> unpack_two_bits(np.array([6], np.uint8), (2, 2)).tolist()
    [[1, 0], [-1, -1]]
    """
    return _unpacked(packed, shape, 4, 4)


def digits_of(packed, base: int, count: int, xp=np):
    """(n,) uint8 -> (n, count) digits to a base, the lowest place first; `xp` is numpy or jax.numpy."""
    places = xp.asarray([base**k for k in range(count)], "uint8")
    return packed[:, None] // places % xp.uint8(base)


def _packed(qvalue: Any, base: int, count: int) -> np.ndarray:
    codes = np.asarray(qvalue)
    if not np.isin(codes, (-1, 0, 1)).all():
        raise ValueError(f"`qvalue` must hold −1, 0 and 1 only. Received: {codes[~np.isin(codes, (-1, 0, 1))][0]!r}")
    flat = codes.astype(np.int64).ravel()
    digits = np.pad(flat, (0, -flat.size % count)).reshape(-1, count) + 1  # (bytes, count)
    return (digits @ base ** np.arange(count)).astype(np.uint8)


def _unpacked(packed: Any, shape: tuple[int, ...], base: int, count: int) -> np.ndarray:
    values, size = np.asarray(packed, np.uint8), math.prod(shape)
    if values.shape != (math.ceil(size / count),):
        wanted = f"{math.ceil(size / count)} bytes for codes of shape {shape}"
        raise ValueError(f"`packed` must be {wanted}. Received: shape={values.shape}")
    digits = digits_of(values, base, count)
    if values.size and (values.max() >= base**count or digits.max() > 2):
        raise ValueError(f"`packed` must hold bytes of packed ternary codes. Received: a byte of {values.max()}")
    return (digits.ravel()[:size].astype(np.int8) - 1).reshape(shape)


def _finite(name: str, value: Any) -> np.ndarray:
    values = np.asarray(value, np.float32)
    if not values.size or not values.ndim or not np.isfinite(values).all():
        what = f"shape={values.shape}, {int((~np.isfinite(values)).sum())} not finite"
        raise ValueError(f"`{name}` must hold finite numbers, of rank 1 or more. Received: {what}")
    return values
