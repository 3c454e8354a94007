"""Checkers of lesson 10's exercises. Each compares with a computation of its own, in plain loops or fractions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 10


def packed_gigabytes_by_hand(answer: float | None) -> None:
    """Checks the gigabytes (10⁹ bytes) of two billion ternary weights, five to a byte.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    slips: dict[float, str] = {
        0.4: "log2(3) bits a weight is the limit; five to a byte take a little more",
        0.5: "that is two bits a weight, four to a byte",
        0.25: "that is one bit a weight, eight to a byte",
        3.2: "those are gigabits; a byte has eight",
        10.0: "five weights share a byte, so divide by 5",
        2.0: "that is a byte a weight",
        0.37: "that is in GiB, of 2³⁰ bytes; a GB has 10⁹",
    }
    praise = "2·10⁹ / 5 bytes are 0.4 GB. As float16 the same weights take 4 GB."
    number_verdict("packed_gigabytes_by_hand", answer, 0.4, praise, slips, "how many bytes do five weights take?")


def ternarize(function: Callable) -> None:
    """Checks `function(kernel)`: the matrix with its weights rounded to −γ, 0 and γ, γ the mean of |kernel|."""
    rng = np.random.default_rng(_SEED)
    cases = [{"kernel": np.array([[0.5, -1.5, 3.0], [-1.0, 0.25, -5.75]])}]
    for _ in range(19):
        shape = tuple(int(side) for side in rng.integers(2, 5, 2))
        cases.append({"kernel": np.round(rng.normal(0.3, 1.5, shape), 2)})

    def right(kernel):
        scale = sum(abs(w) for w in kernel.ravel().tolist()) / kernel.size
        return np.array([[0 if 2 * abs(w) <= scale else (scale if w > 0 else -scale) for w in row] for row in kernel])

    def rounded(scale, least=-1, most=1):
        return lambda kernel: np.clip(np.rint(kernel / scale(kernel)), least, most) * scale(kernel)

    def mean(kernel):
        return np.abs(kernel).mean()

    def per_column(kernel):
        scale = np.abs(kernel).mean(axis=0)
        return np.clip(np.rint(kernel / scale), -1, 1) * scale

    slips = {
        "the sign is taken; weights below γ/2 have to become 0": lambda kernel: np.sign(kernel) * mean(kernel),
        "the scale is the largest |weight|; γ is the mean": rounded(lambda kernel: np.abs(kernel).max()),
        "the scale is the mean of the weights, without |·|": rounded(lambda kernel: kernel.mean()),
        "the scale is the median of |weight|; γ is the mean": rounded(lambda kernel: np.median(np.abs(kernel))),
        "the scale is the root of the mean square; γ is the mean of |weight|": rounded(lambda kernel: kernel.std()),
        "the codes are not clipped to −1 … 1": rounded(mean, -np.inf, np.inf),
        "the codes are returned; they have to be multiplied by γ": lambda kernel: right(kernel) / mean(kernel),
        "weights up to γ become 0; the threshold is γ/2": lambda kernel: np.where(
            np.abs(kernel) <= mean(kernel), 0, np.sign(kernel) * mean(kernel)
        ),
        "weights are cut off behind the decimal point, not rounded": lambda kernel: (
            np.clip(np.trunc(kernel / mean(kernel)), -1, 1) * mean(kernel)
        ),
        "each column has a scale of its own; BitNet has one a matrix": per_column,
    }
    verdict("ternarize", function, cases, right, slips)


_NO_PRODUCTS = "this exercise is about doing without multiplication: add, subtract and skip"


class _Whole(int):
    """An integer that cannot be multiplied; sums and differences are plain integers."""

    def __mul__(self, other):
        raise TypeError(_NO_PRODUCTS)

    __rmul__ = __mul__


class _Loose(np.ndarray):
    """An integer array whose single numbers are `_Whole`."""

    def __getitem__(self, place):
        found = super().__getitem__(place)
        return _Whole(found) if isinstance(found, np.integer) else found

    def __iter__(self):
        return (self[place] for place in range(len(self)))


