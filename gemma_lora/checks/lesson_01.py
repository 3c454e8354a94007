"""Checkers of lesson 01's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 1


def affine_by_hand(answer: int | None) -> None:
    """Checks the 8-bit affine code of 100 where the range is −64 … 446.

    Args:
        answer: The code, or None or `...` while there is none.
    """
    slips: dict[float, str] = {
        50: "100 / 2 is 50, and the zero point 32 is still to be added",
        18: "the zero point is added, not taken away",
        110: "446 − 64 is not the length of the range: it reaches from −64 to 446",
        109: "446 − 64 is not the length of the range: it reaches from −64 to 446",
        28: "that is max|x| / 127, the symmetric scale; the range here is affine",
        -46: "codes of an affine quantization are 0 … 255; there is no 128 to take away",
    }
    praise = "scale 510 / 255 = 2, zero point 64 / 2 = 32, code 100 / 2 + 32 = 82."
    hint = "scale = (high − low) / 255, zero point = −low / scale, code = x / scale + zero point"
    number_verdict("affine_by_hand", answer, 82, praise, slips, hint)


def scale_and_zero_point(function: Callable) -> None:
    """Checks `function(low, high, bits)`: `(scale, zero_point)` of affine quantization."""
    rng = np.random.default_rng(_SEED)
    cases = [
        {"low": -float(rng.uniform(0.5, 4)), "high": float(rng.uniform(4.5, 9)), "bits": int(rng.integers(2, 9))}
        for _ in range(20)
    ]

    def right(low, high, bits):
        steps = len(range(2**bits)) - 1
        scale = (abs(low) + high) / steps
        return np.array([scale, min(range(steps + 1), key=lambda code: abs(code * scale + low))])

    slips = {
        "the range is taken as high + low: the notes' slip": lambda low, high, bits: [
            (high + low) / (2**bits - 1),
            round(-low * (2**bits - 1) / (high + low)),
        ],
        "the range is divided by 2^bits; there are 2^bits codes and one step fewer": lambda low, high, bits: [
            (high - low) / 2**bits,
            round(-low * 2**bits / (high - low)),
        ],
        "the zero point has the wrong sign": lambda low, high, bits: [
            (high - low) / (2**bits - 1),
            round(low * (2**bits - 1) / (high - low)),
        ],
        "the zero point is not rounded to a whole number": lambda low, high, bits: [
            (high - low) / (2**bits - 1),
            -low * (2**bits - 1) / (high - low),
        ],
        "the zero point is forgotten": lambda low, high, bits: [(high - low) / (2**bits - 1), 0],
        "scale is max|x| over the largest signed code, which is symmetric quantization": lambda low, high, bits: [
            max(-low, high) / (2 ** (bits - 1) - 1),
            0,
        ],
        "8 bits are built in": lambda low, high, bits: [(high - low) / 255, round(-low * 255 / (high - low))],
    }
    verdict("scale_and_zero_point", function, cases, right, slips)


def symmetric_codes(function: Callable) -> None:
    """Checks `function(x, bits)`: the signed codes of x, one scale for the whole array."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        x = rng.normal(size=tuple(rng.integers(2, 5, 2)))
        x.flat[int(np.abs(x).argmax())] = -np.abs(x).max()  # the largest magnitude is negative
        cases.append({"x": x, "bits": int(rng.integers(3, 9))})

    def right(x, bits):
        top = 2 ** (bits - 1) - 1
        values = np.arange(-top, top + 1) * (np.abs(x).max() / top)
        return np.abs(x[..., None] - values).argmin(-1) - top  # the nearest number that has a code

    def codes(x, largest, top):
        return np.rint(x / (largest / top))

    slips = {
        "the scale is max(x), not max|x|: negative numbers fall off the end": lambda x, bits: codes(
            x, x.max(), 2 ** (bits - 1) - 1
        ),
        "codes are cut off instead of rounded": lambda x, bits: np.trunc(
            x / (np.abs(x).max() / (2 ** (bits - 1) - 1)) * (1 + 1e-12)
        ),
        "the largest code is taken as 2^(bits − 1); it is one less": lambda x, bits: codes(
            x, np.abs(x).max(), 2 ** (bits - 1)
        ),
        "the largest code is taken as 2^bits − 1; one bit goes to the sign": lambda x, bits: codes(
            x, np.abs(x).max(), 2**bits - 1
        ),
        "the numbers come back dequantized; the codes are asked for": lambda x, bits: (
            codes(x, np.abs(x).max(), 2 ** (bits - 1) - 1) * np.abs(x).max() / (2 ** (bits - 1) - 1)
        ),
        "8 bits are built in": lambda x, bits: codes(x, np.abs(x).max(), 127),
        "every row has a scale of its own": lambda x, bits: codes(
            x, np.abs(x).max(1, keepdims=True), 2 ** (bits - 1) - 1
        ),
    }
    verdict("symmetric_codes", function, cases, right, slips)


