"""Lesson 04's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import math

import numpy as np
import pytest

from gemma_lora.course import transformer
from tests.checker_rules import CheckerRules, said_by


def rms(x):
    return np.sqrt(np.mean(x**2, axis=-1, keepdims=True))


def normalize_by_loop(x, scale):
    for row in x:
        row /= np.sqrt(row @ row / row.size)
        row *= 1 + scale
    return x.tolist()


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def scores(query, key):
    return query @ key.T / math.sqrt(query.shape[1])


def weights_by_infinity(query, key):
    return softmax(np.where(np.tri(len(query)) > 0, scores(query, key), -np.inf))


def weights_by_mask_and_division(query, key):
    powers = np.exp(scores(query, key)) * np.tri(len(query))
    return powers / powers.sum(axis=1)[:, None]


def window_by_loop(length, window):
    mask = np.zeros((length, length), int)
    for t in range(length):
        mask[t, max(0, t - window + 1) : t + 1] = 1
    return mask


def rotate_by_halves(x, position, wavelength):
    half = len(x) // 2
    angle = position * wavelength ** (-2 * np.arange(half) / len(x))
    first, second = x[:half], x[half:]
    return np.hstack([first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)])


def rotate_neighbours(x, position, wavelength):
    z = (x[::2] + 1j * x[1::2]) * np.exp(1j * position * wavelength ** (-2 * np.arange(len(x) // 2) / len(x)))
    return np.stack([z.real, z.imag], axis=1).ravel()


def rotate_with_speeds(speeds):
    def function(x, position, wavelength):
        half = len(x) // 2
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * speeds(np.arange(half), half, wavelength))
        return np.hstack([z.real, z.imag])

    return function


def count_by_kernel(width, query_heads, kv_heads, head_dim, mlp):
    kernels = [(width, query_heads * head_dim), (query_heads * head_dim, width)] + 2 * [(width, kv_heads * head_dim)]
    kernels += 2 * [(width, mlp)] + [(mlp, width)]
    return sum(a * b for a, b in kernels) + 4 * width + 2 * head_dim


def counted(change):
    return lambda **sizes: count_by_kernel(**sizes) + change(**sizes)


#: Exercise -> two right functions, written differently.
RIGHT = {
    "normalize": [normalize_by_loop, lambda x, scale: transformer.rms_norm(x, scale, epsilon=0)],
    "attention_weights": [weights_by_infinity, weights_by_mask_and_division],
    "window_mask": [window_by_loop, lambda length, window: np.tri(length) - np.tri(length, k=-window) > 0],
    "rotate_at": [
        rotate_by_halves,
        lambda x, position, wavelength: transformer.rotary_embedding(x[None, None], wavelength, positions=[position])[
            0, 0
        ],
    ],
    "block_parameters": [
        count_by_kernel,
        lambda width, query_heads, kv_heads, head_dim, mlp: (
            width * (4 + 3 * mlp) + 2 * head_dim * (1 + width * (query_heads + kv_heads))
        ),
    ],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "normalize": [
        (lambda x, scale: x / rms(x) * scale, "1 + scale"),
        (lambda x, scale: x / rms(x), "not applied"),
        (lambda x, scale: normalize_by_loop(x - x.mean(axis=1, keepdims=True), scale), "LayerNorm"),
        (lambda x, scale: x / np.linalg.norm(x, axis=1, keepdims=True) * (1 + scale), "summed"),
        (lambda x, scale: x / rms(x) ** 2 * (1 + scale), "root is forgotten"),
        (lambda x, scale: x / np.sqrt((x**2).mean()) * (1 + scale), "all tokens"),
        (lambda x, scale: x / rms(x.T).T * (1 + scale), "a token's coordinates"),
        (lambda x, scale: x / abs(x).mean(axis=1, keepdims=True) * (1 + scale), "absolute"),
        (lambda x, scale: x, "expected"),
    ],
    "attention_weights": [
        (lambda query, key: weights_by_infinity(query * math.sqrt(query.shape[1]), key), "not divided by √H"),
        (lambda query, key: weights_by_infinity(query / math.sqrt(query.shape[1]), key), "divided by H"),
        (lambda query, key: weights_by_infinity(query * query.shape[1], key), "multiplied by √H"),
        (lambda query, key: softmax(scores(query, key)), "no mask"),
        (lambda query, key: np.tril(softmax(scores(query, key))), "after the softmax"),
        (lambda query, key: softmax(np.tril(scores(query, key))), "−∞"),
        (lambda query, key: weights_by_infinity(query[::-1], key[::-1])[::-1, ::-1], "turned round"),
        (lambda query, key: np.tril(e := np.exp(scores(query, key))) / np.tril(e).sum(axis=0), "columns"),
        (lambda query, key: weights_by_infinity(key, query), "exchanged"),
        (lambda query, key: np.tri(len(query)), "expected"),
    ],
    "window_mask": [
        (lambda length, window: window_by_loop(length, window + 1), "too wide"),
        (lambda length, window: window_by_loop(length, window - 1), "too narrow"),
        (lambda length, window: window_by_loop(length, window) - np.eye(length), "itself"),
        (lambda length, window: np.maximum(m := window_by_loop(length, window), m.T), "both sides"),
        (lambda length, window: window_by_loop(length, window).T, "turned round"),
        (lambda length, window: np.tri(length), "only causal"),
        (lambda length, window: 1 - window_by_loop(length, window), "exchanged"),
        (lambda length, window: np.eye(length), "expected"),
    ],
    "rotate_at": [
        (rotate_neighbours, "neighbours"),
        (lambda x, position, wavelength: rotate_by_halves(x, -position, wavelength), "other way"),
        (rotate_with_speeds(lambda i, half, w: w ** (-i / (2 * half))), "−2i/H"),
        (rotate_with_speeds(lambda i, half, w: w ** (i / half)), "faster"),
        (rotate_with_speeds(lambda i, half, w: i * 0 + 1), "same speed"),
        (lambda x, position, wavelength: rotate_by_halves(x, position + 1, wavelength), "from 1"),
        (lambda x, position, wavelength: rotate_by_halves(x, 1, wavelength), "does not come in"),
        (lambda x, position, wavelength: x, "expected"),
    ],
    "block_parameters": [
        (counted(lambda width, head_dim, **_: -4 * width - 2 * head_dim), "norms are forgotten"),
        (counted(lambda head_dim, **_: -2 * head_dim), "query and key are forgotten"),
        (counted(lambda width, **_: -2 * width), "after attention and MLP"),
        (counted(lambda width, mlp, **_: -width * mlp), "two kernels"),
        (counted(lambda width, query_heads, head_dim, **_: -width * query_heads * head_dim), "output kernel"),
        (counted(lambda width, kv_heads, head_dim, **_: -width * kv_heads * head_dim), "values are not"),
        (lambda **sizes: count_by_kernel(**sizes | {"kv_heads": sizes["query_heads"]}), "its own key"),
        (lambda **sizes: count_by_kernel(**sizes | {"query_heads": sizes["kv_heads"]}), "as many query heads"),
        (
            counted(lambda query_heads, kv_heads, head_dim, **_: (query_heads + kv_heads - 2) * head_dim),
            "all heads share one",
        ),
        (counted(lambda width, **_: width), "expected"),
    ],
}


class TestLesson04(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_04", "attention_by_hand", RIGHT, WRONG


def test_the_right_number_by_hand_passes(capsys):
    answer = softmax(np.array([0, math.log(3)])) @ [8, 4]
    for number in (answer, 5, 5.0):
        assert "✓" in said_by(capsys, "attention_by_hand", number)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (6, "plain mean"),
        (7, "exchanged"),
        (4, "softmax is soft"),
        (20, "divided by the sum"),
        (4 * math.log(3), "through the softmax"),
        (11, "exp of both"),
        (float("nan"), "exp of both"),
        ("x", "a number is needed"),
    ],
)
def test_a_wrong_number_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "attention_by_hand", answer)
    assert "✗" in text and said in text