class _AddOnly(_Loose):
    """An array that can be added, subtracted, negated, summed and chosen from, but not multiplied."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if ufunc in (np.multiply, np.matmul):
            raise TypeError(_NO_PRODUCTS)
        plain = [part.view(np.ndarray) if isinstance(part, _AddOnly) else part for part in inputs]
        result = getattr(ufunc, method)(*plain, **kwargs)
        return result.view(_AddOnly) if isinstance(result, np.ndarray) else result

    def __array_function__(self, func, types, args, kwargs):
        if func in (np.dot, np.inner, np.vdot, np.einsum, np.tensordot):
            raise TypeError(_NO_PRODUCTS)
        return super().__array_function__(func, types, args, kwargs)


def add_and_subtract(function: Callable) -> None:
    """Checks `function(x, codes)`: x times a matrix of −1, 0, 1 (d_in, d_out), without multiplying arrays."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        d_in, d_out = (int(side) for side in rng.integers(3, 7, 2))
        codes = rng.integers(-1, 2, (d_in, d_out))
        codes[0, 0], codes[1, 0] = 1, -1
        cases.append({"x": rng.integers(-99, 100, d_in), "codes": codes})

    def right(x, codes):
        return np.array([sum(int(x[i]) * int(codes[i, j]) for i in range(len(x))) for j in range(codes.shape[1])])

    slips = {
        "inputs with code −1 are left out; they are subtracted": lambda x, codes: x @ (codes == 1),
        "inputs with code −1 are added; they are subtracted": lambda x, codes: x @ np.abs(codes),
        "inputs with code 0 are subtracted; they are left out": lambda x, codes: x @ np.where(codes == 1, 1, -1),
        "added and subtracted are the wrong way round": lambda x, codes: -(x @ codes),
        "rows and columns of the codes are exchanged": lambda x, codes: codes @ x[: codes.shape[1]],
        "one sum comes over all outputs; each column has its own": lambda x, codes: (x @ codes).sum(),
    }
    watched = _watched(function)
    verdict("add_and_subtract", watched, cases, right, slips)


def _watched(function: Callable) -> Callable:
    def call(x, codes):
        answer = function(x=x.view(_AddOnly), codes=codes.view(_Loose))
        return np.asarray(answer) if isinstance(answer, _AddOnly) else answer

    return call


def pack_five(function: Callable) -> None:
    """Checks `function(codes)`: a byte for each row of five codes, the first in the lowest place of base 3."""
    rng = np.random.default_rng(_SEED)
    cases = [{"codes": rng.integers(-1, 2, (int(rng.integers(1, 6)), 5))} for _ in range(18)]
    cases += [{"codes": np.full((1, 5), code)} for code in (-1, 1)]

    def right(codes):
        return np.array([int("".join(str(int(code) + 1) for code in reversed(row)), 3) for row in codes])

    def in_base(base, shift=1, order=1):
        return lambda codes: (codes[:, ::order] + shift) @ base ** np.arange(5)

    slips = {
        "the first code stands in the highest place; it belongs in the lowest": in_base(3, order=-1),
        "the base is 4, two bits a code; five of those do not fit into a byte": in_base(4),
        "the base is 2; a trit has three values": in_base(2),
        "the codes are not made digits: add 1, so that they are 0, 1, 2": in_base(3, shift=0),
        "−1 becomes 2 and 1 stays 1; the digits are code + 1": lambda codes: (codes % 3) @ 3 ** np.arange(5),
        "the places count from 3¹; the lowest is 3⁰ = 1": lambda codes: (codes + 1) @ 3 ** np.arange(1, 6),
    }
    verdict("pack_five", function, cases, right, slips)


