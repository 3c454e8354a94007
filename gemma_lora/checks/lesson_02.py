"""Checkers of lesson 02's exercises. Each compares with a computation of its own, exact or number by number."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 2


def perplexity_by_hand(answer: float | None) -> None:
    """Checks the perplexity of three words that had the probabilities 1/2, 1/4 and 1/8.

    Args:
        answer: The perplexity, or None or `...` while there is none.
    """
    slips: dict[float, str] = {
        4.67: "that is the mean of 1/p; the mean is taken of −ln p, before the exponential",
        3.43: "that is 1 over the mean probability; the mean is taken of −ln p",
        1.39: "that is the mean of −ln p, the loss; its exponential is asked for",
        64: "that is the exponential of the sum; the mean is needed, so divide by three words",
        0.25: "that is the exponential of the mean of ln p; the minus sign is missing",
        2: "that is the mean in bits, log2; take 2 to this power, or stay with nats and e",
        7.39: "2 is the mean in bits, and e belongs to nats",
    }
    praise = "4. The product is 1/64, its third root 1/4: as unsure as among 4 equally likely words."
    number_verdict("perplexity_by_hand", answer, 4, praise, slips, "take the exponential of the mean of −ln p")


def bias_codes(function: Callable) -> None:
    """Checks `function(bias, scale_x, scale_w)`: the bias as whole numbers whose unit is scale_x · scale_w."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        size = int(rng.integers(3, 6))
        scale_w = rng.uniform(0.01, 0.3, size)
        bias = (rng.integers(-900, 900, size) + rng.uniform(0.51, 0.9, size)) * 0.02 * scale_w
        cases.append({"bias": bias, "scale_x": 0.02, "scale_w": scale_w})

    def right(bias, scale_x, scale_w):
        units = [Fraction(scale_x) * Fraction(float(step)) for step in scale_w]
        return np.array([round(Fraction(float(b)) / unit) for b, unit in zip(bias, units, strict=True)])

    def own_scale(bias, scale_x, scale_w):
        return np.round(bias / (np.abs(bias).max() / 127))

    slips = {
        "the bias is divided by the weights' scale alone": lambda bias, scale_x, scale_w: np.round(bias / scale_w),
        "the bias is divided by the input's scale alone": lambda bias, scale_x, scale_w: np.round(bias / scale_x),
        "the bias is multiplied by the scales; a code is the number divided by its unit": (
            lambda bias, scale_x, scale_w: np.round(bias * scale_x * scale_w)
        ),
        "the codes are cut off, not rounded": lambda bias, scale_x, scale_w: np.trunc(bias / scale_x / scale_w),
        "the codes are rounded down, not to the nearest": lambda bias, scale_x, scale_w: np.floor(
            bias / scale_x / scale_w
        ),
        "the codes are held to 8 bits; sums are kept in 32": lambda bias, scale_x, scale_w: np.clip(
            np.round(bias / scale_x / scale_w), -127, 127
        ),
        "the bias has a scale of its own; it could not be added to the sums": own_scale,
        "the codes are not whole numbers yet": lambda bias, scale_x, scale_w: bias / scale_x / scale_w,
    }
    verdict("bias_codes", function, cases, right, slips)


