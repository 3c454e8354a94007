"""Checkers of lesson 06's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 6


def adapter_count_by_hand(answer: int | None) -> None:
    """Checks the numbers in all adapters of bottleneck 8 in Gemma 3 270M.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    d, m, blocks = 640, 8, 18
    right = 2 * blocks * (2 * m * d + d + m)
    slips: dict[float, str] = {
        2 * m * d + d + m: "that is one adapter; every block has two, and there are 18 blocks",
        right // 2: "that is one adapter a block; there are two",
        right // blocks: "that is one block; there are 18",
        2 * blocks * 2 * m * d: "the biases are left out: d and m more in each adapter",
        2 * blocks * (m * d + d + m): "only one of the two kernels is counted",
        2 * blocks * (2 * m * d + m): "the bias behind the up-projection, d numbers, is left out",
        2 * blocks * (2 * m * d + d): "the bias in the middle, m numbers, is left out",
    }
    praise = f"{right:,} numbers, {right / 268_098_176:.2%} of the model."
    hint = "an adapter holds 2·m·d + d + m numbers; there are two in each of 18 blocks"
    number_verdict("adapter_count_by_hand", answer, right, praise, slips, hint)


def bottleneck_adapter(function: Callable) -> None:
    """Checks `function(h, down_kernel, down_bias, up_kernel, up_bias)`: a ReLU adapter's output, (T, d)."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        t, m = (int(n) for n in rng.integers(2, 4, 2))
        d = m + int(rng.integers(1, 3))
        names = ("h", "down_kernel", "down_bias", "up_kernel", "up_bias")
        shapes = ((t, d), (d, m), (m,), (m, d), (d,))
        cases.append({name: rng.normal(size=shape).round(2) for name, shape in zip(names, shapes, strict=True)})

    def right(h, down_kernel, down_bias, up_kernel, up_bias):
        rows = []
        for row in h:  # a token at a time, a middle feature at a time
            row_out = row + up_bias
            for i in range(len(down_bias)):
                row_out = row_out + max(0.0, float(row @ down_kernel[:, i] + down_bias[i])) * up_kernel[i]
            rows.append(row_out)
        return np.array(rows)

    def changed(residual=1.0, inner=_relu, outer=_linear, with_down_bias=1.0, with_up_bias=1.0):
        def slip(h, down_kernel, down_bias, up_kernel, up_bias):
            middle = inner(h @ down_kernel + with_down_bias * down_bias)
            return residual * h + outer(middle @ up_kernel + with_up_bias * up_bias)

        return slip

    def around_all(h, down_kernel, down_bias, up_kernel, up_bias):
        return _relu(h + (h @ down_kernel + down_bias) @ up_kernel + up_bias)

    slips = {
        "the residual is left out: h itself is not added": changed(residual=0.0),
        "the ReLU is left out": changed(inner=_linear),
        "the ReLU stands behind the up-projection; it belongs in the middle": changed(inner=_linear, outer=_relu),
        "there is a second ReLU, behind the up-projection": changed(outer=_relu),
        "the ReLU stands around everything; it belongs in the middle": around_all,
        "down_bias is left out": changed(with_down_bias=0.0),
        "up_bias is left out": changed(with_up_bias=0.0),
        "both biases are left out": changed(with_down_bias=0.0, with_up_bias=0.0),
        "the residual is added twice": changed(residual=2.0),
    }
    verdict("bottleneck_adapter", function, cases, right, slips)


def largest_bottleneck(function: Callable) -> None:
    """Checks `function(width, adapters, budget)`: the largest m at which all adapters hold at most `budget` numbers."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(16):
        width, adapters, m = int(rng.integers(4, 700)), int(rng.integers(2, 50)), int(rng.integers(2, 40))
        more = int(rng.integers(0, adapters * (2 * width + 1)))  # less than one more feature costs
        cases.append({"width": width, "adapters": adapters, "budget": adapters * (2 * m * width + width + m) + more})
    cases += [{"width": 640, "adapters": 36, "budget": 737_280}, {"width": 5, "adapters": 3, "budget": 3 * 16}]
    cases += [{"width": 5, "adapters": 3, "budget": 3 * 27 - 1}]
    cases += [{"width": 5, "adapters": 4, "budget": 4 * 38 + 23}]  # here rounding and a bias left out part ways

    def right(width, adapters, budget):
        m = 0
        while sum(2 * (m + 1) * width + width + (m + 1) for _ in range(adapters)) <= budget:
            m += 1
        return m

    slips = {
        "the biases are left out": lambda width, adapters, budget: budget // (adapters * 2 * width),
        "only the bias in the middle is counted": lambda width, adapters, budget: (
            budget // (adapters * (2 * width + 1))
        ),
        "only the bias behind the up-projection is counted": lambda width, adapters, budget: (
            (budget - adapters * width) // (adapters * 2 * width)
        ),
        "one adapter is counted; the budget is for all of them": lambda width, adapters, budget: (
            (budget - width) // (2 * width + 1)
        ),
        "one kernel is counted; an adapter has two": lambda width, adapters, budget: (
            (budget // adapters - width) // (width + 1)
        ),
        "the next bottleneck is returned; it is over the budget": lambda width, adapters, budget: (
            right(width, adapters, budget) + 1
        ),
        "the quotient is rounded, not taken down": lambda width, adapters, budget: round(
            (budget / adapters - width) / (2 * width + 1)
        ),
        "the quotient itself is returned; a bottleneck is an integer": lambda width, adapters, budget: (
            (budget / adapters - width) / (2 * width + 1)
        ),
    }
    verdict("largest_bottleneck", function, cases, right, slips)


def merged_layer(function: Callable) -> None:
    """Checks `function(kernel, bias, down_kernel, down_bias, up_kernel, up_bias)`: one layer for a linear adapter.

    The answer is the merged kernel (d_in, d) with the merged bias (d,) as a last row, (d_in + 1, d).
    """
    rng = np.random.default_rng(_SEED)
    names = ("kernel", "bias", "down_kernel", "down_bias", "up_kernel", "up_bias")
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        d, m = int(rng.integers(3, 5)), int(rng.integers(1, 3))
        shapes = ((d, d), (d,), (d, m), (m,), (m, d), (d,))  # square kernels, or a wrong order would not fit
        cases.append({name: rng.normal(size=shape).round(2) for name, shape in zip(names, shapes, strict=True)})

    def right(kernel, bias, down_kernel, down_bias, up_kernel, up_bias):
        def both(x):  # what the two layers do, asked at the origin and along each axis
            h = x @ kernel + bias
            return h + (h @ down_kernel + down_bias) @ up_kernel + up_bias

        at_zero = both(np.zeros(len(kernel)))
        return np.vstack([*(both(axis) - at_zero for axis in np.eye(len(kernel))), at_zero])

    def built(kernel_of, bias_of):
        def slip(kernel, bias, down_kernel, down_bias, up_kernel, up_bias):
            series = np.eye(len(bias)) + down_kernel @ up_kernel
            merged = kernel_of(kernel, series)
            return np.vstack([merged, bias_of(bias, series, down_bias @ up_kernel, up_bias)])

        return slip

    def whole(bias, series, moved, up_bias):
        return bias @ series + moved + up_bias

    slips = {
        "the order is turned round: x meets the kernel first, then the adapter": built(lambda w, s: s @ w, whole),
        "the residual is left out of the kernel": built(lambda w, s: w @ (s - np.eye(len(s))), whole),
        "the update is added to the kernel as LoRA's is; here it multiplies the kernel": built(
            lambda w, s: w + s - np.eye(len(s)), whole
        ),
        "the old bias does not pass through the adapter": built(np.matmul, lambda b, s, moved, up: b + moved + up),
        "down_bias is left out": built(np.matmul, lambda b, s, moved, up: b @ s + up),
        "up_bias is left out": built(np.matmul, lambda b, s, moved, up: b @ s + moved),
        "the old bias is left out": built(np.matmul, lambda b, s, moved, up: moved + up),
        "the kernel is not changed": built(lambda w, s: w, whole),
    }
    verdict("merged_layer", function, cases, right, slips)


def adapted_step(function: Callable) -> None:
    """Checks `function(x, kernel, scale, down_kernel, up_kernel)`: the stream after a sub-layer with an adapter.

    The sub-layer is `x @ kernel`, the adapter a ReLU adapter without biases, the post-norm an RMSNorm without epsilon
    times `scale`.
    """
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    while len(cases) < 20:
        t, d, m = 2, int(rng.integers(3, 5)), int(rng.integers(1, 3))
        names = ("x", "kernel", "scale", "down_kernel", "up_kernel")
        shapes = ((t, d), (d, d), (d,), (d, m), (m, d))
        case = {name: rng.normal(size=shape).round(2) for name, shape in zip(names, shapes, strict=True)}
        reads = (case["x"] @ case["kernel"] @ case["down_kernel"], case["x"] @ case["down_kernel"])
        if all((read > 0).any() for read in reads):  # else the adapter would be silent
            cases.append(case)

    def adapt(h, down_kernel, up_kernel):
        return h + _relu(h @ down_kernel) @ up_kernel

    def right(x, kernel, scale, down_kernel, up_kernel):
        rows = []
        for row in x:
            h = adapt(row @ kernel, down_kernel, up_kernel)
            rows.append(row + h / np.sqrt(np.dot(h, h) / len(h)) * scale)
        return np.array(rows)

    def after_norm(x, kernel, scale, down_kernel, up_kernel):
        return x + adapt(_norm(x @ kernel) * scale, down_kernel, up_kernel)

    def after_sum(x, kernel, scale, down_kernel, up_kernel):
        return adapt(x + _norm(x @ kernel) * scale, down_kernel, up_kernel)

    def parallel(x, kernel, scale, down_kernel, up_kernel):
        return x + _norm(x @ kernel + _relu(x @ down_kernel) @ up_kernel) * scale

    def first(x, kernel, scale, down_kernel, up_kernel):
        return x + _norm(adapt(x, down_kernel, up_kernel) @ kernel) * scale

    def no_inner_residual(x, kernel, scale, down_kernel, up_kernel):
        return x + _norm(_relu(x @ kernel @ down_kernel) @ up_kernel) * scale

    slips: dict[str, Callable] = {
        "the adapter stands behind the post-norm; it comes before": after_norm,
        "the adapter works on the stream, after the sum": after_sum,
        "the adapter reads x, beside the sub-layer; it reads the sub-layer's output": parallel,
        "the adapter stands before the sub-layer": first,
        "the adapter's own residual is left out": no_inner_residual,
        "the stream x is not added": lambda x, **rest: right(x, **rest) - x,
        "the post-norm is left out": lambda x, kernel, scale, down_kernel, up_kernel: (
            x + adapt(x @ kernel, down_kernel, up_kernel)
        ),
        "the post-norm's scale is left out": lambda x, kernel, scale, down_kernel, up_kernel: (
            x + _norm(adapt(x @ kernel, down_kernel, up_kernel))
        ),
        "there is no adapter": lambda x, kernel, scale, down_kernel, up_kernel: x + _norm(x @ kernel) * scale,
    }
    verdict("adapted_step", function, cases, right, slips)


def _relu(values):
    return np.maximum(values, 0)


def _linear(values):
    return values


def _norm(rows):
    squares = np.mean(np.square(rows), axis=-1, keepdims=True)
    return rows / np.sqrt(np.maximum(squares, 1e-30))  # a row of zeros, in a slip, stays zeros