def channel_scales(function: Callable) -> None:
    """Checks `function(kernel, bits)`: one symmetric scale a column of a (d_in, d_out) kernel, as (1, d_out)."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        d_in = int(rng.integers(2, 6))
        kernel = rng.normal(size=(d_in, d_in))  # square, so that a wrong axis has a wrong answer and no other shape
        kernel *= rng.uniform(0.2, 5, d_in)
        cases.append({"kernel": -np.abs(kernel) if rng.random() < 0.3 else kernel, "bits": int(rng.integers(2, 9))})

    def right(kernel, bits):
        return np.array([[max(abs(v) for v in column) / (2 ** (bits - 1) - 1) for column in kernel.T]])

    def scales(kernel, bits, **options):
        return np.abs(kernel).max(keepdims=True, **options) / (2 ** (bits - 1) - 1)

    slips = {
        "the axes are exchanged: these are one scale a row, laid out as columns": lambda kernel, bits: (
            scales(kernel, bits, axis=1).T
        ),
        "the axes are exchanged: these are one scale a row": lambda kernel, bits: scales(kernel, bits, axis=1),
        "there is one scale for the whole kernel": lambda kernel, bits: np.broadcast_to(
            scales(kernel, bits), (1, kernel.shape[1])
        ),
        "the result has lost an axis: keepdims=True keeps it, so that kernel / scale broadcasts": lambda kernel, bits: (
            scales(kernel, bits, axis=0)[0]
        ),
        "the maximum is of x, not of |x|": lambda kernel, bits: (
            kernel.max(axis=0, keepdims=True) / (2 ** (bits - 1) - 1)
        ),
        "the largest code is taken as 2^bits − 1; one bit goes to the sign": lambda kernel, bits: (
            np.abs(kernel).max(axis=0, keepdims=True) / (2**bits - 1)
        ),
        "this is 1 / scale, Keras's convention": lambda kernel, bits: 1 / scales(kernel, bits, axis=0),
    }
    verdict("channel_scales", function, cases, right, slips)


def block_round_trip(function: Callable) -> None:
    """Checks `function(x, bits, block_size)`: x quantized in blocks of its last axis, symmetric, and back."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        size, blocks, rows = (int(n) for n in (rng.integers(2, 5), rng.integers(2, 4), rng.integers(2, 4)))
        x = rng.normal(size=(rows, blocks, size)) * rng.uniform(0.2, 5, (rows, blocks, 1))
        cases.append({"x": x.reshape(rows, -1), "bits": int(rng.integers(3, 6)), "block_size": size})

    def right(x, bits, block_size):
        result = np.empty_like(x)
        top = 2 ** (bits - 1) - 1
        for row, values in enumerate(x):
            for start in range(0, len(values), block_size):
                part = values[start : start + block_size]
                step = max(abs(part)) / top
                result[row, start : start + block_size] = [round(value / step) * step for value in part]
        return result

    def back(x, scale):
        return np.rint(x / scale) * scale

    def codes(x, bits, block_size):
        blocks = x.reshape(len(x), -1, block_size)
        return np.rint(blocks / (np.abs(blocks).max(-1, keepdims=True) / (2 ** (bits - 1) - 1))).reshape(x.shape)

    def strided(x, bits, block_size):
        blocks = x.reshape(len(x), block_size, -1)
        return back(blocks, np.abs(blocks).max(1, keepdims=True) / (2 ** (bits - 1) - 1)).reshape(x.shape)

    slips = {
        "there is one scale for the whole array": lambda x, bits, block_size: back(
            x, np.abs(x).max() / (2 ** (bits - 1) - 1)
        ),
        "there is one scale a row": lambda x, bits, block_size: back(
            x, np.abs(x).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        ),
        "there is one scale a column": lambda x, bits, block_size: back(
            x, np.abs(x).max(0, keepdims=True) / (2 ** (bits - 1) - 1)
        ),
        "these are the codes; they are not multiplied by the scale again": codes,
        "a block is made of every so-manieth number; its numbers stand side by side": strided,
        "nothing is rounded: x comes back as it was": lambda x, bits, block_size: x,
        "the largest code is taken as 2^bits − 1; one bit goes to the sign": lambda x, bits, block_size: right(
            x, bits + 1, block_size
        ),
    }
    verdict("block_round_trip", function, cases, right, slips)


