"""Quantization: numbers kept as small integers, with a scale that says what one step is worth.

    x ≈ (qvalue − zero_point) · scale

Symmetric quantization has signed codes and no zero point. Affine (asymmetric) quantization has unsigned codes and an
integer zero point, the code of 0.0. Scales are kept for a whole tensor, for each channel of an axis, or for each block
of consecutive numbers on the last axis. Rounding is to the nearest code, ties to the even one.

Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 2.1 (affine) and section 3.1 (fake
quantization); Nagel et al. 2021, https://arxiv.org/abs/2106.08295, sections 2.2 and 3.1. Keras differs in two words:
`abs_max_quantize` gives a scale that codes are divided by (1/ours), and its `axis` is what the maximum is taken over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.quantization.calibration import affine_parameters, calibrate, code_range, symmetric_scale

__all__ = ["QuantizedTensor", "calibrate", "dequantize", "fake_quantize", "quantize"]


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in few bits: `x ≈ (qvalue − zero_point) · scale`.

    Invariants: `qvalue` has x's shape, one code of `bits` bits (2 to 8) a byte. `scale` is float32, > 0 and has x's
    rank; its size is 1 on every axis that shares a scale, and ceil(n / block_size) on the last axis of n numbers where
    there are blocks. `zero_point` has the scale's shape and lies among the codes; it is None when symmetric. At most
    one of `axis` and `block_size` is set. Codes are int8 in ±(2^(bits−1) − 1) when symmetric, else uint8 in
    0 … 2^bits − 1.
    """

    qvalue: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    axis: int | None = None
    block_size: int | None = None

    @property
    def signed(self) -> bool:
        """Whether codes are signed, which is whether the quantization is symmetric."""
        return self.zero_point is None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensor: codes of `bits` bits, 4 bytes a scale, 1 byte a zero point."""
        zero_points = 0 if self.zero_point is None else self.zero_point.size
        return math.ceil(self.qvalue.size * self.bits / 8) + 4 * self.scale.size + zero_points


# --- groups and codes --------------------------------------------------------------------------------------


def _codes(x, scale, zero_point, bounds: tuple[int, int], xp):
    """The nearest codes, before and after they are held within the bounds; floats of x's shape."""
    free = xp.rint(x / scale) + zero_point
    return free, xp.clip(free, *bounds)


def _group_range(x, axis: int | None, block_size: int | None, xp):
    """Smallest and largest number of each group, in the scale's shape."""
    if block_size is not None:
        short = -x.shape[-1] % block_size
        # Zeros fill the last block: every range holds 0 in any case.
        padded = xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
        blocks = padded.reshape(*x.shape[:-1], -1, block_size)  # (..., blocks, block_size)
        return blocks.min(-1), blocks.max(-1)
    over = tuple(i for i in range(x.ndim) if axis is None or i != axis % x.ndim)
    return x.min(axis=over, keepdims=True), x.max(axis=over, keepdims=True)


def _spread(values, shape: tuple[int, ...], block_size: int | None, xp):
    """A value a block -> a value a number; what has one value a tensor or a channel broadcasts as it is."""
    return values if block_size is None else xp.repeat(values, block_size, axis=-1)[..., : shape[-1]]


def _parameters(x, bits: int, symmetric: bool, axis: int | None, block_size: int | None, value_range, xp):
    """`(scale, zero_point)` of each group; the zero point is None when symmetric."""
    low, high = _group_range(x, axis, block_size, xp)
    if value_range is not None:
        low, high = (xp.broadcast_to(xp.asarray(end, "float32"), low.shape) for end in value_range)
    return (symmetric_scale(low, high, bits, xp), None) if symmetric else affine_parameters(low, high, bits, xp)


# --- tensors -----------------------------------------------------------------------------------------------


def quantize(
    x,
    bits: int = 8,
    symmetric: bool = True,
    axis: int | None = None,
    block_size: int | None = None,
    value_range: tuple[Any, Any] | None = None,
) -> QuantizedTensor:
    """Quantizes an array: `qvalue = clip(round(x / scale) + zero_point, qmin, qmax)`.

    Where x lies in the range, `|x − dequantize(quantize(x))| ≤ scale / 2`.

    Args:
        x: Array of finite floats, of rank 1 or more.
        bits: Integer, 2 to 8, of a code.
        symmetric: Boolean: signed codes and no zero point, or unsigned codes and a zero point.
        axis: Integer: each index of this axis has a scale of its own (per channel). None: one for all (per tensor).
        block_size: Integer: each so many consecutive numbers of the last axis have a scale of their own (per block);
            the last block may be shorter.
        value_range: `(low, high)` from `calibrate`, floats or arrays that broadcast to the scale's shape; what lies
            outside is clipped. None: the smallest and largest number of each group.

    Returns:
        A `QuantizedTensor`.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> quantize(np.array([-20.0, 0.0, 1000.0]), symmetric=False).qvalue
    array([  0,   5, 255], dtype=uint8)
    """
    x = _checked(x, bits, axis, block_size, value_range)
    scale, zero_point = _parameters(x, bits, symmetric, axis, block_size, value_range, np)
    offset = np.zeros_like(scale) if zero_point is None else zero_point
    wide, offset = (_spread(part, x.shape, block_size, np) for part in (scale, offset))
    _, codes = _codes(x, wide, offset, code_range(bits, symmetric), np)
    if zero_point is None:
        return QuantizedTensor(codes.astype(np.int8), scale, None, bits, axis, block_size)
    return QuantizedTensor(codes.astype(np.uint8), scale, zero_point.astype(np.uint8), bits, axis, block_size)


