"""Lesson 06's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import math

import numpy as np
import pytest

from tests.checker_rules import CheckerRules, said_by


def relu(values):
    return values * (values > 0)


def adapter_by_product(h, down_kernel, down_bias, up_kernel, up_bias):
    return h + relu(h @ down_kernel + down_bias) @ up_kernel + up_bias


def adapter_by_einsum(h, down_kernel, down_bias, up_kernel, up_bias):
    middle = np.clip(np.einsum("td,dm->tm", h, down_kernel) + down_bias[None], 0, None)
    h += np.einsum("tm,md->td", middle, up_kernel)  # in place, in the checker's copy
    return (h + up_bias).tolist()


def adapter_with(residual=1, middle=relu, end=lambda x: x, biases=(1, 1)):
    def function(h, down_kernel, down_bias, up_kernel, up_bias):
        inner = middle(h @ down_kernel + biases[0] * down_bias)
        return residual * h + end(inner @ up_kernel + biases[1] * up_bias)

    return function


def bottleneck_by_division(width, adapters, budget):
    return (budget // adapters - width) // (2 * width + 1)


def bottleneck_by_search(width, adapters, budget):
    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        fits = adapters * (width * (2 * middle + 1) + middle) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return np.int64(low)


def merged_by_formula(kernel, bias, down_kernel, down_bias, up_kernel, up_bias):
    merged = kernel + kernel @ down_kernel @ up_kernel
    return np.vstack([merged, bias + bias @ down_kernel @ up_kernel + down_bias @ up_kernel + up_bias])


def merged_by_homogeneous_matrices(kernel, bias, down_kernel, down_bias, up_kernel, up_bias):
    def lifted(matrix, row):
        corner = np.zeros((len(matrix) + 1, 1))
        corner[-1] = 1
        return np.hstack([np.vstack([matrix, row]), corner])

    eye = np.eye(len(bias))
    second = lifted(eye + down_kernel @ up_kernel, down_bias @ up_kernel + up_bias)
    return (lifted(kernel, bias) @ second)[:, :-1]


def merged_with(kernel_of, bias_of=None):
    def function(kernel, bias, down_kernel, down_bias, up_kernel, up_bias):
        update = down_kernel @ up_kernel
        right = bias + bias @ update + down_bias @ up_kernel + up_bias
        new_bias = bias_of(bias, update, down_bias @ up_kernel, up_bias) if bias_of else right
        return np.vstack([kernel_of(kernel, update), new_bias])

    return function


def series(kernel, update):
    return kernel + kernel @ update


def norm(h):
    return h / np.linalg.norm(h, axis=1, keepdims=True) * math.sqrt(h.shape[1])


def step_by_arrays(x, kernel, scale, down_kernel, up_kernel):
    h = x @ kernel
    h = h + relu(h @ down_kernel) @ up_kernel
    return x + norm(h) * scale


def step_by_parts(x, kernel, scale, down_kernel, up_kernel):
    def adapter(h):
        return h + np.maximum(0, h @ down_kernel) @ up_kernel

    def post_norm(h):
        return scale * h / np.sqrt((h**2).mean(axis=-1, keepdims=True))

    return [row + post_norm(adapter((row @ kernel)[None]))[0] for row in x]


#: Exercise -> two right functions, written differently.
RIGHT = {
    "bottleneck_adapter": [adapter_by_product, adapter_by_einsum],
    "largest_bottleneck": [bottleneck_by_division, bottleneck_by_search],
    "merged_layer": [merged_by_formula, merged_by_homogeneous_matrices],
    "adapted_step": [step_by_arrays, step_by_parts],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "bottleneck_adapter": [
        (adapter_with(residual=0), "residual is left out"),
        (adapter_with(middle=lambda x: x), "ReLU is left out"),
        (adapter_with(middle=lambda x: x, end=relu), "belongs in the middle"),
        (adapter_with(end=relu), "second ReLU"),
        (adapter_with(biases=(0, 1)), "down_bias is left out"),
        (adapter_with(biases=(1, 0)), "up_bias is left out"),
        (adapter_with(biases=(0, 0)), "both biases"),
        (adapter_with(residual=2), "twice"),
        (adapter_with(middle=np.tanh), "expected"),
        (lambda h, down_kernel, down_bias, up_kernel, up_bias: h @ up_kernel, "raised ValueError"),
        (lambda h, down_kernel, down_bias, up_kernel, up_bias: relu(h @ down_kernel + down_bias), "expected"),
    ],
    "largest_bottleneck": [
        (lambda width, adapters, budget: budget // (2 * adapters * width), "biases are left out"),
        (lambda width, adapters, budget: budget // (adapters * (2 * width + 1)), "bias in the middle"),
        (lambda width, adapters, budget: (budget - adapters * width) // (2 * adapters * width), "behind the up"),
        (lambda width, adapters, budget: bottleneck_by_division(width, 1, budget), "one adapter"),
        (lambda width, adapters, budget: (budget // adapters - width) // (width + 1), "one kernel"),
        (lambda width, adapters, budget: bottleneck_by_division(width, adapters, budget) + 1, "over the budget"),
        (lambda width, adapters, budget: round((budget / adapters - width) / (2 * width + 1)), "rounded"),
        (lambda width, adapters, budget: (budget / adapters - width) / (2 * width + 1), "integer"),
        (lambda width, adapters, budget: width // 2, "expected"),
    ],
    "merged_layer": [
        (merged_with(lambda w, u: w + u @ w), "turned round"),
        (merged_with(lambda w, u: w @ u), "residual is left out"),
        (merged_with(lambda w, u: w + u), "as LoRA's is"),
        (merged_with(series, lambda b, u, moved, up: b + moved + up), "old bias does not pass"),
        (merged_with(series, lambda b, u, moved, up: b + b @ u + up), "down_bias is left out"),
        (merged_with(series, lambda b, u, moved, up: b + b @ u + moved), "up_bias is left out"),
        (merged_with(series, lambda b, u, moved, up: moved + up), "old bias is left out"),
        (merged_with(lambda w, u: w), "kernel is not changed"),
        (lambda **case: merged_by_formula(**case)[:-1], "expected"),
        (lambda **case: merged_by_formula(**case).T, "expected"),
    ],
    "adapted_step": [
        (
            lambda x, kernel, scale, down_kernel, up_kernel: x
            + adapter_with()(norm(x @ kernel) * scale, down_kernel, 0, up_kernel, 0),
            "behind the post-norm",
        ),
        (
            lambda x, kernel, scale, down_kernel, up_kernel: adapter_with()(
                x + norm(x @ kernel) * scale, down_kernel, 0, up_kernel, 0
            ),
            "after the sum",
        ),
        (
            lambda x, kernel, scale, down_kernel, up_kernel: x
            + norm(x @ kernel + relu(x @ down_kernel) @ up_kernel) * scale,
            "beside the sub-layer",
        ),
        (
            lambda x, kernel, scale, down_kernel, up_kernel: x
            + norm((x + relu(x @ down_kernel) @ up_kernel) @ kernel) * scale,
            "before the sub-layer",
        ),
        (lambda x, **rest: step_by_arrays(x, **rest) - x, "stream x is not added"),
        (
            lambda x, kernel, scale, down_kernel, up_kernel: x
            + x @ kernel
            + relu(x @ kernel @ down_kernel) @ up_kernel,
            "post-norm is left out",
        ),
        (lambda x, scale, **rest: step_by_arrays(x, scale=np.ones_like(scale), **rest), "scale is left out"),
        (lambda x, kernel, scale, down_kernel, up_kernel: x + norm(x @ kernel) * scale, "no adapter"),
        (lambda x, scale, **rest: step_by_arrays(x, scale=1 + scale, **rest), "expected"),
    ],
}  # fmt: skip


class TestLesson06(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_06", "adapter_count_by_hand", RIGHT, WRONG


def test_the_count_by_hand_is_that_of_real_arrays(capsys):
    shapes = [(640, 8), (8,), (8, 640), (640,)]
    count = 36 * sum(np.zeros(shape).size for shape in shapes)
    for answer in (count, float(count), np.int64(count)):
        assert "✓" in said_by(capsys, "adapter_count_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (10_888, "one adapter"),
        (195_984, "one adapter a block"),
        (21_776, "one block"),
        (368_640, "biases are left out"),
        (207_648, "one of the two kernels"),
        (368_928, "behind the up-projection"),
        (391_680, "bias in the middle"),
        (7, "2·m·d"),
        ("many", "a number is needed"),
    ],
)
def test_a_wrong_count_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "adapter_count_by_hand", answer)
    assert "✗" in text and said in text
