"""Lesson 12's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import ml_dtypes
import numpy as np
import pytest

from gemma_lora.checks.lesson_12 import _to_bfloat16
from tests.checker_rules import CheckerRules, said_by


def mean_by_sums(losses, weights):
    return (losses * weights).sum() / weights.sum() if weights.any() else 0.0


def mean_by_average(losses, weights):
    return np.average(losses, weights=weights) if weights.sum() > 0 else 0


def moved_by_concatenation(before, after):
    old, new = (np.concatenate([array.ravel() for array in arrays]) for arrays in (before, after))
    return np.mean(old != new)


def moved_by_counting(before, after):
    changed = sum(np.count_nonzero(new - old) for old, new in zip(before, after, strict=True))
    return changed / sum(array.size for array in before)


def slope_by_norm(loss_minus, loss_plus, gradient, step):
    return (loss_plus - loss_minus) / (2 * step * np.linalg.norm(gradient))


def slope_by_dot(loss_minus, loss_plus, gradient, step):
    expected = gradient @ (2 * step * gradient / np.sqrt(gradient @ gradient))
    return (loss_plus - loss_minus) / expected


def step_as_tuple(weights, velocity, gradient, rate, momentum):
    velocity = momentum * velocity + gradient
    return weights - rate * velocity, velocity


def step_as_array(weights, velocity, gradient, rate, momentum):
    velocity *= momentum
    velocity += gradient
    weights -= rate * velocity
    return np.stack([weights, velocity])


def rounded_by_ml_dtypes(weights, updates):
    return np.sum((weights - updates).astype(ml_dtypes.bfloat16) == weights.astype(ml_dtypes.bfloat16))


def rounded_by_jax(weights, updates):
    import jax.numpy as jnp

    weights = jnp.asarray(weights)
    return int(jnp.sum((weights - updates).astype("bfloat16") == weights.astype("bfloat16")))


#: Exercise -> two right functions, written differently.
RIGHT = {
    "mended_mean": [mean_by_sums, mean_by_average],
    "share_that_moved": [moved_by_concatenation, moved_by_counting],
    "measured_slope": [slope_by_norm, slope_by_dot],
    "mended_step": [step_as_tuple, step_as_array],
    "rounded_away": [rounded_by_ml_dtypes, rounded_by_jax],
}


def broken_step(weights, velocity, gradient, rate, momentum):
    momentum * velocity + gradient
    return weights - rate * gradient, velocity


#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "mended_mean": [
        (lambda losses, weights: (losses * weights).mean(), "by all positions"),
        (lambda losses, weights: losses.mean(), "left out"),
        (lambda losses, weights: (losses * weights).sum(), "not divided"),
        (lambda losses, weights: (losses * weights).sum() / max((weights > 0).sum(), 1), "counts half"),
        (lambda losses, weights: (losses * weights).sum() / max(weights.sum(), 1e-9) + 1, "expected"),
        (
            lambda losses, weights: ((losses * weights).sum(1) / np.maximum(weights.sum(1), 1e-9)).mean(),
            "short rows weigh more",
        ),
    ],
    "share_that_moved": [
        (lambda before, after: np.mean([np.mean(a != b) for a, b in zip(before, after, strict=True)]), "counts alike"),
        (lambda before, after: np.mean([np.any(a != b) for a, b in zip(before, after, strict=True)]), "arrays are"),
        (lambda before, after: 1 - moved_by_counting(before, after), "did not change"),
        (lambda before, after: sum((a != b).sum() for a, b in zip(before, after, strict=True)), "share is asked"),
        (lambda before, after: moved_by_counting(before[:-1], after[:-1]), "expected"),
    ],
    "measured_slope": [
        (lambda **case: 2 * slope_by_norm(**case), "twice the step"),
        (lambda **case: np.linalg.norm(case["gradient"]) * slope_by_norm(**case), "claimed one"),
        (lambda **case: -slope_by_norm(**case), "sign"),
        (lambda **case: slope_by_norm(**case) / np.linalg.norm(case["gradient"]), "not its square"),
        (lambda **case: slope_by_norm(**case) * 2 * case["step"], "not divided by the way"),
        (lambda **case: slope_by_norm(**case) + 1, "expected"),
    ],
    "mended_step": [
        (broken_step, "nothing is mended"),
        (lambda **case: (step_as_tuple(**case)[0], case["velocity"]), "old velocity is handed on"),
        (lambda **c: (c["weights"] - c["rate"] * c["gradient"], step_as_tuple(**c)[1]), "for nothing"),
        (lambda **c: (c["weights"] - c["rate"] * c["velocity"], step_as_tuple(**c)[1]), "follow the old"),
        (lambda **case: step_as_tuple(**case)[0], "alone"),
        (lambda **case: step_as_tuple(**case)[::-1], "second"),
        (lambda **case: step_as_tuple(**case | {"momentum": 0.0}), "expected"),
    ],
    "rounded_away": [
        (lambda weights, updates: len(weights) - rounded_by_jax(weights, updates), "change are counted"),
        (lambda weights, updates: np.sum(weights - updates == weights), "kept in float32"),
        (lambda weights, updates: np.sum((weights - updates).astype("f2") == weights.astype("f2")), "float16"),
        (lambda weights, updates: 3 + rounded_by_jax(weights, updates), "expected"),
    ],
}  # fmt: skip


class TestLesson12(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_12", "reported_loss_by_hand", RIGHT, WRONG


def test_the_loss_by_hand_is_keras_own(capsys):
    import keras

    logits = np.zeros((1, 40, 2), "float32")
    logits[..., 1] = np.log(np.exp(2.5) - 1)  # target 0 costs 2.5 nats
    weights = np.arange(40)[None] < 8
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(np.zeros((1, 40)), logits, weights)
    assert "✓" in said_by(capsys, "reported_loss_by_hand", float(loss))


@pytest.mark.parametrize(
    ("answer", "said"),
    [(2.5, "all positions"), (20, "sum"), (0.2, "share"), (0.3125, "not by 8"), (0.0625, "all 8"), ("low", "a number")],
)
def test_a_wrong_loss_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "reported_loss_by_hand", answer)
    assert "✗" in text and said in text


def test_rounding_by_bits_is_bfloat16s():
    x = np.random.default_rng(0).normal(size=10_000).astype("float32")
    assert np.array_equal(_to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype("float32"))
