"""Lesson 10's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import numpy as np
import pytest

from tests.checker_rules import CheckerRules, said_by


def ternarize_by_rounding(kernel):
    scale = np.mean(np.abs(kernel))
    return scale * np.clip(np.round(kernel / scale), -1, 1)


def ternarize_by_thresholds(kernel):
    scale = np.mean(np.abs(kernel))
    return (scale * ((kernel > scale / 2).astype(int) - (kernel < -scale / 2).astype(int))).tolist()


def rounded_with(scale):
    return lambda kernel: scale(kernel) * np.clip(np.round(kernel / scale(kernel)), -1, 1)


def mean(kernel):
    return np.mean(np.abs(kernel))


def add_by_masks(x, codes):
    return np.array([x[column == 1].sum() - x[column == -1].sum() for column in codes.T])


def add_by_loop(x, codes):
    sums = [0] * codes.shape[1]
    for i, j in np.ndindex(codes.shape):
        if codes[i, j] > 0:
            sums[j] += x[i]
        elif codes[i, j] < 0:
            sums[j] -= x[i]
    return sums


def add_by_choice(x, codes):
    return np.where(codes == 1, x[:, None], np.where(codes == -1, -x[:, None], 0)).sum(axis=0)


def pack_by_loop(codes):
    packed = []
    for row in codes:
        byte = 0
        for code in row[::-1]:
            byte = 3 * byte + int(code) + 1
        packed.append(byte)
    return packed


def gradient_by_einsum(kernel, x, upstream):
    return np.einsum("ti,to->io", x, upstream)


def layer_by_codes(x, kernel):
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    return (np.rint(x / step) @ np.clip(np.rint(kernel / mean(kernel)), -1, 1)) * step * mean(kernel)


def layer_by_tokens(x, kernel):
    fake = ternarize_by_rounding(kernel)
    return [(np.round(127 * token / max(abs(token))) * max(abs(token)) / 127) @ fake for token in x]


def layer_with(steps=127, axis=1, weights=ternarize_by_rounding):
    def function(x, kernel):
        step = np.abs(x).max(axis=axis, keepdims=True) / steps
        return np.rint(x / step) * step @ weights(kernel)

    return function


#: Exercise -> two right functions or more, written differently.
RIGHT = {
    "ternarize": [ternarize_by_rounding, ternarize_by_thresholds],
    "add_and_subtract": [add_by_masks, add_by_loop, add_by_choice],
    "pack_five": [lambda codes: (codes + 1) @ [1, 3, 9, 27, 81], pack_by_loop],
    "latent_gradient": [lambda kernel, x, upstream: x.T @ upstream, gradient_by_einsum],
    "bit_linear": [layer_by_codes, layer_by_tokens],
}


def by_double_loop(x, codes):
    total = np.zeros(codes.shape[1], int)
    for i in range(len(x)):
        for j in range(codes.shape[1]):
            total[j] += codes[i, j] * x[i]
    return total


#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "ternarize": [
        (lambda kernel: np.sign(kernel) * mean(kernel), "the sign is taken"),
        (rounded_with(lambda kernel: np.abs(kernel).max()), "largest"),
        (rounded_with(np.mean), "without |·|"),
        (rounded_with(lambda kernel: np.median(np.abs(kernel))), "median"),
        (lambda kernel: np.round(kernel / mean(kernel)) * mean(kernel), "not clipped"),
        (lambda kernel: np.clip(np.round(kernel / mean(kernel)), -1, 1), "have to be multiplied"),
        (lambda kernel: (np.abs(kernel) > mean(kernel)) * np.sign(kernel) * mean(kernel), "threshold is γ/2"),
        (lambda kernel: np.clip((kernel / mean(kernel)).astype(int), -1, 1) * mean(kernel), "expected"),
        (lambda kernel: np.stack([ternarize_by_rounding(c) for c in kernel.T]).T, "one a matrix"),
        (lambda kernel: kernel, "expected"),
    ],
    "add_and_subtract": [
        (lambda x, codes: x @ codes, "without multiplication"),
        (lambda x, codes: np.dot(x, codes), "without multiplication"),
        (lambda x, codes: (x[:, None] * codes).sum(axis=0), "without multiplication"),
        (lambda x, codes: np.einsum("i,ij->j", x, codes), "without multiplication"),
        (by_double_loop, "without multiplication"),
        (lambda x, codes: [sum(c * a for a, c in zip(x, column)) for column in codes.T], "without multiplication"),  # noqa: B905
        (lambda x, codes: [x[column == 1].sum() for column in codes.T], "left out; they are subtracted"),
        (lambda x, codes: [x[column != 0].sum() for column in codes.T], "are added"),
        (lambda x, codes: [x[c == 1].sum() - x[c != 1].sum() for c in codes.T], "they are left out"),
        (lambda x, codes: [x[c == -1].sum() - x[c == 1].sum() for c in codes.T], "wrong way round"),
        (lambda x, codes: add_by_masks(x, codes).sum(), "one sum"),
        (lambda x, codes: [x.sum() for _ in codes.T], "expected"),
    ],
    "pack_five": [
        (lambda codes: (codes + 1) @ [81, 27, 9, 3, 1], "highest place"),
        (lambda codes: (codes + 1) @ [1, 4, 16, 64, 256], "base is 4"),
        (lambda codes: (codes + 1) @ [1, 2, 4, 8, 16], "three values"),
        (lambda codes: codes @ [1, 3, 9, 27, 81], "add 1"),
        (lambda codes: np.where(codes < 0, 2, codes) @ [1, 3, 9, 27, 81], "code + 1"),
        (lambda codes: (codes + 1) @ [3, 9, 27, 81, 243], "lowest is"),
        (lambda codes: codes + 1, "expected"),
    ],
    "latent_gradient": [
        (lambda kernel, x, upstream: np.zeros_like(kernel), "nothing would learn"),
        (lambda kernel, x, upstream: mean(kernel) * x.T @ upstream, "multiplied by γ"),
        (lambda kernel, x, upstream: (np.abs(kernel) <= 1.5 * mean(kernel)) * (x.T @ upstream), "clipped"),
        (lambda kernel, x, upstream: (np.abs(kernel) >= 0.5 * mean(kernel)) * (x.T @ upstream), "stay 0"),
        (lambda kernel, x, upstream: upstream.T @ x, "transposed"),
        (lambda kernel, x, upstream: upstream @ kernel.T, "gradient of x"),
        (lambda kernel, x, upstream: x.T @ upstream / len(x), "add up"),
        (lambda kernel, x, upstream: kernel, "expected"),
    ],
    "bit_linear": [
        (layer_with(axis=None), "each has its own"),
        (layer_with(axis=0), "one for each input"),
        (layer_with(steps=128), "128"),
        (layer_with(weights=lambda kernel: kernel), "not made ternary"),
        (layer_with(weights=lambda kernel: ternarize_by_rounding(kernel) / mean(kernel)), "γ is forgotten"),
        (lambda x, kernel: x @ ternarize_by_rounding(kernel), "not rounded"),
        (lambda x, kernel: np.array(layer_by_codes(x, kernel)) / np.abs(x).max(1, keepdims=True) * 127, "forgotten"),
        (lambda x, kernel: x @ kernel, "unquantized"),
        (lambda x, kernel: np.zeros((len(x), kernel.shape[1])), "expected"),
    ],
}  # fmt: skip


class TestLesson10(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_10", "packed_gigabytes_by_hand", RIGHT, WRONG


def test_the_gigabytes_by_hand_are_those_of_the_packed_codes(capsys):
    from gemma_lora.quantization.ternary import pack_ternary

    for answer in (0.4, 2e9 * pack_ternary(np.zeros(1000, int)).nbytes / 1000 / 1e9):
        assert "✓" in said_by(capsys, "packed_gigabytes_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (0.5, "two bits"),
        (0.25, "one bit"),
        (2e9 * np.log2(3) / 8e9, "limit"),
        (3.2, "gigabits"),
        (2, "a byte a weight"),
        (0.3725, "GiB"),
        (7, "how many bytes"),
        ("x", "number"),
    ],
)
def test_a_wrong_number_of_gigabytes_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "packed_gigabytes_by_hand", answer)
    assert "✗" in text and said in text
