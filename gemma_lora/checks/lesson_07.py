"""Checkers of lesson 07's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 7


def bits_a_weight_by_hand(answer: float | None) -> None:
    """Checks the bits a weight of 4-bit codes with a 16-bit scale for every 128 weights.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    right = 4 + 16 / 128
    slips: dict[float, str] = {  # to two decimals
        4.0: "the scales are left out: 16 bits for every 128 weights",
        4.25: "here a scale has 16 bits, and a block 128 weights",
        12.0: "bits over weights: 16/128, not 128/16",
        20.0: "the 16 bits are shared by 128 weights",
        0.12: "that is the scale's share alone; the code takes 4 bits",
        4.02: "2 bytes are 16 bits",
        4.13: "that is rounded: give all digits",
        4.12: "that is rounded: give all digits",
    }
    hint = "4 bits for the code, and the weight's share of its block's scale"
    number_verdict("bits_a_weight_by_hand", answer, right, "4 + 16/128 bits.", slips, hint)


def nearest_level(function: Callable) -> None:
    """Checks `function(x, levels)`: for each number the index of the nearest level; `levels` ascend."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        levels = np.sort(rng.choice(np.arange(-40, 41), int(rng.integers(4, 7)), replace=False)) / 40
        cases.append({"x": rng.uniform(-1.2, 1.2, 6).round(4), "levels": levels})

    def right(x, levels):
        best = []
        for number in x:
            distances = [abs(number - level) for level in levels]
            best.append(distances.index(min(distances)))
        return np.array(best)

    slips = {
        "the level below is taken, not the nearest": lambda x, levels: np.clip(
            np.searchsorted(levels, x, side="right") - 1, 0, len(levels) - 1
        ),
        "the level above is taken, not the nearest": lambda x, levels: np.clip(
            np.searchsorted(levels, x), 0, len(levels) - 1
        ),
        "the levels themselves are returned; their indices are asked for": lambda x, levels: levels[right(x, levels)],
        "the levels are taken as evenly spaced": lambda x, levels: np.clip(
            np.rint((x - levels[0]) / (levels[-1] - levels[0]) * (len(levels) - 1)), 0, len(levels) - 1
        ),
        "the difference is taken without its absolute value": lambda x, levels: np.argmin(
            np.subtract.outer(x, levels), axis=1
        ),
        "absolute values are compared, so that signs are lost": lambda x, levels: np.argmin(
            np.abs(np.subtract.outer(np.abs(x), np.abs(levels))), axis=1
        ),
    }
    verdict("nearest_level", function, cases, right, slips)


def blockwise_levels(function: Callable) -> None:
    """Checks `function(x, levels, block_size)`: x (n,) after quantization in blocks, scale max |x| of the block."""
    rng = np.random.default_rng(_SEED)
    levels = np.array([-1.0, -0.55, -0.2, 0.0, 0.15, 0.4, 0.7, 1.0])
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        size, blocks = int(rng.integers(3, 5)), int(rng.integers(2, 4))
        x = rng.normal(size=(blocks, size)) * rng.uniform(0.3, 4, (blocks, 1))
        x[:, 1] = np.abs(x[:, 1]) + 0.1
        x[0, 0] = -1.5 * np.abs(x[0]).max()  # the largest |x| of the first block is a negative number
        cases.append({"x": x.ravel().round(2), "levels": levels, "block_size": size})

    def nearest(values):
        return levels[np.abs(np.subtract.outer(values, levels)).argmin(-1)]

    def right(x, levels, block_size):
        result = np.empty_like(x)
        for start in range(0, len(x), block_size):
            block = x[start : start + block_size]
            scale = max(abs(number) for number in block)
            result[start : start + block_size] = [scale * float(nearest(number / scale)) for number in block]
        return result

    def scaled(scale_of):
        def slip(x, levels, block_size):
            blocks = x.reshape(-1, block_size)
            scales = scale_of(blocks)
            return (scales * nearest(blocks / scales)).ravel()

        return slip

    def interleaved(x, levels, block_size):
        blocks = x.reshape(block_size, -1).T
        scales = np.abs(blocks).max(axis=1, keepdims=True)
        return (scales * nearest(blocks / scales)).T.ravel()

    slips = {
        "one scale is used for all blocks": scaled(lambda b: np.full((len(b), 1), np.abs(b).max())),
        "the scale is the largest number, not the largest absolute value": scaled(lambda b: b.max(1, keepdims=True)),
        "the scale is the mean absolute value, not the largest": scaled(lambda b: np.abs(b).mean(1, keepdims=True)),
        "the scale is the standard deviation": scaled(lambda b: b.std(axis=1, keepdims=True)),
        "the levels are not multiplied by the scale": lambda x, levels, block_size: (
            right(x, levels, block_size) / np.repeat(np.abs(x.reshape(-1, block_size)).max(1), block_size)
        ),
        "nothing is divided by the scale": lambda x, levels, block_size: nearest(x),
        "a block is not of consecutive numbers": interleaved,
    }
    verdict("blockwise_levels", function, cases, right, slips)


def unpack_nibbles(function: Callable) -> None:
    """Checks `function(packed)`: the 2n codes in n bytes, each byte's high nibble first."""
    rng = np.random.default_rng(_SEED)
    cases = [{"packed": rng.integers(0, 256, int(rng.integers(2, 5))).astype(np.uint8)} for _ in range(20)]

    def right(packed):
        return np.array([int(digit, 16) for byte in packed for digit in f"{byte:02x}"])

    slips = {
        "the low nibble comes first": lambda packed: right(packed).reshape(-1, 2)[:, ::-1].ravel(),
        "all high nibbles come first; they alternate": lambda packed: right(packed).reshape(-1, 2).T.ravel(),
        "the high nibble is not shifted down": lambda packed: np.stack([packed & 240, packed & 15], 1).ravel(),
        "the high nibble is not cut off from the low one": lambda packed: np.stack([packed >> 4, packed], 1).ravel(),
        "only the high nibbles are returned": lambda packed: packed >> 4,
        "only the low nibbles are returned": lambda packed: packed & 15,
    }
    verdict("unpack_nibbles", function, cases, right, slips)


