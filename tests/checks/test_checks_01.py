"""Lesson 01's checkers: ✓ to right answers however they are written, the slip named for wrong ones, never an error."""

import numpy as np
import pytest

from gemma_lora.quantization.integers import dequantize, quantize
from tests.checker_rules import CheckerRules, said_by


def top(bits):
    return 2 ** (bits - 1) - 1


def parameters(low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return scale, int(np.rint(-low / scale))


def parameters_of_two_ends(low, high, bits):
    step = np.linspace(low, high, 2**bits)[1] - low
    return np.array([step, np.floor(-low / step + 0.5)])


def codes(x, bits):
    return np.rint(x * top(bits) / np.abs(x).max()).astype(int)


def codes_in_loops(x, bits):
    scale = max(x.max(), -x.min()) / top(bits)
    return [[round(value / scale) for value in row] for row in x.tolist()]


def scales(kernel, bits):
    return np.abs(kernel).max(0, keepdims=True) / top(bits)


def scales_of_columns(kernel, bits):
    return [[float(np.linalg.norm(column, np.inf)) / top(bits) for column in kernel.T]]


def round_trip(x, bits, block_size):
    blocks = x.reshape(-1, block_size)
    scale = np.abs(blocks).max(1, keepdims=True) / top(bits)
    return (np.rint(blocks / scale) * scale).reshape(x.shape)


def packed(shape, bits, block_size):
    return -(-shape[0] * shape[1] * bits // 8) + shape[0] * (shape[1] // block_size) * 2


def folded(kernel, mean, variance, gamma, beta):
    factor = gamma / np.sqrt(variance)
    return np.vstack([factor[:, None] * kernel, (beta - mean * factor) @ kernel])


def folded_with_diagonal(kernel, mean, variance, gamma, beta):
    weights = np.diag(gamma * variance**-0.5) @ kernel
    return np.concatenate([weights, (beta @ kernel - mean @ weights)[None]])


def without(part):
    """`fold_batch_norm` with one of its inputs at the value where it does nothing."""
    nothing = {"mean": 0.0, "gamma": 1.0, "beta": 0.0, "variance": 1.0}[part]

    def function(**case):
        return folded(**case | {part: np.full_like(case[part], nothing)})

    return function


#: Exercise -> right functions, written differently.
RIGHT = {
    "scale_and_zero_point": [parameters, parameters_of_two_ends],
    "symmetric_codes": [codes, codes_in_loops, lambda x, bits: quantize(x, bits).qvalue],
    "channel_scales": [scales, scales_of_columns, lambda kernel, bits: quantize(kernel, bits, axis=1).scale],
    "block_round_trip": [
        round_trip,
        lambda x, bits, block_size: dequantize(quantize(x, bits, block_size=block_size)),
    ],
    "packed_bytes": [
        packed,
        lambda shape, bits, block_size: np.ceil(np.prod(shape) * bits / 8) + 2 * np.prod(shape) / block_size,
    ],
    "fold_batch_norm": [folded, folded_with_diagonal],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "scale_and_zero_point": [
        (lambda low, high, bits: parameters(low, high + 2 * low, bits)[:1] + (0,), "expected"),
        (lambda low, high, bits: ((high + low) / (2**bits - 1), round(-low / (high + low) * (2**bits - 1))), "notes"),
        (lambda low, high, bits: ((high - low) / 2**bits, round(-low / (high - low) * 2**bits)), "one step fewer"),
        (lambda low, high, bits: (parameters(low, high, bits)[0], -parameters(low, high, bits)[1]), "wrong sign"),
        (lambda low, high, bits: (parameters(low, high, bits)[0], 0), "zero point is forgotten"),
        (lambda low, high, bits: (parameters(low, high, bits)[0], -low / parameters(low, high, bits)[0]), "whole"),
        (lambda low, high, bits: (max(-low, high) / top(bits), 0), "symmetric"),
        (lambda low, high, bits: parameters(low, high, 8), "8 bits"),
        (lambda low, high, bits: parameters(low, high, bits)[0], "expected"),
    ],
    "symmetric_codes": [
        (lambda x, bits: np.rint(x / (x.max() / top(bits))), "not max|x|"),
        (lambda x, bits: np.trunc(x / (np.abs(x).max() / top(bits)) * (1 + 1e-12)), "cut off"),
        (lambda x, bits: np.rint(x / np.abs(x).max() * 2 ** (bits - 1)), "one less"),
        (lambda x, bits: np.rint(x / np.abs(x).max() * (2**bits - 1)), "goes to the sign"),
        (lambda x, bits: codes(x, bits) * (np.abs(x).max() / top(bits)), "dequantized"),
        (lambda x, bits: codes(x, 8), "8 bits"),
        (lambda x, bits: np.stack([codes(row, bits) for row in x]), "every row"),
        (lambda x, bits: quantize(x, bits, symmetric=False).qvalue, "expected"),
    ],
    "channel_scales": [
        (lambda kernel, bits: scales(kernel.T, bits), "axes are exchanged"),
        (lambda kernel, bits: scales(kernel.T, bits).T, "axes are exchanged"),
        (lambda kernel, bits: np.full((1, kernel.shape[1]), np.abs(kernel).max() / top(bits)), "whole kernel"),
        (lambda kernel, bits: scales(kernel, bits)[0], "lost an axis"),
        (lambda kernel, bits: kernel.max(0, keepdims=True) / top(bits), "not of |x|"),
        (lambda kernel, bits: np.abs(kernel).max(0, keepdims=True) / (2**bits - 1), "goes to the sign"),
        (lambda kernel, bits: 1 / scales(kernel, bits), "Keras's"),
    ],
    "block_round_trip": [
        (lambda x, bits, block_size: dequantize(quantize(x, bits)), "whole array"),
        (lambda x, bits, block_size: dequantize(quantize(x, bits, axis=0)), "a row"),
        (lambda x, bits, block_size: dequantize(quantize(x, bits, axis=1)), "a column"),
        (lambda x, bits, block_size: quantize(x, bits, block_size=block_size).qvalue, "codes"),
        (lambda x, bits, block_size: x, "nothing is rounded"),
        (lambda x, bits, block_size: round_trip(x, bits + 1, block_size), "goes to the sign"),
        (
            lambda x, bits, block_size: np.array(
                [round_trip(row.reshape(block_size, -1).T.copy(), bits, block_size).T.ravel() for row in x]
            ),
            "side by side",
        ),
        (lambda x, bits, block_size: round_trip(x, bits, block_size).reshape(-1, block_size), "expected"),
    ],
    "packed_bytes": [
        (lambda shape, bits, block_size: np.prod(shape) * bits // 8, "scales are forgotten"),
        (lambda shape, bits, block_size: 8 * packed(shape, bits, block_size), "a byte has 8"),
        (lambda shape, bits, block_size: packed(shape, 8, block_size), "packed"),
        (lambda shape, bits, block_size: packed(shape, bits, block_size // 2), "4 bytes"),
        (lambda shape, bits, block_size: packed(shape, bits, shape[1]), "one scale a row"),
        (lambda shape, bits, block_size: np.prod(shape) * bits // 8 + 2 * shape[1] // block_size, "one row"),
    ],
    "fold_batch_norm": [
        (
            lambda kernel, mean, variance, gamma, beta: np.vstack(
                [
                    kernel * (gamma / np.sqrt(variance)),
                    (beta - mean * gamma / np.sqrt(variance)) @ kernel,
                ]
            ),
            "columns",
        ),
        (lambda variance, **case: folded(variance=variance**2, **case), "square root"),
        (without("mean"), "mean is not in the bias"),
        (lambda mean, **case: folded(mean=-mean, **case), "not taken away"),
        (without("gamma"), "gamma is forgotten"),
        (
            lambda kernel, mean, variance, gamma, beta: np.vstack(
                [folded(kernel, mean, variance, gamma, beta)[:-1], (beta - mean) @ kernel]
            ),
            "not scaled",
        ),
        (
            lambda kernel, mean, variance, gamma, beta: np.vstack(
                [folded(kernel, mean, variance, gamma, beta)[:-1], beta - mean * gamma / np.sqrt(variance)]
            ),
            "not sent through",
        ),
        (
            lambda kernel, mean, variance, gamma, beta: folded(kernel, 0 * mean, variance, gamma, 0 * beta),
            "bias is forgotten",
        ),
        (without("beta"), "expected"),
        (without("variance"), "expected"),
        (lambda **case: folded(**case)[:-1], "expected"),
    ],
}


class TestLesson01(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_01", "affine_by_hand", RIGHT, WRONG


@pytest.mark.parametrize("answer", [82, 82.0, np.uint8(82), round(100 / (510 / 255)) + 32])
def test_the_right_code_by_hand_passes(capsys, answer):
    assert "✓" in said_by(capsys, "affine_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (50, "still to be added"),
        (18, "not taken away"),
        (110, "length of the range"),
        (28, "symmetric"),
        (-46, "0 … 255"),
        (7, "scale = (high − low) / 255"),
        ("many", "a number is needed"),
    ],
)
def test_a_wrong_code_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "affine_by_hand", answer)
    assert "✗" in text and said in text