def integer_layer(function: Callable) -> None:
    """Checks `function(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w)`: the output, (n, d_out)."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        n, d_in, d_out = (int(size) for size in rng.integers([1, 6, 2], [4, 9, 4]))
        case: dict[str, Any] = {"codes": rng.integers(0, 256, (n, d_in)).astype(np.uint8)}
        case["zero_point"] = int(rng.integers(90, 160))
        case["kernel_codes"] = rng.integers(60, 128, (d_in, d_out)).astype(np.int8)  # past int16 within a few inputs
        case["bias_codes"] = rng.integers(-30000, 30000, d_out).astype(np.int32)
        case |= {"scale_x": 0.05, "scale_w": rng.uniform(0.01, 0.2, d_out)}
        cases.append(case)

    def right(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
        rows, columns = codes.tolist(), kernel_codes.T.tolist()
        sums = [[sum((q - zero_point) * w for q, w in zip(row, col, strict=True)) for col in columns] for row in rows]
        return (np.array(sums) + bias_codes) * (scale_x * scale_w)

    def with_sums(sums):
        def slip(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
            return (sums(codes, zero_point, kernel_codes) + bias_codes) * (scale_x * scale_w)

        return slip

    def wide(codes):
        return codes.astype(np.int32)

    def with_end(end):
        def slip(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
            return end((wide(codes) - zero_point) @ wide(kernel_codes), bias_codes, scale_x, scale_w)

        return slip

    slips = {
        "the zero point is forgotten": with_sums(lambda codes, zero_point, kernel: wide(codes) @ wide(kernel)),
        "the zero point is added, not subtracted": with_sums(
            lambda codes, zero_point, kernel: (wide(codes) + zero_point) @ wide(kernel)
        ),
        "the zero point is taken off once for each sum; it belongs to every input": with_sums(
            lambda codes, zero_point, kernel: wide(codes) @ wide(kernel) - zero_point
        ),
        "codes − zero point is computed in uint8, which wraps below 0; make it int32 first": with_sums(
            lambda codes, zero_point, kernel: wide((codes - np.uint8(zero_point)).astype(np.uint8)) @ wide(kernel)
        ),
        "the sums overflow: numpy adds products of uint8 and int8 in int16; make both int32 first": with_sums(
            lambda codes, zero_point, kernel: codes @ kernel - zero_point * wide(kernel).sum(axis=0)
        ),
        "the bias's codes are added without their unit, scale_x · scale_w": with_end(
            lambda sums, bias, scale_x, scale_w: sums * (scale_x * scale_w) + bias
        ),
        "the bias is left out": with_end(lambda sums, bias, scale_x, scale_w: sums * (scale_x * scale_w)),
        "the input's scale is left out": with_end(lambda sums, bias, scale_x, scale_w: (sums + bias) * scale_w),
        "the weights' scale is left out": with_end(lambda sums, bias, scale_x, scale_w: (sums + bias) * scale_x),
        "the integers are returned; the scales are left out": with_end(
            lambda sums, bias, scale_x, scale_w: sums + bias
        ),
    }
    verdict("integer_layer", function, cases, right, slips)


def straight_through_gradient(function: Callable) -> None:
    """Checks `function(x, low, high, gradient)`: the gradient that goes back to x through rounding in a range."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        low, high = -float(rng.integers(2, 9)) / 4, float(rng.integers(10, 20)) / 4
        x = np.concatenate([rng.uniform(low, high, 3), [low - 1.3, high + 0.9, rng.uniform(high, high + 3)]])
        cases.append({"x": rng.permutation(x), "low": low, "high": high, "gradient": rng.normal(0, 3, 6)})

    def right(x, low, high, gradient):
        return np.array([g if low <= value <= high else 0.0 for value, g in zip(x, gradient, strict=True)])

    slips = {
        "the staircase's own slope is passed back, which is 0: nothing will learn": lambda x, low, high, gradient: (
            0 * gradient
        ),
        "what is clipped gets a gradient, too": lambda x, low, high, gradient: gradient,
        "inside and outside are exchanged": lambda x, low, high, gradient: np.where(
            (x >= low) & (x <= high), 0, gradient
        ),
        "only the upper end is looked at": lambda x, low, high, gradient: np.where(x <= high, gradient, 0),
        "only the lower end is looked at": lambda x, low, high, gradient: np.where(x >= low, gradient, 0),
        "the slope, 0 or 1, is returned; the gradient from above must be multiplied by it": (
            lambda x, low, high, gradient: ((x >= low) & (x <= high)).astype(float)
        ),
        "the gradient is clipped to the range; it is x that has a range": lambda x, low, high, gradient: np.clip(
            gradient, low, high
        ),
        "the clipped x is returned, what goes forward": lambda x, low, high, gradient: np.clip(x, low, high),
        "the range is taken as symmetric": lambda x, low, high, gradient: np.where(np.abs(x) <= high, gradient, 0),
    }
    verdict("straight_through_gradient", function, cases, right, slips)