def decode_scales(function: Callable) -> None:
    """Checks `function(codes, levels, group_scales, offset, group_size)`: scales after double quantization, (n,)."""
    rng = np.random.default_rng(_SEED)
    levels = np.array([-1.0, -0.3, -0.05, 0.0, 0.1, 0.4, 1.0])
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        size, groups = int(rng.integers(2, 4)), int(rng.integers(2, 4))
        codes = rng.integers(0, len(levels), size * groups)
        codes[0] = 6
        named = {"codes": codes, "levels": levels, "group_scales": rng.uniform(0.1, 3, groups).round(2)}
        cases.append(named | {"offset": round(float(rng.uniform(0.5, 2)), 2), "group_size": size})

    def right(codes, levels, group_scales, offset, group_size):
        return np.array([levels[c] * group_scales[i // group_size] + offset for i, c in enumerate(codes)])

    def each(codes, group_scales, group_size):
        return np.repeat(group_scales, group_size)[: len(codes)]

    slips = {
        "the offset, the scales' mean, is left out": lambda codes, levels, group_scales, offset, group_size: (
            levels[codes] * each(codes, group_scales, group_size)
        ),
        "the offset is added before the group's scale multiplies": (
            lambda codes, levels, group_scales, offset, group_size: (
                (levels[codes] + offset) * each(codes, group_scales, group_size)
            )
        ),
        "the offset is taken off; it was taken off before quantizing": (
            lambda codes, levels, group_scales, offset, group_size: (
                levels[codes] * each(codes, group_scales, group_size) - offset
            )
        ),
        "the first group's scale is used for all": lambda codes, levels, group_scales, offset, group_size: (
            levels[codes] * group_scales[0] + offset
        ),
        "the groups take turns; a group is of consecutive scales": (
            lambda codes, levels, group_scales, offset, group_size: (
                levels[codes] * np.tile(group_scales, group_size)[: len(codes)] + offset
            )
        ),
        "the codes are used as numbers; they are places in `levels`": (
            lambda codes, levels, group_scales, offset, group_size: (
                codes * each(codes, group_scales, group_size) + offset
            )
        ),
    }
    verdict("decode_scales", function, cases, right, slips)


def gradient_to_the_input(function: Callable) -> None:
    """Checks `function(dy, codes, levels, scales)`: the gradient by x of `x @ W.T`, W = levels[codes] · scales.

    `dy` is (T, d_out), `codes` (d_out, d_in), `scales` (d_out, 1).
    """
    rng = np.random.default_rng(_SEED)
    levels = np.array([-1.0, -0.4, 0.0, 0.25, 1.0])
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        d = int(rng.integers(2, 4))  # square, or a forgotten transpose would not fit
        named = {"dy": rng.normal(size=(2, d)).round(2), "codes": rng.integers(0, 5, (d, d)), "levels": levels}
        cases.append(named | {"scales": rng.uniform(0.2, 2, (d, 1)).round(2)})

    def right(dy, codes, levels, scales):
        result = np.zeros((len(dy), codes.shape[1]))
        for t, row in enumerate(dy):
            for i, j in np.ndindex(codes.shape):
                result[t, j] += row[i] * levels[codes[i, j]] * scales[i, 0]
        return result

    slips = {
        "the scales are left out": lambda dy, codes, levels, scales: dy @ levels[codes],
        "W is transposed; y = x @ W.T, so dx = dy @ W": lambda dy, codes, levels, scales: (
            dy @ (levels[codes] * scales).T
        ),
        "the codes are multiplied, not the levels they stand for": lambda dy, codes, levels, scales: (
            dy @ (codes * scales)
        ),
        "dy itself is returned: that passes straight through the layer": lambda dy, codes, levels, scales: dy,
        "the scales multiply columns; each row, an output, has one": lambda dy, codes, levels, scales: (
            dy @ (levels[codes] * scales.T)
        ),
    }
    verdict("gradient_to_the_input", function, cases, right, slips)