def dequantize(tensor: QuantizedTensor) -> np.ndarray:
    """Gives back `(qvalue − zero_point) · scale`.

    Args:
        tensor: A `QuantizedTensor`.

    Returns:
        A float32 array of the shape of `tensor.qvalue`.

    Example:

    >>> dequantize(quantize(np.array([-20.0, 0.0, 1000.0]), symmetric=False))
    array([ -20.,    0., 1000.], dtype=float32)
    """
    codes = tensor.qvalue.astype(np.float32)
    if tensor.zero_point is not None:
        codes -= _spread(tensor.zero_point, codes.shape, tensor.block_size, np).astype(np.float32)
    return codes * _spread(tensor.scale, codes.shape, tensor.block_size, np)


def fake_quantize(
    x,
    bits: int = 8,
    symmetric: bool = True,
    axis: int | None = None,
    block_size: int | None = None,
    value_range: tuple[Any, Any] | None = None,
):
    """`dequantize(quantize(x))` in JAX, with the straight-through estimator as its derivative.

    A staircase has derivative 0 almost everywhere, and nothing would learn through it. The estimator takes 1 where
    the code is within the range and 0 where it is clipped. The range itself gets no gradient.

    Args:
        x: Array of floats, of rank 1 or more; it may be traced.
        bits, symmetric, axis, block_size, value_range: As in `quantize`.

    Returns:
        A JAX array of x's shape, float32.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> jax.grad(lambda x: fake_quantize(x, value_range=(-1.0, 1.0)).sum())(jnp.array([-3.0, 0.2, 3.0]))
    Array([0., 1., 0.], dtype=float32)

    Reference: Bengio et al. 2013, https://arxiv.org/abs/1308.3432. Where a value lies less than half a step
    outside the range its gradient is 1, as in PyTorch; in Keras's `fake_quant_with_min_max_vars` it is 0.
    """
    x = _checked(x, bits, axis, block_size, value_range, jnp)
    scale, zero_point = _parameters(jax.lax.stop_gradient(x), bits, symmetric, axis, block_size, value_range, jnp)
    scale = _spread(scale, x.shape, block_size, jnp)
    offset = jnp.zeros_like(scale) if zero_point is None else _spread(zero_point, x.shape, block_size, jnp)
    return _straight_through(x, jax.lax.stop_gradient(scale), offset, code_range(bits, symmetric))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _straight_through(x, scale, zero_point, bounds):
    _, codes = _codes(x, scale, zero_point, bounds, jnp)
    return (codes - zero_point) * scale


def _forward(x, scale, zero_point, bounds):
    free, codes = _codes(x, scale, zero_point, bounds, jnp)
    return (codes - zero_point) * scale, (free == codes, scale, zero_point)


def _backward(bounds, saved, gradient):
    inside, scale, zero_point = saved
    return gradient * inside, jnp.zeros_like(scale), jnp.zeros_like(zero_point)


_straight_through.defvjp(_forward, _backward)


def _checked(x, bits: int, axis: int | None, block_size: int | None, value_range, xp=np):
    """`x` as float32, once the arguments are found to be as they should."""
    code_range(bits, True)
    x = xp.asarray(x)
    if x.size == 0 or x.ndim == 0:
        raise ValueError(f"`x` must have rank 1 or more and at least one number. Received: shape={x.shape}")
    if xp is np and not np.isfinite(x := x.astype(np.float32)).all():
        raise ValueError(f"`x` must be finite. Received: {int((~np.isfinite(x)).sum())} of {x.size} numbers are not")
    if axis is not None and block_size is not None:
        raise ValueError(f"Give `axis` or `block_size`, not both. Received: axis={axis}, block_size={block_size}")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"`axis` must be an axis of x, which has rank {x.ndim}. Received: axis={axis}")
    if block_size is not None and (not isinstance(block_size, int | np.integer) or block_size < 1):
        raise ValueError(f"`block_size` must be an integer of at least 1. Received: block_size={block_size!r}")
    if value_range is not None and (len(value_range) != 2 or (xp is np and not np.all(np.less_equal(*value_range)))):
        raise ValueError(f"`value_range` must be a pair (low, high), low ≤ high. Received: value_range={value_range!r}")
    return x.astype("float32")
