"""How sure a score is: bootstrap intervals over the lines it was measured on. No JAX.

A score is a formula of sums over lines: right answers and lines, n-grams that match, tokens and their loss. So a line
is a row of numbers, and a resampled test set is a weighted sum of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

SAMPLES = 2000  # resampled test sets
LEVEL = 0.95
_SEED = 0

#: From sums over lines, (…, S), to a score, (…).
Formula = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score, and the interval that holds 95 % of the scores of resampled lines: `low <= high`."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class PerLine:
    """What a score is made of: one row of numbers for each line, (N, S), and the formula of their sums."""

    statistics: np.ndarray
    formula: Formula


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum divided by the second: a share, or a mean. NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def share(rights) -> PerLine:
    """The share of lines that are right, given a boolean for each."""
    right = np.asarray(rights, float)
    return PerLine(np.stack([right, np.ones_like(right)], axis=1), ratio)


def estimates(parts: Mapping[str, PerLine]) -> dict[str, Estimate]:
    """Scores of the same lines, each with its interval. All are resampled alike, and the same way in every run.

    A percentile bootstrap: lines are drawn with replacement, 2,000 times. It knows only what the lines show; where
    all of them are right, or none is, the interval has no width.

    Args:
        parts: Scores by name, each of N lines.

    Example:

    >>> found = estimates({"right": share([True] * 30 + [False] * 10)})["right"]
    >>> found.value, 0.58 < found.low < 0.65, 0.85 < found.high < 0.92
    (0.75, True, True)

    Reference: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    if not parts:
        return {}
    total, sums = _sums(parts)
    return {name: _estimate(part.formula(total[name]), part.formula(sums[name])) for name, part in parts.items()}


def differences(before: Mapping[str, PerLine], after: Mapping[str, PerLine]) -> dict[str, Estimate]:
    """After minus before, on the same lines, with a paired bootstrap interval: both are drawn together.

    Args:
        before, after: Scores by name, of the same N lines in the same order. Names that only one has are left out.

    Raises:
        ValueError: If the numbers of lines differ.
    """
    names = [name for name in after if name in before]
    if not names:
        return {}
    counts = {len(parts[name].statistics) for parts in (before, after) for name in names}
    if len(counts) != 1:
        raise ValueError(f"`before` and `after` must be of the same lines. Received: {sorted(counts)} lines")
    paired = {("before", name): before[name] for name in names} | {("after", name): after[name] for name in names}
    total, sums = _sums(paired)

    def difference(of: dict, name: str) -> np.ndarray:
        return after[name].formula(of["after", name]) - before[name].formula(of["before", name])

    return {name: _estimate(difference(total, name), difference(sums, name)) for name in names}


def _sums(parts: Mapping) -> tuple[dict, dict]:
    """The sums over all lines, (S,) for each score, and over each resampled test set, (SAMPLES, S)."""
    table = np.concatenate([np.asarray(part.statistics, float) for part in parts.values()], axis=1)  # (N, all S)
    lines = len(table)
    rng = np.random.default_rng(_SEED)
    sums = np.empty((SAMPLES, table.shape[1]))
    for sample in range(SAMPLES):
        sums[sample] = np.bincount(rng.integers(lines, size=lines), minlength=lines) @ table
    ends = np.cumsum([part.statistics.shape[1] for part in parts.values()])[:-1]
    total = dict(zip(parts, np.split(table.sum(axis=0), ends), strict=True))
    return total, dict(zip(parts, np.split(sums, ends, axis=1), strict=True))


def _estimate(value, samples: np.ndarray) -> Estimate:
    tail = (1 - LEVEL) / 2
    defined = samples[np.isfinite(samples)]  # a draw may hold no line that a field is in
    low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (value, value)
    return Estimate(float(value), float(low), float(high))
