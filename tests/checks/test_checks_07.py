"""Lesson 07's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import numpy as np
import pytest

from gemma_lora.quantization import nf4
from tests.checker_rules import CheckerRules, said_by


def nearest_by_distances(x, levels):
    return np.abs(x[:, None] - levels).argmin(axis=1)


def nearest_by_borders(x, levels):
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x).tolist()


def blocks_by_reshaping(x, levels, block_size):
    blocks = x.reshape(-1, block_size)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    return (scales * levels[np.abs((blocks / scales)[..., None] - levels).argmin(-1)]).ravel()


def blocks_by_loop(x, levels, block_size):
    result = []
    for block in np.split(x, len(x) // block_size):
        scale = np.linalg.norm(block, np.inf)
        result += [scale * min(levels, key=lambda level, n=number: abs(n / scale - level)) for number in block]
    return result


def blocks_with(scale_of):
    def function(x, levels, block_size):
        blocks = x.reshape(-1, block_size)
        scales = scale_of(blocks)
        return (scales * levels[np.abs((blocks / scales)[..., None] - levels).argmin(-1)]).ravel()

    return function


def nibbles_by_shifts(packed):
    return np.stack([packed >> 4, packed & 15], axis=1).ravel()


def nibbles_by_division(packed):
    return [digit for byte in packed.tolist() for digit in divmod(byte, 16)]


def scales_by_repeat(codes, levels, group_scales, offset, group_size):
    return levels[codes] * np.repeat(group_scales, group_size) + offset


def scales_by_rows(codes, levels, group_scales, offset, group_size):
    return (offset + levels[codes].reshape(-1, group_size) * group_scales[:, None]).ravel()


def input_gradient(dy, codes, levels, scales):
    return dy @ (levels[codes] * scales)


def input_gradient_by_einsum(dy, codes, levels, scales):
    return np.einsum("ti,ij,i->tj", dy, levels[codes], scales[:, 0])


#: Exercise -> two right functions, written differently.
RIGHT = {
    "nearest_level": [nearest_by_distances, nearest_by_borders],
    "blockwise_levels": [blocks_by_reshaping, blocks_by_loop],
    "unpack_nibbles": [nibbles_by_shifts, nibbles_by_division],
    "decode_scales": [scales_by_repeat, scales_by_rows],
    "gradient_to_the_input": [input_gradient, input_gradient_by_einsum],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "nearest_level": [
        (lambda x, levels: np.clip(np.searchsorted(levels, x, side="right") - 1, 0, len(levels) - 1), "level below"),
        (lambda x, levels: np.clip(np.searchsorted(levels, x), 0, len(levels) - 1), "level above"),
        (lambda x, levels: levels[nearest_by_distances(x, levels)], "indices are asked for"),
        (lambda x, levels: (x[:, None] - levels).argmin(axis=1), "without its absolute value"),
        (lambda x, levels: nearest_by_distances(np.abs(x), np.abs(levels)), "signs are lost"),
        (lambda x, levels: nearest_by_distances(x, levels)[::-1], "expected"),
    ],
    "blockwise_levels": [
        (blocks_with(lambda b: np.abs(b).max() + 0 * b[:, :1]), "one scale"),
        (blocks_with(lambda b: b.max(axis=1, keepdims=True)), "not the largest absolute value"),
        (blocks_with(lambda b: np.abs(b).mean(axis=1, keepdims=True)), "mean absolute"),
        (blocks_with(lambda b: b.std(axis=1, keepdims=True)), "standard deviation"),
        (lambda x, levels, block_size: levels[np.abs(x[:, None] - levels).argmin(1)], "divided by the scale"),
        (lambda x, levels, block_size: x, "expected"),
    ],
    "unpack_nibbles": [
        (lambda packed: np.stack([packed & 15, packed >> 4], axis=1).ravel(), "low nibble comes first"),
        (lambda packed: np.concatenate([packed >> 4, packed & 15]), "alternate"),
        (lambda packed: np.stack([packed & 240, packed & 15], axis=1).ravel(), "not shifted"),
        (lambda packed: np.stack([packed >> 4, packed], axis=1).ravel(), "not cut off"),
        (lambda packed: packed >> 4, "only the high"),
        (lambda packed: packed & 15, "only the low"),
        (lambda packed: packed, "expected"),
    ],
    "decode_scales": [
        (lambda offset, **rest: scales_by_repeat(offset=0.0, **rest), "left out"),
        (lambda levels, offset, **rest: scales_by_repeat(levels=levels + offset, offset=0.0, **rest), "before"),
        (lambda offset, **rest: scales_by_repeat(offset=-offset, **rest), "taken off"),
        (
            lambda codes, levels, group_scales, offset, group_size: levels[codes] * group_scales[0] + offset,
            "first group",
        ),
        (
            lambda codes, group_scales, offset, group_size, **rest: codes * np.repeat(group_scales, group_size)
            + offset,
            "places in",
        ),
        (lambda codes, **rest: codes, "expected"),
    ],
    "gradient_to_the_input": [
        (lambda dy, codes, levels, scales: dy @ levels[codes], "scales are left out"),
        (lambda dy, codes, levels, scales: dy @ (levels[codes] * scales).T, "transposed"),
        (lambda dy, codes, levels, scales: dy @ (codes * scales), "codes are multiplied"),
        (lambda dy, codes, levels, scales: dy, "straight through"),
        (lambda dy, codes, levels, scales: dy @ (levels[codes] * scales.T), "columns"),
        (lambda dy, codes, levels, scales: 2 * input_gradient(dy, codes, levels, scales), "expected"),
    ],
}  # fmt: skip


class TestLesson07(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_07", "bits_a_weight_by_hand", RIGHT, WRONG


def test_the_bits_by_hand_are_those_of_real_bytes(capsys):
    tensor = nf4.quantize(np.ones(128 * 50), block_size=128)
    bits = 8 * (tensor.packed.nbytes + tensor.scales.astype("float16").nbytes) / (128 * 50)
    for answer in (bits, np.float32(bits), "4.125"):
        assert "✓" in said_by(capsys, "bits_a_weight_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(4, "left out"), (4.25, "128 weights"), (12, "128/16"), (20, "shared"), (0.125, "alone"), ("few", "a number")],
)
def test_wrong_bits_by_hand_get_a_hint(capsys, answer, said):
    text = said_by(capsys, "bits_a_weight_by_hand", answer)
    assert "✗" in text and said in text
