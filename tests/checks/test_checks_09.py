"""Lesson 09's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import math

import numpy as np
import pytest

from gemma_lora.gemma import memory
from tests.checker_rules import CheckerRules, said_by


def widest_by_filter(linear, rest, widths, memory):
    return max(filter(lambda width: rest + linear * width / 8 <= memory, widths), default=0)


def widest_by_division(linear, rest, widths, memory):
    most = 8 * (memory - rest) / linear
    return next((width for width in sorted(widths, reverse=True) if width <= most), 0.0)


def first_that_fits(linear, rest, widths, memory):
    return next((width for width in widths if rest + linear * width / 8 <= memory), 0)


def share_by_sums(before, update, after):
    return ((after - before) * update).sum() / (update**2).sum()


def share_by_least_squares(before, update, after):
    return np.linalg.lstsq(update.reshape(-1, 1), (after - before).ravel())[0][0]


def kept(rises, sizes, budget, *, key=lambda rise, size: -rise / size, bits=12, stop=False):
    result = [False] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: key(rises[i], sizes[i])):
        cost = sizes[i] * bits / 8
        if cost <= budget:
            budget -= cost
            result[i] = True
        elif stop:
            break
    return result


def kept_by_array(rises, sizes, budget):
    wide = np.zeros(len(sizes), bool)
    for i in np.argsort(sizes / rises):
        wide[i] = True
        if (sizes[wide] * 1.5).sum() > budget:
            wide[i] = False
    return wide


def rounded(weight, step):
    return np.round(weight / step) * step


def beside(x, weight, lora_a, lora_b, scaling, step):
    return x @ rounded(weight, step) + scaling * (x @ lora_a) @ lora_b


def merged_into_floats(x, weight, lora_a, lora_b, scaling, step):
    return x @ (rounded(weight, step) + scaling * lora_a @ lora_b)


def apart_by_root(share, other, lines):
    return (other - share) / math.sqrt((share * (1 - share) + other * (1 - other)) / lines)


def apart_by_hypot(share, other, lines):
    errors = [np.sqrt(p * (1 - p) / lines) for p in (share, other)]
    return np.subtract(other, share) / np.hypot(*errors)


#: Exercise -> two right functions, written differently.
RIGHT = {
    "widest_that_fits": [widest_by_filter, widest_by_division],
    "surviving_share": [share_by_sums, share_by_least_squares],
    "keep_wide": [kept, kept_by_array],
    "deployed_output": [beside, merged_into_floats],
    "standard_errors_apart": [apart_by_root, apart_by_hypot],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "widest_that_fits": [
        (lambda linear, rest, widths, memory: widest_by_filter(8 * linear, rest, widths, memory), "counted as bytes"),
        (lambda rest, **others: widest_by_filter(rest=0, **others), "`rest` is left out"),
        (first_that_fits, "in no order"),
        (lambda linear, rest, widths, memory: max(widths), "fits or not"),
        (lambda widths, **rest: widest_by_filter(widths=widths, **rest) or min(widths), "0 is asked for"),
        (
            lambda linear, rest, widths, memory: max((w for w in widths if rest + linear * w / 8 < memory), default=0),
            "to the last byte",
        ),
        (
            lambda linear, rest, widths, memory: min((w for w in widths if rest + linear * w / 8 <= memory), default=0),
            "the narrowest that fits",
        ),
        (lambda linear, rest, widths, memory: 4.0, "expected"),
    ],
    "surviving_share": [
        (lambda before, update, after: (after * update).sum() / (update**2).sum(), "not taken off"),
        (
            lambda before, update, after: np.linalg.norm(after - before - update) / np.linalg.norm(update),
            "what is off",
        ),
        (lambda before, update, after: np.linalg.norm(after - before) / np.linalg.norm(update), "whatever direction"),
        (
            lambda before, update, after: (
                ((after - before) * update).sum() / np.linalg.norm(update) / np.linalg.norm(after - before)
            ),
            "cosine",
        ),
        (lambda before, update, after: ((after - before) * update).sum() / np.linalg.norm(update), "by its square"),
        (lambda before, update, after: share_by_sums(after, update, before), "reversed"),
        (lambda before, update, after: 1 - share_by_sums(before, update, after), "expected"),
    ],
    "keep_wide": [
        (lambda **case: kept(**case, key=lambda rise, size: -rise), "order is that of the rises"),
        (lambda **case: kept(**case, key=lambda rise, size: size), "smallest tensor"),
        (lambda **case: kept(**case, key=lambda rise, size: rise / size), "smallest rise"),
        (lambda **case: kept(**case, stop=True), "stop at the first"),
        (lambda **case: kept(**case, bits=96), "cost in bits"),
        (lambda **case: kept(**case, bits=16), "16 bits are paid"),
        (lambda **case: np.logical_not(kept(**case)), "other way round"),
        (lambda rises, sizes, budget: np.ones(len(sizes), bool), "expected"),
    ],
    "deployed_output": [
        (
            lambda x, weight, lora_a, lora_b, scaling, step: x @ rounded(weight + scaling * lora_a @ lora_b, step),
            "that is the bug",
        ),
        (
            lambda x, weight, lora_a, lora_b, scaling, step: (
                x @ rounded(rounded(weight, step) + scaling * lora_a @ lora_b, step)
            ),
            "kept in floats",
        ),
        (lambda step, **rest: beside(step=1e-9, **rest), "not trained on"),
        (lambda scaling, **rest: beside(scaling=1, **rest), "scaling is left out"),
        (lambda scaling, **rest: beside(scaling=0, **rest), "update is left out"),
        (
            lambda x, weight, lora_a, lora_b, scaling, step: (
                x @ (rounded(weight, step) + rounded(scaling * lora_a @ lora_b, step))
            ),
            "kept in floats",
        ),
        (lambda x, **rest: x, "expected"),
    ],
    "standard_errors_apart": [
        (lambda share, other, lines: (other - share) / np.sqrt(share * (1 - share) / lines), "only the first"),
        (lambda share, other, lines: (other - share) / np.sqrt(other * (1 - other) / lines), "only the second"),
        (lambda share, other, lines: apart_by_root(share, other, 1), "number of lines"),
        (lambda share, other, lines: (other - share) / ((share - share**2 + other - other**2) / lines), "variances"),
        (lambda **case: -apart_by_root(**case), "reversed"),
        (lambda **case: abs(apart_by_root(**case)), "sign is lost"),
        (lambda share, other, lines: other - share, "divide it by"),
        (lambda **case: 100 * apart_by_root(**case), "percent"),
        (lambda **case: 2 * apart_by_root(**case), "expected"),
    ],
}  # fmt: skip


class TestLesson09(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_09", "packed_megabytes_by_hand", RIGHT, WRONG


def test_the_megabytes_by_hand_are_those_of_the_models_shape(capsys):
    linear = memory.linear_parameters(memory.CONFIGURATIONS["gemma3_1b"])
    exact = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert exact == 359_953_776
    for answer in (exact / 1e6, 360, np.float32(359.95), "360"):
        assert "✓" in said_by(capsys, "packed_megabytes_by_hand", answer)
    assert "✗" in said_by(capsys, "packed_megabytes_by_hand", 361)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (348.88, "codes alone"),
        (392.5, "scales of 32 bits"),
        (2879.6, "megabits"),
        (13.84, "one block"),
        (2791.05, "four bytes"),
        (1395.5, "16 bits a weight"),
        (343.3, "MiB"),
        (662.99, "embedding"),
        (698, "a byte a weight"),
        (5, "8 bits a byte"),
        ("few", "a number"),
        (float("nan"), "✗"),
        (float("inf"), "✗"),
    ],
)
def test_wrong_megabytes_by_hand_get_a_hint(capsys, answer, said):
    text = said_by(capsys, "packed_megabytes_by_hand", answer)
    assert "✗" in text and said in text
