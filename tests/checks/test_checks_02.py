"""Lesson 02's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.quantization.integers import fake_quantize
from tests.checker_rules import CheckerRules, said_by


def layer_by_einsum(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
    centred = codes.astype(float) - zero_point
    return np.einsum("ni,io->no", centred, kernel_codes * scale_x * scale_w) + bias_codes * scale_x * scale_w


def layer_folded(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
    """The zero point's part beforehand, as a device does."""
    start = bias_codes - zero_point * kernel_codes.astype(np.int32).sum(axis=0)
    return scale_x * scale_w * (codes.astype(np.int32) @ kernel_codes.astype(np.int32) + start)


def layer(centre=lambda codes, zero_point: codes.astype(int) - zero_point, end=None):
    def function(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
        sums = centre(codes, zero_point) @ kernel_codes.astype(int)
        return end(sums, bias_codes, scale_x, scale_w) if end else (sums + bias_codes) * scale_x * scale_w

    return function


def layer_in_int16(codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w):
    sums = codes @ kernel_codes - zero_point * kernel_codes.sum(axis=0, dtype=np.int32)
    return (sums + bias_codes) * scale_x * scale_w


def ste_by_jax(x, low, high, gradient):
    _, pull = jax.vjp(lambda x: fake_quantize(x, 8, symmetric=False, value_range=(low, high)), jnp.asarray(x))
    return np.asarray(pull(jnp.asarray(gradient, "float32"))[0])


def back(weights, bits):
    scale = np.abs(weights).max() / (2 ** (bits - 1) - 1)
    return scale * np.rint(weights / scale)


def slope(weights, x, y):
    return 2 / len(y) * (x @ weights - y) @ x


def qat_by_jax(weights, x, y, rate, bits):
    def loss(weights):
        return jnp.mean((x @ fake_quantize(weights, int(bits)) - y) ** 2)

    return weights - rate * np.asarray(jax.grad(loss)(jnp.asarray(weights)))


def nats(logits, targets):
    return np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - picked(logits, targets)


def picked(logits, targets):
    return logits[np.arange(len(targets)), targets]


def naive(logits, targets):
    with np.errstate(over="ignore"):
        return math.exp(np.mean(np.log(np.exp(logits).sum(axis=1)) - picked(logits, targets)))


#: Exercise -> two right functions, written differently.
RIGHT = {
    "bias_codes": [
        lambda bias, scale_x, scale_w: np.rint(bias / (scale_x * scale_w)).astype(np.int32),
        lambda bias, scale_x, scale_w: [int(math.floor(b / scale_x / s + 0.5)) for b, s in zip(bias, scale_w)],  # noqa: B905
    ],
    "integer_layer": [layer_by_einsum, layer_folded, layer()],
    "straight_through_gradient": [
        ste_by_jax,
        lambda x, low, high, gradient: gradient * (x == np.clip(x, low, high)),
    ],
    "qat_step": [
        qat_by_jax,
        lambda weights, x, y, rate, bits: weights - rate * slope(back(weights, bits), x, y),
    ],
    "perplexity_from_logits": [
        lambda logits, targets: np.exp(nats(logits, targets).mean()),
        lambda logits, targets: float(
            jnp.exp(-jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)))
        ),
    ],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "bias_codes": [
        (lambda bias, scale_x, scale_w: np.rint(bias / scale_w), "weights' scale alone"),
        (lambda bias, scale_x, scale_w: np.rint(bias / scale_x), "input's scale alone"),
        (lambda bias, scale_x, scale_w: np.rint(bias * scale_x * scale_w), "multiplied"),
        (lambda bias, scale_x, scale_w: (bias / (scale_x * scale_w)).astype(int), "cut off"),
        (lambda bias, scale_x, scale_w: bias // (scale_x * scale_w), "rounded down"),
        (lambda bias, scale_x, scale_w: np.rint(bias / scale_x / scale_w).clip(-127, 127), "8 bits"),
        (lambda bias, scale_x, scale_w: np.rint(bias / np.abs(bias).max() * 127), "of its own"),
        (lambda bias, scale_x, scale_w: bias / scale_w / scale_x, "whole numbers"),
        (lambda bias, scale_x, scale_w: np.zeros(len(bias)), "expected"),
    ],
    "integer_layer": [
        (layer(lambda codes, zero_point: codes.astype(int)), "forgotten"),
        (layer(lambda codes, zero_point: codes.astype(int) + zero_point), "added, not subtracted"),
        (layer(lambda codes, zero_point: codes - np.uint8(zero_point)), "wraps below 0"),
        (layer_in_int16, "overflow"),
        (layer(end=lambda sums, bias, scale_x, scale_w: sums * scale_x * scale_w + bias), "without their unit"),
        (layer(end=lambda sums, bias, scale_x, scale_w: sums * scale_x * scale_w), "bias is left out"),
        (layer(end=lambda sums, bias, scale_x, scale_w: (sums + bias) * scale_w), "input's scale is left out"),
        (layer(end=lambda sums, bias, scale_x, scale_w: (sums + bias) * scale_x), "weights' scale is left out"),
        (layer(end=lambda sums, bias, scale_x, scale_w: sums + bias), "integers are returned"),
        (layer(end=lambda sums, bias, scale_x, scale_w: (sums - bias) * scale_x * scale_w), "expected"),
        (
            lambda codes, zero_point, kernel_codes, bias_codes, scale_x, scale_w: layer(lambda q, z: q.astype(int))(
                codes, 0, kernel_codes, bias_codes - zero_point, scale_x, scale_w
            ),
            "every input",
        ),
    ],
    "straight_through_gradient": [
        (lambda x, low, high, gradient: np.zeros_like(x), "nothing will learn"),
        (lambda x, low, high, gradient: gradient, "clipped gets a gradient"),
        (lambda x, low, high, gradient: gradient * ((x < low) | (x > high)), "exchanged"),
        (lambda x, low, high, gradient: gradient * (x < high), "only the upper"),
        (lambda x, low, high, gradient: gradient * (x > low), "only the lower"),
        (lambda x, low, high, gradient: 1.0 * ((x > low) & (x < high)), "the slope, 0 or 1"),
        (lambda x, low, high, gradient: gradient.clip(low, high), "gradient is clipped"),
        (lambda x, low, high, gradient: x.clip(low, high), "goes forward"),
        (lambda x, low, high, gradient: gradient * (abs(x) < high), "symmetric"),
        (lambda x, low, high, gradient: -ste_by_jax(x, low, high, gradient), "expected"),
    ],
    "qat_step": [
        (lambda weights, x, y, rate, bits: weights - rate * slope(weights, x, y), "at the float weights"),
        (
            lambda weights, x, y, rate, bits: back(weights, bits) - rate * slope(back(weights, bits), x, y),
            "starts from the rounded",
        ),
        (lambda weights, x, y, rate, bits: back(weights - rate * slope(back(weights, bits), x, y), bits), "again"),
        (lambda weights, x, y, rate, bits: weights + rate * slope(back(weights, bits), x, y), "uphill"),
        (lambda weights, x, y, rate, bits: weights - rate / 2 * slope(back(weights, bits), x, y), "lacks its 2"),
        (lambda weights, x, y, rate, bits: weights - rate * len(y) * slope(back(weights, bits), x, y), "summed"),
        (lambda weights, x, y, rate, bits: slope(back(weights, bits), x, y), "gradient is returned"),
        (lambda weights, x, y, rate, bits: back(weights, bits), "expected"),
    ],
    "perplexity_from_logits": [
        (lambda logits, targets: nats(logits, targets).mean(), "exponential is missing"),
        (lambda logits, targets: np.exp(nats(logits, targets).sum()), "sum is taken"),
        (lambda logits, targets: np.exp(-nats(logits, targets).mean()), "sign is turned"),
        (lambda logits, targets: np.exp(nats(logits, targets)).mean(), "perplexities of single words"),
        (lambda logits, targets: 1 / np.mean(np.exp(-nats(logits, targets))), "probabilities are averaged"),
        (lambda logits, targets: 2 ** nats(logits, targets).mean(), "2 is raised"),
        (naive, "overflows"),
        (lambda logits, targets: np.exp(nats(logits[:-1], targets[1:]).mean()), "shifted"),
        (lambda logits, targets: np.exp(nats(logits, targets)), "one number a word"),
        (lambda logits, targets: np.exp(-picked(logits, targets).mean() / 900), "expected"),
    ],
}  # fmt: skip


class TestLesson02(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_02", "perplexity_by_hand", RIGHT, WRONG


def test_the_perplexity_by_hand_is_the_one_of_its_definition(capsys):
    nats = [-math.log(p) for p in (1 / 2, 1 / 4, 1 / 8)]
    for answer in (math.exp(sum(nats) / 3), 4, 4.0):
        assert "✓" in said_by(capsys, "perplexity_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((2 + 4 + 8) / 3, "mean of 1/p"),
        (3 / (1 / 2 + 1 / 4 + 1 / 8), "mean probability"),
        (math.log(4), "the loss"),
        (64, "divide by three"),
        (0.25, "minus sign"),
        (2, "bits"),
        (math.exp(2), "nats"),
        (11, "exponential of the mean"),
        ("x", "number"),
    ],
)
def test_a_wrong_perplexity_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "perplexity_by_hand", answer)
    assert "✗" in text and said in text