def latent_gradient(function: Callable) -> None:
    """Checks `function(kernel, x, upstream)`: the gradient that the latent kernel gets, straight through."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        tokens, d_in, d_out = (int(side) for side in rng.integers(2, 5, 3))
        kernel = rng.normal(size=(d_in, d_out))
        kernel[0, 0], kernel[-1, -1] = 9.0, 0.01  # one clipped, one that becomes 0
        part = {"kernel": kernel, "x": rng.normal(size=(tokens, d_in)), "upstream": rng.normal(size=(tokens, d_out))}
        cases.append(part)

    def right(kernel, x, upstream):
        return sum(np.outer(token, gradient) for token, gradient in zip(x, upstream, strict=True))

    def scaled(factor):
        return lambda kernel, x, upstream: right(kernel, x, upstream) * factor(kernel / np.abs(kernel).mean(), kernel)

    slips = {
        "the rounding's own derivative is used; it is 0, and nothing would learn": scaled(lambda w, kernel: 0.0),
        "the gradient is multiplied by γ; straight through, it comes unchanged": scaled(
            lambda w, kernel: np.abs(kernel).mean()
        ),
        "clipped weights get no gradient; BitNet passes theirs on too": scaled(lambda w, kernel: np.abs(w) < 1.5),
        "weights that became 0 get no gradient; then they would stay 0": scaled(lambda w, kernel: np.abs(w) > 0.5),
        "the gradient is transposed; it has the kernel's shape": lambda kernel, x, upstream: (
            right(kernel, x, upstream).T
        ),
        "that is the gradient of x, not of the kernel": lambda kernel, x, upstream: upstream @ kernel.T,
        "the tokens' gradients are averaged; they add up": lambda kernel, x, upstream: (
            right(kernel, x, upstream) / len(x)
        ),
    }
    verdict("latent_gradient", function, cases, right, slips)


def bit_linear(function: Callable) -> None:
    """Checks `function(x, kernel)`: inputs in 8 bits a token, ternary weights, and the scales; no norm."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        tokens, d_in, d_out = (int(side) for side in rng.integers(2, 5, 3))
        x = rng.normal(size=(tokens, d_in)) * 10.0 ** np.arange(tokens)[:, None]  # tokens of unlike size
        cases.append({"x": np.round(x, 3), "kernel": np.round(rng.normal(0.2, 2, (d_in, d_out)), 2)})

    def product(x, kernel, steps=127.0, axis: Any = -1, s=True, gamma=True, inputs=True, weights=True):
        mean, step = np.abs(kernel).mean(), np.abs(x).max(axis=axis, keepdims=True) / steps
        left = (np.rint(x / step) if inputs else x / step) * (step if s else 1)
        middle = np.clip(np.rint(kernel / mean), -1, 1) if weights else kernel / mean
        return left @ middle * (mean if gamma else 1)

    def right(x, kernel):
        mean = np.abs(kernel).mean()
        signs = np.where(np.abs(kernel) > mean / 2, np.sign(kernel), 0)
        rows = [np.array([round(float(v / np.max(np.abs(row)) * 127)) for v in row]) for row in x]
        return np.array([codes @ signs * mean * np.max(np.abs(row)) / 127 for codes, row in zip(rows, x, strict=True)])

    slips = {
        "one scale serves all tokens; each has its own": lambda x, kernel: product(x, kernel, axis=None),
        "the scales run over the tokens, one for each input; each token has its own": lambda x, kernel: product(
            x, kernel, axis=0
        ),
        "the tokens' scales s are forgotten at the end": lambda x, kernel: product(x, kernel, s=False),
        "γ is forgotten at the end": lambda x, kernel: product(x, kernel, gamma=False),
        "the integers are returned; both scales are missing": lambda x, kernel: product(
            x, kernel, s=False, gamma=False
        ),
        "the inputs are not rounded to codes": lambda x, kernel: product(x, kernel, inputs=False),
        "the weights are not made ternary": lambda x, kernel: product(x, kernel, weights=False),
        "the largest input becomes 128; signed codes end at 127": lambda x, kernel: product(x, kernel, steps=128.0),
        "the product is the unquantized one": lambda x, kernel: x @ kernel,
    }
    verdict("bit_linear", function, cases, right, slips)
