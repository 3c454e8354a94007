"""Calibration: which range of numbers the codes shall cover, and the scale and zero point that follow from it.

A wide range clips nothing and has long steps; a narrow one has short steps and clips the outliers. The methods differ
in what they call the best compromise:

    min-max      nothing is clipped
    percentile   a fixed share is clipped
    MSE          the mean of (x − x̂)² is smallest
    entropy      the histogram after quantization tells most of the one before (smallest KL divergence)

Reference: Nagel et al. 2021, https://arxiv.org/abs/2106.08295, section 3.1; Wu et al. 2020,
https://arxiv.org/abs/2004.09602, section 3.3; Migacz 2017, "8-bit inference with TensorRT", for entropy.
"""

from __future__ import annotations

import numpy as np

#: `mse_range` tries the widest range times 1/100, 2/100, … 1.
_CANDIDATES = 100
#: Bins of |x| in `entropy_range`, as in TensorRT.
_BINS = 2048


# --- from a range to scale and zero point ------------------------------------------------------------------


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code.

    `−(2^(bits−1) − 1) … 2^(bits−1) − 1` when symmetric, `0 … 2^bits − 1` when affine. The symmetric range leaves out
    −2^(bits−1), so that the code of −x is minus the code of x.

    Args:
        bits: Integer, 2 to 8.
        symmetric: Boolean.

    Returns:
        `(qmin, qmax)`, integers.

    Raises:
        ValueError: If `bits` is not an integer from 2 to 8.

    Example:

    >>> code_range(8, symmetric=True), code_range(4, symmetric=False)
    ((-127, 127), (0, 15))
    """
    if not isinstance(bits, int | np.integer) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"`bits` must be an integer from 2 to 8. Received: bits={bits!r}")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def symmetric_scale(low, high, bits: int, xp=np):
    """`scale = max(|low|, |high|) / (2^(bits−1) − 1)`, and 1 where the range is only zero.

    Args:
        low, high: The range: floats, or arrays of one shape.
        bits: Integer, 2 to 8.
        xp: `numpy` or `jax.numpy`.

    Returns:
        The scale, float32, of the range's shape.

    Example:

    >>> float(symmetric_scale(-254.0, 100.0, bits=8))
    2.0
    """
    scale = xp.asarray(xp.maximum(xp.abs(low), xp.abs(high)) / code_range(bits, True)[1], "float32")
    return xp.where(scale > 0, scale, xp.ones_like(scale))


def affine_parameters(low, high, bits: int, xp=np):
    """`scale = (high − low) / (2^bits − 1)` and `zero_point = round(−low / scale)`.

    The range is first widened to hold 0, so that 0.0 has a code of its own and comes back exactly.

    Args:
        low, high: The range: floats, or arrays of one shape.
        bits: Integer, 2 to 8.
        xp: `numpy` or `jax.numpy`.

    Returns:
        `(scale, zero_point)`, float32, of the range's shape; the zero point is a whole number.

    Example:

    >>> scale, zero_point = affine_parameters(-20.0, 1000.0, bits=8)
    >>> float(scale), int(zero_point)
    (4.0, 5)

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.1. Keras's
    `abs_max_quantize_grouped_with_zero_point` does not widen the range: a block of numbers from 5 to 6 comes back as 1.
    """
    low, high = xp.minimum(low, 0.0), xp.maximum(high, 0.0)
    top = code_range(bits, False)[1]
    scale = xp.asarray((high - low) / top, "float32")
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    return scale, xp.clip(xp.rint(xp.asarray(-low / scale, "float32")), 0, top)


# --- from data to a range ----------------------------------------------------------------------------------


def calibrate(x, method: str = "minmax", bits: int = 8, symmetric: bool = True, percentile: float = 99.9):
    """Finds the range of numbers that the codes shall cover.

    Args:
        x: Array of finite floats, of any shape: weights, or activations collected on typical inputs.
        method: `"minmax"`, `"percentile"`, `"mse"` or `"entropy"`.
        bits: Integer, 2 to 8; `"mse"` and `"entropy"` depend on it.
        symmetric: Boolean. The range of symmetric quantization is `(−t, t)`.
        percentile: Float in (50, 100], per cent of the numbers that `"percentile"` covers at each end.

    Returns:
        `(low, high)`, floats with `low ≤ 0 ≤ high`: the `value_range` of `quantize`.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> calibrate(np.array([-1.0, 0.5, 4.0]), symmetric=False)
    (-1.0, 4.0)
    """
    code_range(bits, symmetric)
    x = np.asarray(x, np.float32).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"`x` must hold finite numbers, at least one. Received: {x.size} numbers, {x[:4]} …")
    if method == "minmax":
        return minmax_range(x, symmetric)
    if method == "percentile":
        return percentile_range(x, symmetric, percentile)
    if method == "mse":
        return mse_range(x, bits, symmetric)
    if method == "entropy":
        return entropy_range(x, bits, symmetric)
    raise ValueError(f"`method` must be 'minmax', 'percentile', 'mse' or 'entropy'. Received: method={method!r}")


def minmax_range(x: np.ndarray, symmetric: bool) -> tuple[float, float]:
    """The smallest range that clips nothing: `(min(x, 0), max(x, 0))`, or `(−max|x|, max|x|)` when symmetric."""
    return _two_sided(min(float(x.min()), 0.0), max(float(x.max()), 0.0), symmetric)


def percentile_range(x: np.ndarray, symmetric: bool, percentile: float) -> tuple[float, float]:
    """The range that leaves `100 − percentile` per cent outside: of |x| when symmetric, else at either end."""
    if not 50 < percentile <= 100:
        raise ValueError(f"`percentile` must be in (50, 100]. Received: percentile={percentile!r}")
    if symmetric:
        limit = float(np.percentile(np.abs(x), percentile))
        return -limit, limit
    low, high = np.percentile(x, [100 - percentile, percentile])
    return min(float(low), 0.0), max(float(high), 0.0)


def mse_range(x: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float]:
    """The widest range times the factor of 1/100, 2/100, … 1 that has the smallest mean of `(x − x̂)²`."""
    low, high = minmax_range(x, symmetric)
    shares = np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    errors = [np.mean((x - _round_trip(x, low * share, high * share, bits, symmetric)) ** 2) for share in shares]
    best = float(shares[int(np.argmin(errors))])
    return low * best, high * best


def entropy_range(x: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float]:
    """The threshold on |x| whose histogram, in as many levels as there are codes, is nearest to the full one's.

    For every threshold t: P is the histogram of |x| up to t, what lies above counted in its last bin; Q is the same
    bins without what lies above, merged to the number of levels and spread evenly over their bins that hold anything.
    The t with the smallest Kullback-Leibler divergence `Σ P log(P / Q)` is taken.
    """
    low, high = minmax_range(x, symmetric)
    limit = max(-low, high)
    if limit == 0:
        return low, high
    counts = np.histogram(np.abs(x), bins=_BINS, range=(0, limit))[0].astype(float)
    one_sided = not symmetric and low == 0
    levels = 2**bits if one_sided else 2 ** (bits - 1)
    kept = np.arange(levels, _BINS + 1)
    best = kept[int(np.argmin([_divergence(counts, int(bins), levels) for bins in kept]))]
    threshold = limit * float(best) / _BINS
    return max(low, -threshold), min(high, threshold)


def _two_sided(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    limit = max(-low, high)
    return (-limit, limit) if symmetric else (low, high)


def _round_trip(x: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> np.ndarray:
    """x̂ for a range: quantized and back."""
    scale, zero_point = (symmetric_scale(low, high, bits), 0) if symmetric else affine_parameters(low, high, bits)
    codes = np.clip(np.rint(x / scale) + zero_point, *code_range(bits, symmetric))
    return (codes - zero_point) * scale


def _divergence(counts: np.ndarray, bins: int, levels: int) -> float:
    """KL divergence of the first `bins` bins, outliers in the last, from the same bins in `levels` levels."""
    kept = counts[:bins]
    p = kept.copy()
    p[-1] += counts[bins:].sum()
    level = np.arange(bins) * levels // bins  # the level of each bin
    filled = kept > 0
    mean = np.bincount(level, kept, levels) / np.maximum(np.bincount(level, filled, levels), 1)
    q = np.where(filled, mean[level], 0.0)
    if (q[p > 0] == 0).any():  # outliers in a bin that was empty: nothing of them is left in Q
        return float("inf")
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float(np.sum(p * np.log(p / q)))
