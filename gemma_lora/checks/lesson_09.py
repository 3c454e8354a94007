"""Checkers of lesson 09's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 9


def packed_megabytes_by_hand(answer: float | None) -> None:
    """Checks the megabytes (10⁶ bytes), to whole ones, of Gemma 3 1B's linear layers in NF4 with double quantization.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    slips: dict[float, str] = {
        349: "those are the codes alone; each 64 weights share a scale of 8 bits",
        392: "that is NF4 with scales of 32 bits; double quantization keeps them in 8",
        2880: "those are megabits; a byte has eight",
        14: "that is one block; there are 26",
        2791: "that is four bytes a weight; here a weight takes about four bits",
        1396: "that is 16 bits a weight; here it takes about four",
        343: "that is in MiB, of 2²⁰ bytes; a MB has 10⁶",
        663: "that is with the embedding, which is no linear layer",
        698: "that is a byte a weight; a code takes half a byte",
    }
    praise = "697,761,792 weights · (4 + 8/64 + 32/(64 · 256)) / 8 = 359,953,776 bytes."
    hint = "26 · (weights of a block's seven matrices) · (4 + 8/64 + 32/(64 · 256)) bits, and 8 bits a byte"
    number_verdict("packed_megabytes_by_hand", _whole(answer), 360, praise, slips, hint)


def _whole(answer: Any) -> Any:
    """The number rounded to a whole one; what is no number stays what it is."""
    if isinstance(answer, type(...)):
        return answer
    try:
        return round(float(answer))
    except (TypeError, ValueError, OverflowError):
        return answer


def widest_that_fits(function: Callable) -> None:
    """Checks `function(linear, rest, widths, memory)`: the most bits a weight with which everything fits; else 0.

    `linear` counts the weights that can be packed, `rest` and `memory` are bytes, `widths` bits a weight.
    """
    rng = np.random.default_rng(_SEED)
    ladder = [32.0, 16.0, 8.0, 4.5, 4.125, 0.0]
    cases: list[dict[str, Any]] = []
    for number in range(20):
        linear, rest = 8000 * int(rng.integers(10_000, 500_000)), 1000 * int(rng.integers(500_000, 4_000_000))
        place = number % 6  # the width that fits; the last of them: none does
        between = 0.0 if number in (1, 8) else float(rng.uniform(0.1, 0.9))  # twice it fits to the last byte
        above = ladder[place - 1] if place else 40.0
        least = ladder[place] if place < 5 else 3.0
        above = above if place < 5 else 4.0
        memory = rest + math.ceil(linear * (least + between * (above - least)) / 8)
        widths = [float(width) for width in rng.permutation(ladder[:5])]
        cases.append({"linear": linear, "rest": rest, "widths": widths, "memory": memory})

    def right(linear, rest, widths, memory):
        return max([width for width in widths if 8 * (memory - rest) >= linear * width], default=0)

    def chosen(fits, choose=max):
        return lambda linear, rest, widths, memory: choose(
            [width for width in widths if fits(linear, rest, width, memory)], default=0
        )

    slips = {
        "bits are counted as bytes; a byte has eight": chosen(lambda n, rest, w, m: rest + n * w <= m),
        "`rest` is left out": chosen(lambda n, rest, w, m: n * w / 8 <= m),
        "the narrowest that fits is returned, not the widest": chosen(lambda n, rest, w, m: rest + n * w / 8 <= m, min),
        "the first that fits is returned; `widths` are in no order": lambda linear, rest, widths, memory: next(
            (width for width in widths if rest + linear * width / 8 <= memory), 0
        ),
        "what fills the memory to the last byte is refused; it fits": chosen(
            lambda n, rest, w, m: rest + n * w / 8 < m
        ),
        "the widest is returned, whether it fits or not": lambda linear, rest, widths, memory: max(widths),
        "the narrowest is returned where nothing fits; 0 is asked for": lambda linear, rest, widths, memory: (
            right(linear, rest, widths, memory) or min(widths)
        ),
    }
    verdict("widest_that_fits", function, cases, right, slips)


