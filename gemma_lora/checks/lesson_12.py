"""Checkers of lesson 12's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 12


def reported_loss_by_hand(answer: float | None) -> None:
    """Checks what Keras's default loss says of 40 positions, 8 with weight 1 and a mean loss of 2.5 nats.

    Args:
        answer: The number in nats, or None or `...` while there is none.
    """
    right = 8 * 2.5 / 40
    slips: dict[float, str] = {  # to two decimals
        2.5: "that is the mean over the positions with weight; Keras's default divides by all positions",
        20.0: "that is the sum; it is divided by the number of positions",
        0.2: "that is the share of positions with weight; their losses multiply it",
        0.31: "the sum of the losses is divided, not their mean, and by 40, not by 8",
        0.06: "all 8 positions add to the sum",
        12.5: "the 32 positions without weight add nothing",
        2.0: "the 8 positions with weight are the ones that add to the sum",
    }
    hint = "the losses of the 8 positions are summed, then divided by all 40"
    number_verdict("reported_loss_by_hand", answer, right, "8 · 2.5 / 40 = 0.5 nats.", slips, hint)


def mended_mean(function: Callable) -> None:
    """Checks `function(losses, weights)`, (B, T) each: the mean over what has weight, 0 where nothing has."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for number in range(20):
        rows, length = int(rng.integers(2, 4)), int(rng.integers(3, 6))
        weights = rng.choice([0.0, 0.0, 0.5, 1.0], (rows, length))
        weights[0, 0], weights[1, -1], weights[1, 0] = 1.0, 0.5, 0.0
        if number == 19:
            weights[:] = 0.0
        cases.append({"losses": rng.uniform(0.1, 4, (rows, length)).round(2), "weights": weights})

    def right(losses, weights):
        total = share = 0.0
        for loss, weight in zip(losses.ravel(), weights.ravel(), strict=True):
            total += loss * weight
            share += weight
        return total / share if share else 0.0

    def of_rows(losses, weights):
        return np.mean([right(loss, weight) for loss, weight in zip(losses, weights, strict=True)])

    def counted(losses, weights):
        return float((losses * weights).sum()) / max(int(np.count_nonzero(weights)), 1)

    slips = {
        "the sum is divided by all positions, as Keras does by default": lambda losses, weights: (
            losses * weights
        ).mean(),
        "the weights are left out": lambda losses, weights: losses.mean(),
        "the sum is not divided": lambda losses, weights: (losses * weights).sum(),
        "positions are counted; a weight of 0.5 counts half": counted,
        "each row has a mean of its own, so that tokens of short rows weigh more": of_rows,
        "the sum is divided by the rows, not by the weights": lambda losses, weights: (
            (losses * weights).sum() / len(losses)
        ),
    }
    verdict("mended_mean", function, cases, right, slips)