def packed_bytes(function: Callable) -> None:
    """Checks `function(shape, bits, block_size)`: bytes of packed codes and one 2-byte scale a block."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        block_size = int(rng.choice([16, 32, 64]))
        shape = (int(rng.integers(2, 50)), block_size * int(rng.integers(2, 20)))
        cases.append({"shape": shape, "bits": int(rng.choice([2, 3, 4, 5, 6])), "block_size": block_size})

    def right(shape, bits, block_size):
        codes = np.zeros((*shape, bits), bool)
        return np.packbits(codes).nbytes + np.zeros((shape[0], shape[1] // block_size), np.float16).nbytes

    slips = {
        "the scales are forgotten": lambda shape, bits, block_size: shape[0] * shape[1] * bits // 8,
        "these are bits; a byte has 8": lambda shape, bits, block_size: (
            shape[0] * shape[1] * bits + 16 * shape[0] * shape[1] // block_size
        ),
        "each code takes a whole byte; they are packed": lambda shape, bits, block_size: (
            shape[0] * shape[1] + 2 * shape[0] * shape[1] // block_size
        ),
        "a scale is counted as 4 bytes; a half-precision one has 2": lambda shape, bits, block_size: (
            shape[0] * shape[1] * bits // 8 + 4 * shape[0] * shape[1] // block_size
        ),
        "there is one scale a row, not one a block": lambda shape, bits, block_size: (
            shape[0] * shape[1] * bits // 8 + 2 * shape[0]
        ),
        "there are only the blocks of one row": lambda shape, bits, block_size: (
            shape[0] * shape[1] * bits // 8 + 2 * shape[1] // block_size
        ),
    }
    verdict("packed_bytes", function, cases, right, slips)


def fold_batch_norm(function: Callable) -> None:
    """Checks `function(kernel, mean, variance, gamma, beta)`: the next layer's kernel, its bias as the last row."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        d = int(rng.integers(2, 5))
        case = {"kernel": rng.normal(size=(d, d)), "mean": rng.normal(size=d), "variance": rng.uniform(0.3, 4, d)}
        cases.append(case | {"gamma": rng.uniform(0.5, 2, d), "beta": rng.normal(size=d)})

    def right(kernel, mean, variance, gamma, beta):
        # What the two layers do to zero is the bias; what a unit vector adds to it is a row of the kernel.
        def both(x):
            return ((x - mean) / np.sqrt(variance) * gamma + beta) @ kernel

        zero = np.zeros(len(mean))
        return np.stack([*(both(row) - both(zero) for row in np.eye(len(mean))), both(zero)])

    def folded(kernel, factor, shift):
        return np.vstack([factor[:, None] * kernel, shift @ kernel])

    slips = {
        "the factor multiplies columns; x meets the kernel's rows": lambda kernel, mean, variance, gamma, beta: (
            np.vstack([kernel * gamma / np.sqrt(variance), (beta - mean * gamma / np.sqrt(variance)) @ kernel])
        ),
        "x is divided by the variance; the square root is missing": lambda kernel, mean, variance, gamma, beta: folded(
            kernel, gamma / variance, beta - mean * gamma / variance
        ),
        "the mean is not in the bias": lambda kernel, mean, variance, gamma, beta: folded(
            kernel, gamma / np.sqrt(variance), beta
        ),
        "the mean is added to the bias, not taken away": lambda kernel, mean, variance, gamma, beta: folded(
            kernel, gamma / np.sqrt(variance), beta + mean * gamma / np.sqrt(variance)
        ),
        "the mean in the bias is not scaled by gamma / sqrt(variance)": lambda kernel, mean, variance, gamma, beta: (
            folded(kernel, gamma / np.sqrt(variance), beta - mean)
        ),
        "gamma is forgotten": lambda kernel, mean, variance, gamma, beta: folded(
            kernel, 1 / np.sqrt(variance), beta - mean / np.sqrt(variance)
        ),
        "the shift is not sent through the kernel": lambda kernel, mean, variance, gamma, beta: np.vstack(
            [(gamma / np.sqrt(variance))[:, None] * kernel, beta - mean * gamma / np.sqrt(variance)]
        ),
        "the bias is forgotten: it is zero": lambda kernel, mean, variance, gamma, beta: folded(
            kernel, gamma / np.sqrt(variance), 0 * beta
        ),
    }
    verdict("fold_batch_norm", function, cases, right, slips)
