"""Checkers of lesson 04's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 4


def attention_by_hand(answer: float | None) -> None:
    """Checks what a token collects whose scores are 0 and ln 3, from the values 8 and 4.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    slips = {
        6.0: "that is the plain mean; the scores say that the second token counts more",
        7.0: "the weights are exchanged: the larger score belongs to the value 4",
        4.0: "softmax is soft: the smaller score keeps a share",
        20.0: "1 · 8 + 3 · 4 must still be divided by the sum 1 + 3",
        round(4 * math.log(3), 2): "the scores are not the weights; they go through the softmax first",
    }
    praise = "the weights are 1/4 and 3/4, and 8/4 + 3 · 4/4 = 5."
    number_verdict("attention_by_hand", answer, 5, praise, slips, "take exp of both scores first")


def normalize(function: Callable) -> None:
    """Checks `function(x, scale)`: Gemma's RMSNorm of the rows of x (T, D), without an epsilon."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        tokens, width = (int(size) for size in rng.integers(2, 5, 2))
        x = rng.normal(1, 2, (tokens, width)) * rng.uniform(0.5, 4, (tokens, 1))
        cases.append({"x": x, "scale": rng.uniform(-0.5, 1, width)})

    def right(x, scale):
        size = [math.sqrt(sum(row**2) / len(row)) for row in x]
        return np.array(
            [[a * (1 + s) / r for a, s in zip(row, scale, strict=True)] for row, r in zip(x, size, strict=True)]
        )

    def over(size, centred=False, factor=1.0):
        def slip(x, scale):
            x = x - x.mean(axis=-1, keepdims=True) if centred else x
            return x / size(x) * (factor + scale)

        return slip

    def root(x):
        return np.sqrt(np.mean(x**2, axis=-1, keepdims=True))

    slips = {
        "the factor is `scale`; Gemma's is 1 + scale": over(root, factor=0.0),
        "the scale is not applied": lambda x, scale: x / root(x),
        "the mean is subtracted first; that is LayerNorm, and RMSNorm leaves the mean": over(root, centred=True),
        "the squares are summed, not averaged": over(lambda x: np.linalg.norm(x, axis=-1, keepdims=True)),
        "the root is forgotten": over(lambda x: np.mean(x**2, axis=-1, keepdims=True)),
        "the mean is over all tokens; each token has its own": over(lambda x: np.sqrt(np.mean(x**2))),
        "the mean is over the tokens; it must be over a token's coordinates": over(
            lambda x: np.sqrt(np.mean(x**2, axis=0, keepdims=True))
        ),
        "the size is the mean of the absolute values, not the root mean square": over(
            lambda x: np.mean(np.abs(x), axis=-1, keepdims=True)
        ),
    }
    verdict("normalize", function, cases, right, slips)


def attention_weights(function: Callable) -> None:
    """Checks `function(query, key)`: causal attention weights (T, T) of one head from (T, H) each."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        tokens, size = (int(n) for n in rng.integers(3, 6, 2))
        cases.append({"query": rng.normal(size=(tokens, size)), "key": rng.normal(size=(tokens, size))})

    def right(query, key):
        result = np.zeros((len(query), len(query)))
        for t, q in enumerate(query):
            powers = [math.exp(sum(q * key[s]) / math.sqrt(len(q))) for s in range(t + 1)]
            result[t, : t + 1] = np.array(powers) / sum(powers)
        return result

    def soft(scores, allowed, axis=-1):
        powers = np.where(allowed, np.exp(scores), 0.0)
        return powers / powers.sum(axis=axis, keepdims=True)

    def scaled(query, key, power=-0.5):
        return query @ key.T * query.shape[1] ** power

    slips = {
        "the scores are not divided by √H": lambda query, key: soft(query @ key.T, np.tri(len(query))),
        "the scores are divided by H, not by its root": lambda query, key: soft(
            scaled(query, key, -1.0), np.tri(len(query))
        ),
        "the scores are multiplied by √H": lambda query, key: soft(scaled(query, key, 0.5), np.tri(len(query))),
        "there is no mask: tokens read later ones": lambda query, key: soft(scaled(query, key), True),
        "the mask comes after the softmax: rows no longer sum to 1": lambda query, key: (
            soft(scaled(query, key), True) * np.tri(len(query))
        ),
        "the masked scores are 0 before the softmax; exp(0) is 1, so they still count. They must be −∞": (
            lambda query, key: soft(np.where(np.tri(len(query)), scaled(query, key), 0.0), True)
        ),
        "the mask is turned round: tokens read later ones only": lambda query, key: soft(
            scaled(query, key), np.tri(len(query)).T
        ),
        "the softmax runs down the columns; a row must sum to 1": lambda query, key: soft(
            scaled(query, key), np.tri(len(query)), axis=0
        ),
        "queries and keys are exchanged": lambda query, key: right(key, query),
    }
    verdict("attention_weights", function, cases, right, slips)


