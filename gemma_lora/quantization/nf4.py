"""NF4: four bits a number, on sixteen levels that suit normally distributed weights, with double quantization.

    x ≈ CODEBOOK[code] · scale,        scale = the block's largest |x|
    scale ≈ DYNAMIC_CODE[scale_code] · scale_scale + offset        (double quantization)

A block is `block_size` consecutive numbers of the array in C order. The levels are quantiles of the standard normal
distribution, so that each code is used about equally often, and 0 is one of them. Double quantization keeps the
blocks' scales in 8 bits: their mean is taken off, and every 256 of them share one float32 scale.

Reference: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E. Bytes, codes and constants
are bitsandbytes' (`quantize_4bit(quant_type="nf4", compress_statistics=double_quant)`).
"""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist
from typing import Any

import numpy as np

__all__ = ["CODEBOOK", "DYNAMIC_CODE", "PAIRS", "NF4Tensor", "codebook", "dequantize", "dynamic_code", "quantize"]

#: Numbers that share a scale, and scales that share a scale's scale: the paper's.
BLOCK_SIZE, SCALES_A_BLOCK = 64, 256


def codebook() -> np.ndarray:
    """NF4's sixteen levels: quantiles of the standard normal distribution, scaled to end at −1 and 1.

    Seven levels are below zero and eight above it, at evenly spaced probabilities between 1/2 and
    1 − (1/32 + 1/30) / 2, which bitsandbytes writes as 0.9677083: the quantile at 1 itself is infinite. The extra level
    is 0.

    Returns:
        A float32 array of shape `(16,)`, ascending; to the last bit the numbers in the paper.

    Reference:
        The paper's section 3 has the idea, its appendix E the numbers. Probabilities and division are float32, as
        they were there.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in _probabilities(9)]
    negative = [-quantile(p) for p in _probabilities(8)]
    levels = np.sort([*negative, 0.0, *positive]).astype(np.float32)
    return levels / levels.max()


def _probabilities(count: int) -> list[float]:
    """All but the last of `count` evenly spaced float32 numbers from 0.9677083 to 1/2, counted from the nearer end."""
    outermost, middle = np.float32(0.9677083), np.float32(0.5)
    step = (middle - outermost) / np.float32(count - 1)
    half = count // 2
    upper = [outermost + step * np.float32(i) for i in range(half)]
    lower = [middle - step * np.float32(count - 1 - i) for i in range(half, count - 1)]
    return [float(p) for p in upper + lower]


def dynamic_code() -> np.ndarray:
    """The 256 levels of the dynamic 8-bit type that double quantization keeps scales in.

    A level has a sign, a decimal exponent from −6 to 0 and a fraction between 0.1 and 1; the larger the exponent, the
    more fractions: 2^i of them at exponent i − 6, the centres of equal intervals. With 0 and 1 that makes 256.

    Returns:
        A float32 array of shape `(256,)`, ascending; bitsandbytes' to float32's last bit, which is torch's rounding.

    Reference:
        Dettmers et al. 2021, https://arxiv.org/abs/2110.02861 (dynamic quantization), in bitsandbytes' form.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        levels += [*centres, *-centres]
    return np.sort(levels).astype(np.float32)


CODEBOOK = codebook()
DYNAMIC_CODE = dynamic_code()
#: Both numbers of a packed byte at once, the high nibble's first: `(256, 2)`, so that decoding is one look-up a byte.
PAIRS = np.stack([np.repeat(CODEBOOK, 16), np.tile(CODEBOOK, 16)], axis=1)


@dataclasses.dataclass(frozen=True)
class NF4Tensor:
    """An array in NF4.

    Invariants: `packed` is uint8, two codes a byte, the first in the high nibble, `ceil(n / 2)` of them for n numbers.
    `scales` is float32, one a block; or, after double quantization, uint8 codes, with `scale_scales` (float32, one for
    every 256 of them) and `offset` (the scales' mean). `shape` is the array's; the last block may be shorter.
    """

    packed: np.ndarray
    scales: np.ndarray
    shape: tuple[int, ...]
    block_size: int = BLOCK_SIZE
    scale_scales: np.ndarray | None = None
    offset: float = 0.0

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.scale_scales is not None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that decoding needs: codes, scales, their scales and the offset."""
        second = 0 if self.scale_scales is None else self.scale_scales.nbytes + 4
        return self.packed.nbytes + self.scales.nbytes + second

    @property
    def bits(self) -> float:
        """Bits a number, constants included: 4.5 with float32 scales, 4.127 with double quantization (64, 256)."""
        return 8 * self.nbytes / math.prod(self.shape)


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of each number's nearest level, the lower one in a tie.

    Args:
        x: Array of floats.
        levels: Ascending array of at most 256 floats.

    Returns:
        A uint8 array of x's shape.
    """
    between = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(between, x, side="left").astype(np.uint8)