def share_that_moved(function: Callable) -> None:
    """Checks `function(before, after)`, lists of arrays: the share of all their numbers that changed."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        before = [rng.normal(size=(int(rng.integers(1, 3)), int(rng.integers(2, 4)))).round(1) for _ in range(3)]
        before.append(rng.normal(size=(2, 4)).round(1))  # of another size: else a mean of shares would do
        after = [array + np.where(rng.random(array.shape) < 0.4, 0.3, 0.0) for array in before]
        after[0] = before[0].copy()  # one that stands still
        after[3][0, :2] = before[3][0, :2] + [0.3, -0.3]  # changes that cancel
        cases.append({"before": before, "after": after})

    def right(before, after):
        moved = total = 0
        for old, new in zip(before, after, strict=True):
            for one, other in zip(old.ravel(), new.ravel(), strict=True):
                moved += one != other
                total += 1
        return moved / total

    def shares(before, after):
        return [np.mean(old != new) for old, new in zip(before, after, strict=True)]

    slips = {
        "every array counts alike; every number should": lambda before, after: np.mean(shares(before, after)),
        "arrays are counted, not numbers": lambda before, after: np.mean(np.array(shares(before, after)) > 0),
        "the numbers that did not change are counted": lambda before, after: 1 - right(before, after),
        "the changed numbers are counted; their share is asked for": lambda before, after: sum(
            int(np.sum(old != new)) for old, new in zip(before, after, strict=True)
        ),
        "the size of the change is measured, not how many numbers changed": lambda before, after: (
            sum(float(np.abs(old - new).sum()) for old, new in zip(before, after, strict=True))
            / sum(old.size for old in before)
        ),
        "sums are compared, in which changes cancel": lambda before, after: np.mean(
            [old.sum() != new.sum() for old, new in zip(before, after, strict=True)]
        ),
    }
    verdict("share_that_moved", function, cases, right, slips)


def measured_slope(function: Callable) -> None:
    """Checks `function(loss_minus, loss_plus, gradient, step)`: the slope measured over the slope claimed.

    The losses are those `step` against and along gradient / |gradient|.
    """
    rng = np.random.default_rng(_SEED)
    cases = []
    for number in range(20):
        gradient = rng.normal(size=int(rng.integers(2, 5))).round(2)
        step, ratio = float(rng.choice([0.01, 0.02, 0.05])), (1.0, 0.03, -0.4, 0.7)[number % 4]
        middle, half = rng.uniform(1, 3), ratio * step * np.linalg.norm(gradient)
        cases.append({"loss_minus": middle - half, "loss_plus": middle + half, "gradient": gradient, "step": step})

    def right(loss_minus, loss_plus, gradient, step):
        length = math.sqrt(sum(float(part) ** 2 for part in gradient))
        return (loss_plus - loss_minus) / (2 * step) / length

    def scaled(factor):
        return lambda **case: right(**case) * factor(case["gradient"], case["step"])

    slips = {
        "the distance between the two places is twice the step": scaled(lambda g, step: 2),
        "this is the slope that was measured; the claimed one, |gradient|, still has to divide it": scaled(
            lambda g, step: np.linalg.norm(g)
        ),
        "the sign is turned: along the gradient comes first": scaled(lambda g, step: -1),
        "the claimed slope along gradient / |gradient| is |gradient|, not its square": scaled(
            lambda g, step: 1 / np.linalg.norm(g)
        ),
        "|gradient| is the root of the sum of squares, not the sum of absolute values": scaled(
            lambda g, step: np.linalg.norm(g) / np.abs(g).sum()
        ),
        "the difference is not divided by the way": scaled(lambda g, step: 2 * step),
    }
    verdict("measured_slope", function, cases, right, slips)


def mended_step(function: Callable) -> None:
    """Checks `function(weights, velocity, gradient, rate, momentum)`: weights and velocity after a step.

    The velocity becomes momentum · velocity + gradient, and the weights go back by the rate times the new velocity.
    """
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        size = int(rng.integers(2, 4))
        named = {name: rng.normal(size=size).round(2) for name in ("weights", "velocity", "gradient")}
        cases.append(named | {"rate": round(float(rng.uniform(0.05, 0.4)), 2), "momentum": 0.9})

    def right(weights, velocity, gradient, rate, momentum):
        after = [momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
        return np.array([[w - rate * v for w, v in zip(weights, after, strict=True)], after])

    def stepped(weights, velocity, gradient, rate, momentum):
        return right(weights, velocity, gradient, rate, momentum)[0]

    def kept(velocity, gradient, momentum):
        return momentum * velocity + gradient

    slips = {
        "the old velocity is handed on: what is computed is thrown away": (
            lambda weights, velocity, gradient, rate, momentum: np.array(
                [stepped(weights, velocity, gradient, rate, momentum), velocity]
            )
        ),
        "the weights follow the gradient; the velocity is computed for nothing": (
            lambda weights, velocity, gradient, rate, momentum: np.array(
                [weights - rate * gradient, kept(velocity, gradient, momentum)]
            )
        ),
        "nothing is mended yet: both slips are still there": (
            lambda weights, velocity, gradient, rate, momentum: np.array([weights - rate * gradient, velocity])
        ),
        "the weights follow the old velocity": lambda weights, velocity, gradient, rate, momentum: np.array(
            [weights - rate * velocity, kept(velocity, gradient, momentum)]
        ),
        "the weights climb: the step is against the velocity": (
            lambda weights, velocity, gradient, rate, momentum: np.array(
                [weights + rate * kept(velocity, gradient, momentum), kept(velocity, gradient, momentum)]
            )
        ),
        "the weights are returned alone": stepped,
        "velocity comes second": lambda weights, velocity, gradient, rate, momentum: right(
            weights, velocity, gradient, rate, momentum
        )[::-1],
    }
    verdict("mended_step", function, cases, right, slips)


def rounded_away(function: Callable) -> None:
    """Checks `function(weights, updates)`: how many weights are the same bfloat16 numbers after `weights - updates`."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        weights = _to_bfloat16(rng.normal(size=8).round(3))
        updates = weights * rng.choice([-1, 1], 8) * 2.0 ** rng.uniform(-11.5, -5.5, 8)
        cases.append({"weights": weights, "updates": updates.astype("float32")})

    def right(weights, updates):
        return sum(int(_to_bfloat16(weights - updates)[i] == weights[i]) for i in range(len(weights)))

    slips = {
        "those that change are counted": lambda weights, updates: len(weights) - right(weights, updates),
        "the difference is kept in float32, where every weight changes": lambda weights, updates: int(
            np.sum((weights - updates).astype("float32") == weights)
        ),
        "it is rounded to float16, which has three more bits of fraction": lambda weights, updates: int(
            np.sum((weights - updates).astype("float16") == weights.astype("float16"))
        ),
        "the updates are held against one bound; it is relative to each weight": lambda weights, updates: int(
            np.sum(np.abs(updates) < 2.0**-9)
        ),
    }
    verdict("rounded_away", function, cases, right, slips)


def _to_bfloat16(x) -> np.ndarray:
    """The nearest bfloat16 numbers as float32, ties to even: the upper half of float32's bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)