def window_mask(function: Callable) -> None:
    """Checks `function(length, window)`: the causal sliding-window mask (length, length)."""
    cases = [{"length": length, "window": window} for length in range(3, 8) for window in range(2, length)]

    def right(length, window):
        return np.array([[0 <= t - s < window for s in range(length)] for t in range(length)])

    def distances(allowed):
        return lambda length, window: allowed(np.subtract.outer(np.arange(length), np.arange(length)), window)

    slips = {
        "the window is one token too wide; the token itself is one of the `window`": distances(
            lambda d, w: (d >= 0) & (d <= w)
        ),
        "the window is one token too narrow": distances(lambda d, w: (d >= 0) & (d < w - 1)),
        "the token does not read itself": distances(lambda d, w: (d > 0) & (d < w)),
        "tokens read later ones too: the window reaches to both sides": distances(lambda d, w: abs(d) < w),
        "the mask is turned round: tokens read later ones": distances(lambda d, w: (-d >= 0) & (-d < w)),
        "there is no window: the mask is only causal": distances(lambda d, w: d >= 0),
        "True and False are exchanged; True means: may read": lambda length, window: ~right(length, window),
    }
    verdict("window_mask", function, cases, right, slips)


def rotate_at(function: Callable) -> None:
    """Checks `function(x, position, wavelength)`: RoPE of one vector (H,), coordinate i paired with i + H/2."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        x = rng.normal(size=2 * int(rng.integers(2, 5)))
        cases.append({"x": x, "position": int(rng.integers(2, 9)), "wavelength": float(rng.integers(20, 200))})

    def right(x, position, wavelength):
        half = len(x) // 2
        numbers = [complex(a, b) for a, b in zip(x[:half], x[half:], strict=True)]
        turned = [
            z * complex(math.cos(angle), math.sin(angle))
            for i, z in enumerate(numbers)
            for angle in [position * wavelength ** (-i / half)]
        ]
        return np.array([z.real for z in turned] + [z.imag for z in turned])

    def neighbours(x, position, wavelength):
        halves = right(np.concatenate([x[::2], x[1::2]]), position, wavelength).reshape(2, -1)
        return halves.T.reshape(-1)

    def turned_by(angles, sign=1.0):
        def slip(x, position, wavelength):
            half = len(x) // 2
            angle = angles(np.arange(half), half, position, wavelength)
            first, second = x[:half], x[half:]
            cos, sin = np.cos(angle), np.sin(angle)
            return np.concatenate([first * cos - second * sin, second * cos + sign * first * sin])

        return slip

    slips = {
        "neighbours are paired; Gemma pairs coordinate i with i + H/2": neighbours,
        "the pairs turn the other way": lambda x, position, wavelength: right(x, -position, wavelength),
        "the exponent is −i/H; a pair has two coordinates, so it is −2i/H": turned_by(
            lambda i, half, t, w: t * w ** (-i / (2 * half))
        ),
        "the exponent is positive: pairs turn faster and faster": turned_by(lambda i, half, t, w: t * w ** (i / half)),
        "every pair turns at the same speed": turned_by(lambda i, half, t, w: t + 0.0 * i),
        "positions are counted from 1": lambda x, position, wavelength: right(x, position + 1, wavelength),
        "a sign is wrong: that is no rotation, and lengths change": turned_by(
            lambda i, half, t, w: t * w ** (-i / half), sign=-1.0
        ),
        "the position does not come in": lambda x, position, wavelength: right(x, 1, wavelength),
    }
    verdict("rotate_at", function, cases, right, slips)


def block_parameters(function: Callable) -> None:
    """Checks `function(width, query_heads, kv_heads, head_dim, mlp)`: all numbers of one Gemma 3 block."""
    rng = np.random.default_rng(_SEED)
    names = ("width", "query_heads", "kv_heads", "head_dim", "mlp")
    cases: list[dict[str, Any]] = [dict(zip(names, (640, 4, 1, 256, 2048), strict=True))]
    for _ in range(15):
        kv_heads = int(rng.integers(1, 4))
        sizes = (int(rng.integers(5, 60)), kv_heads * int(rng.integers(2, 4)), kv_heads)
        cases.append(dict(zip(names, (*sizes, int(rng.integers(2, 30)), int(rng.integers(61, 200))), strict=True)))

    def count(query=1, key=1, value=1, output=1, kernels=3, wide_norms=4, head_norms=2):
        def total(width, query_heads, kv_heads, head_dim, mlp):
            heads = (query + output) * query_heads + (key + value) * kv_heads
            return heads * head_dim * width + kernels * width * mlp + wide_norms * width + head_norms * head_dim

        return total

    slips = {
        "the norms are forgotten": count(wide_norms=0, head_norms=0),
        "the norms of query and key are forgotten": count(head_norms=0),
        "the norms after attention and MLP are forgotten": count(wide_norms=2),
        "the MLP has two kernels; GeGLU has three: gate, up and down": count(kernels=2),
        "the attention's output kernel is forgotten": count(output=0),
        "keys are counted and values are not": count(value=0),
        "every query head has its own key and value; they share `kv_heads` of them": lambda **sizes: count()(
            **sizes | {"kv_heads": sizes["query_heads"]}
        ),
        "all heads have as many query heads as key heads": lambda **sizes: count()(
            **sizes | {"query_heads": sizes["kv_heads"]}
        ),
        "there is a norm of query and key for each head; all heads share one": lambda **sizes: (
            count(head_norms=0)(**sizes) + (sizes["query_heads"] + sizes["kv_heads"]) * sizes["head_dim"]
        ),
    }
    verdict("block_parameters", function, cases, count(), slips)