def qat_step(function: Callable) -> None:
    """Checks `function(weights, x, y, rate, bits)`: the float weights after one step of quantization-aware training."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for i in range(20):
        n, size = int(rng.integers(3, 6)), int(rng.integers(2, 5))
        case: dict[str, Any] = {"weights": rng.normal(size=size), "x": rng.normal(size=(n, size))}
        cases.append(case | {"y": rng.normal(size=n), "rate": 0.1, "bits": 2 + i % 3})

    def round_trip(weights, bits):
        step = np.abs(weights).max() / (2 ** (bits - 1) - 1)
        return np.round(weights / step) * step

    def right(weights, x, y, rate, bits):
        step = max(abs(float(w)) for w in weights) / (2 ** (bits - 1) - 1)
        rounded = [round(float(w) / step) * step for w in weights]
        errors = [
            sum(w * v for w, v in zip(rounded, row, strict=True)) - t
            for row, t in zip(x.tolist(), y.tolist(), strict=True)
        ]
        slopes = [2 * sum(e * row[j] for e, row in zip(errors, x, strict=True)) / len(y) for j in range(len(weights))]
        return np.array([w - rate * slope for w, slope in zip(weights, slopes, strict=True)])

    def slope(weights, x, y):
        return 2 * x.T @ (x @ weights - y) / len(y)

    slips = {
        "the gradient is taken at the float weights; the rounded ones go forward": lambda weights, x, y, rate, bits: (
            weights - rate * slope(weights, x, y)
        ),
        "the step starts from the rounded weights; the float ones are kept and moved": (
            lambda weights, x, y, rate, bits: round_trip(weights, bits) - rate * slope(round_trip(weights, bits), x, y)
        ),
        "the result is rounded again; small steps would be lost": lambda weights, x, y, rate, bits: round_trip(
            right(weights, x, y, rate, bits), bits
        ),
        "the step goes uphill": lambda weights, x, y, rate, bits: (
            weights + rate * slope(round_trip(weights, bits), x, y)
        ),
        "the derivative of the square lacks its 2": lambda weights, x, y, rate, bits: (
            weights - rate * slope(round_trip(weights, bits), x, y) / 2
        ),
        "the loss is summed, not averaged": lambda weights, x, y, rate, bits: (
            weights - rate * len(y) * slope(round_trip(weights, bits), x, y)
        ),
        "the gradient is returned, not the weights": lambda weights, x, y, rate, bits: slope(
            round_trip(weights, bits), x, y
        ),
        "the largest code is 2^(bits − 1); signed codes end at 2^(bits − 1) − 1": lambda weights, x, y, rate, bits: (
            weights - rate * slope(_coarse(weights, bits), x, y)
        ),
    }
    verdict("qat_step", function, cases, right, slips)


def perplexity_from_logits(function: Callable) -> None:
    """Checks `function(logits, targets)`: exp of the mean of −ln p of the right words, a number."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for i in range(20):
        words, vocabulary = (int(size) for size in rng.integers([2, 4], [5, 7]))
        logits = rng.normal(0, 1.5, (words, vocabulary)) + (900.0 if i % 7 == 3 else 0.0)
        cases.append({"logits": logits, "targets": rng.integers(0, vocabulary, words)})

    def nats(logits, targets):
        found = []
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
            found.append(math.log(sum(math.exp(value - row[target]) for value in row)))  # −ln p
        return np.array(found)

    def right(logits, targets):
        return math.exp(math.fsum(nats(logits, targets)) / len(targets))

    def overflowing(logits, targets):
        with np.errstate(over="ignore"):
            return np.exp(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]))

    def over_all(logits, targets):
        every = [nats(logits, np.full(len(logits), word)) for word in range(logits.shape[1])]
        return np.exp(np.mean(every))

    slips = {
        "the exponential is missing: that is the loss": lambda logits, targets: nats(logits, targets).mean(),
        "the sum is taken, not the mean": lambda logits, targets: np.exp(nats(logits, targets).sum()),
        "the sign is turned: that is the mean probability, 1 over the perplexity": lambda logits, targets: np.exp(
            -nats(logits, targets).mean()
        ),
        "perplexities of single words are averaged; the mean comes before the exponential": lambda logits, targets: (
            np.exp(nats(logits, targets)).mean()
        ),
        "probabilities are averaged; the mean is taken of their logarithms": lambda logits, targets: (
            1 / np.exp(-nats(logits, targets)).mean()
        ),
        "2 is raised to a loss in nats; e belongs to it": lambda logits, targets: 2 ** nats(logits, targets).mean(),
        "all words of the vocabulary are averaged; only the right ones count": over_all,
        "exp of a large logit overflows; take each row's largest off first": overflowing,
        "targets are shifted by one; here they stand beside their logits": lambda logits, targets: np.exp(
            nats(logits[:-1], targets[1:]).mean()
        ),
        "one number a word is returned; the text has one": lambda logits, targets: np.exp(nats(logits, targets)),
    }
    verdict("perplexity_from_logits", function, cases, right, slips)


def _coarse(weights: np.ndarray, bits: int) -> np.ndarray:
    step = np.abs(weights).max() / 2 ** (bits - 1)
    return np.round(weights / step) * step