def _blocks(flat: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in rows of `size`, zeros behind the last, and the largest |x| of each row: `(rows, size)`, `(rows,)`."""
    rows = np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    return rows, np.abs(rows).max(axis=1)


def _relative(rows: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Every row in units of its largest |x|; rows of zeros stay zeros."""
    return rows * np.divide(1, largest, out=np.zeros_like(largest), where=largest > 0)[:, None]


def quantize(x: Any, block_size: int = BLOCK_SIZE, double_quant: bool = False) -> NF4Tensor:
    """Quantizes an array to NF4: `code = argmin |x / scale − CODEBOOK|`, `scale = max |x|` of the block.

    The error is at most 0.152 · scale, half the widest gap between levels, and 0 for 0 and for a block's largest |x|.

    Args:
        x: Array of finite floats, of rank 1 or more and not empty. To quantize a kernel `(d_in, d_out)` in
            bitsandbytes' blocks, along d_in, give its transpose.
        block_size: Integer, consecutive numbers (in C order) that share a scale; even.
        double_quant: Boolean, whether scales are kept in 8 bits.

    Returns:
        An `NF4Tensor`.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> dequantize(quantize(np.array([0.0, 0.5, -2.0, 2.0]))).round(3)
    array([ 0.   ,  0.492, -2.   ,  2.   ], dtype=float32)
    """
    x = _checked(x, block_size)
    rows, scales = _blocks(x.ravel(), block_size)
    codes = nearest(_relative(rows, scales), CODEBOOK).ravel()[: x.size]
    codes = np.pad(codes, (0, codes.size % 2), constant_values=7)  # 7 is the code of 0
    packed = codes[0::2] << 4 | codes[1::2]
    if not double_quant:
        return NF4Tensor(packed, scales, x.shape, block_size)
    offset = scales.mean(dtype=np.float32)
    groups, scale_scales = _blocks(scales - offset, SCALES_A_BLOCK)
    # The padding behind the last scale is zero, so it changes no maximum.
    scale_codes = nearest(_relative(groups, scale_scales), DYNAMIC_CODE).ravel()[: scales.size]
    return NF4Tensor(packed, scale_codes, x.shape, block_size, scale_scales, float(offset))


def block_scales(tensor: NF4Tensor) -> np.ndarray:
    """The blocks' scales in float32, decoded where they are quantized too: `(blocks,)`."""
    if tensor.scale_scales is None:
        return tensor.scales
    of_scale = np.repeat(tensor.scale_scales, SCALES_A_BLOCK)[: tensor.scales.size]
    return DYNAMIC_CODE[tensor.scales] * of_scale + np.float32(tensor.offset)


def dequantize(tensor: NF4Tensor) -> np.ndarray:
    """Gives back `CODEBOOK[code] · scale`.

    Args:
        tensor: An `NF4Tensor`.

    Returns:
        A float32 array of shape `tensor.shape`.
    """
    size = math.prod(tensor.shape)
    levels = PAIRS[tensor.packed].ravel()[:size]
    return (levels * np.repeat(block_scales(tensor), tensor.block_size)[:size]).reshape(tensor.shape)


def _checked(x: Any, block_size: int) -> np.ndarray:
    x = np.asarray(x, dtype=np.float32)
    if x.ndim == 0 or not x.size:
        raise ValueError(f"`x` must be an array of rank 1 or more that is not empty. Received: x of shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("`x` must hold finite numbers. Received: infinity or NaN")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2 or block_size % 2:
        raise ValueError(f"`block_size` must be an even integer of 2 or more. Received: block_size={block_size!r}")
    return x