def surviving_share(function: Callable) -> None:
    """Checks `function(before, update, after)`: Σ (after − before) · update / Σ update², a number."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        shape = tuple(int(side) for side in rng.integers(2, 4, 2))
        before, update = rng.normal(size=shape).round(1), rng.normal(0, 0.3, shape).round(2)
        update[update == 0] = 0.25  # a slip divides by each
        moved = float(rng.uniform(0, 1)) * update + rng.normal(0, 0.1, shape)
        cases.append({"before": before, "update": update, "after": (before + moved).round(2)})

    def right(before, update, after):
        along = sum(float(a - b) * float(u) for a, b, u in zip(after.flat, before.flat, update.flat, strict=True))
        return along / sum(float(u) ** 2 for u in update.flat)

    slips = {
        "`before` is not taken off: the weights' own size is in it": lambda before, update, after: (
            (after * update).sum() / (update**2).sum()
        ),
        "that is what is off, as a share of the update; asked is what survives": lambda before, update, after: (
            np.linalg.norm(after - before - update) / np.linalg.norm(update)
        ),
        "how far the weights moved is counted, in whatever direction": lambda before, update, after: (
            np.linalg.norm(after - before) / np.linalg.norm(update)
        ),
        "that is the cosine; divide by the update's squares alone": lambda before, update, after: (
            ((after - before) * update).sum() / np.linalg.norm(after - before) / np.linalg.norm(update)
        ),
        "the sum is divided by the update's length, not by its square": lambda before, update, after: (
            ((after - before) * update).sum() / np.linalg.norm(update)
        ),
        "the sign is reversed: after less before": lambda before, update, after: -right(before, update, after),
        "each weight has a ratio of its own, and these are averaged; small updates then count as much as large": (
            lambda before, update, after: np.mean((after - before) / update)
        ),
    }
    verdict("surviving_share", function, cases, right, slips)


def keep_wide(function: Callable) -> None:
    """Checks `function(rises, sizes, budget)`: a boolean a tensor, True where it stays in 16 bits.

    From the largest rise a weight down, a tensor stays if its 12 further bits a weight fit what is left of `budget`, in
    bytes.
    """
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        count = int(rng.integers(3, 6))
        sizes = 2 * rng.integers(100, 5000, count)
        share = float(rng.uniform(0.25, 0.75))
        rises = rng.permutation(np.linspace(0.01, 0.5, 40))[:count].round(3)
        cases.append({"rises": rises, "sizes": sizes, "budget": int(share * 1.5 * sizes.sum())})

    def greedy(order_of, bits=12.0, unit=8.0, stop=False):
        def choose(rises, sizes, budget):
            left, kept = float(budget), np.zeros(len(sizes), bool)
            for i in order_of(np.asarray(rises, float), np.asarray(sizes, float)):
                cost = bits / unit * float(sizes[i])
                if cost <= left:
                    kept[i], left = True, left - cost
                elif stop:
                    break
            return kept

        return choose

    def by_rise_a_weight(rises, sizes):
        return sorted(range(len(sizes)), key=lambda i: -rises[i] / sizes[i])

    right = greedy(by_rise_a_weight)
    slips = {
        "the order is that of the rises; a large tensor also costs more": greedy(lambda r, s: np.argsort(-r)),
        "the order is from the smallest tensor, whatever it brings": greedy(lambda r, s: np.argsort(s)),
        "the order begins with the smallest rise a weight": greedy(lambda r, s: np.argsort(r / s)),
        "you stop at the first that does not fit; a later, smaller one may": greedy(by_rise_a_weight, stop=True),
        "the budget is in bytes, the cost in bits": greedy(by_rise_a_weight, unit=1.0),
        "16 bits are paid for; four of them are there anyway": greedy(by_rise_a_weight, bits=16.0),
        "the answer is the other way round: True is what stays in 16 bits": lambda rises, sizes, budget: (
            ~right(rises, sizes, budget)
        ),
    }
    verdict("keep_wide", function, cases, right, slips)


def deployed_output(function: Callable) -> None:
    """Checks `function(x, weight, lora_a, lora_b, scaling, step)`: the output of the model that was trained.

    The frozen weights are those rounded to multiples of `step`; the update stands beside them.
    """
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        d_in, d_out, rank = 3, int(rng.integers(2, 4)), 2
        named: dict[str, Any] = {"x": rng.normal(size=(2, d_in)).round(2), "weight": rng.normal(size=(d_in, d_out))}
        named["weight"] = named["weight"].round(2) + 0.01
        named |= {"lora_a": rng.normal(size=(d_in, rank)).round(2), "lora_b": rng.normal(size=(rank, d_out)).round(2)}
        cases.append(named | {"scaling": float(rng.integers(3, 6)) / 2, "step": float(rng.integers(5, 9)) / 10})

    def rounded(weight, step):
        return step * np.round(weight / step)

    def right(x, weight, lora_a, lora_b, scaling, step):
        frozen = np.array([[step * round(w / step) for w in row] for row in weight.tolist()])
        return np.einsum("ti,io->to", x, frozen) + scaling * np.einsum("ti,ir,ro->to", x, lora_a, lora_b)

    slips = {
        "the sum of weights and update is rounded: that is the bug": lambda x, weight, lora_a, lora_b, scaling, step: (
            x @ rounded(weight + scaling * lora_a @ lora_b, step)
        ),
        "the update stands beside weights it was not trained on: they were rounded first": (
            lambda x, weight, lora_a, lora_b, scaling, step: x @ (weight + scaling * lora_a @ lora_b)
        ),
        "the update is rounded, too, alone or with the rounded weights; it is kept in floats": (
            lambda x, weight, lora_a, lora_b, scaling, step: (
                x @ (rounded(weight, step) + rounded(scaling * lora_a @ lora_b, step))
            )
        ),
        "the scaling is left out": lambda x, weight, lora_a, lora_b, scaling, step: (
            x @ (rounded(weight, step) + lora_a @ lora_b)
        ),
        "the update is left out": lambda x, weight, lora_a, lora_b, scaling, step: x @ rounded(weight, step),
    }
    verdict("deployed_output", function, cases, right, slips)


def standard_errors_apart(function: Callable) -> None:
    """Checks `function(share, other, lines)`: (other − share) / √(share(1−share)/lines + other(1−other)/lines)."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        lines = int(rng.choice([50, 100, 200, 400]))
        first, second = (int(count) for count in rng.choice(np.arange(1, lines), 2, replace=False))
        cases.append({"share": first / lines, "other": second / lines, "lines": lines})

    def right(share, other, lines):
        variance = sum(p * (1 - p) / lines for p in (share, other))
        return (other - share) / variance**0.5

    def over(error):
        return lambda share, other, lines: (other - share) / error(share, other, lines)

    slips = {
        "only the first share's error is counted; both are uncertain": over(lambda p, q, n: (p * (1 - p) / n) ** 0.5),
        "only the second share's error is counted; both are uncertain": over(lambda p, q, n: (q * (1 - q) / n) ** 0.5),
        "nothing is divided by the number of lines": over(lambda p, q, n: (p * (1 - p) + q * (1 - q)) ** 0.5),
        "the root is missing: those are variances": over(lambda p, q, n: (p * (1 - p) + q * (1 - q)) / n),
        "the two errors are added; their squares are, and then the root is taken": over(
            lambda p, q, n: (p * (1 - p) / n) ** 0.5 + (q * (1 - q) / n) ** 0.5
        ),
        "one share, the mean of the two, is taken for both variances": over(
            lambda p, q, n: (2 * (p + q) / 2 * (1 - (p + q) / 2) / n) ** 0.5
        ),
        "the sign is reversed: `other` less `share`": lambda share, other, lines: -right(share, other, lines),
        "the sign is lost": lambda share, other, lines: abs(right(share, other, lines)),
        "the difference is returned; divide it by its standard error": lambda share, other, lines: other - share,
        "the shares are taken in percent": lambda share, other, lines: 100 * right(share, other, lines),
    }
    verdict("standard_errors_apart", function, cases, right, slips)
