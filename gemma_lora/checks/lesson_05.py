"""Checkers of lesson 05's exercises. Each compares with a computation of its own, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 5


def training_bytes_by_hand(answer: int | None) -> None:
    """Checks the bytes that LoRA of rank 4 with Adam keeps for a 1,000 × 500 kernel, all in float32.

    Args:
        answer: The number, or None or `...` while there is none.
    """
    kernel, factors = 1000 * 500, 4 * (1000 + 500)
    right = 4 * kernel + 4 * 4 * factors
    slips: dict[float, str] = {
        16 * kernel: "that is full fine-tuning, and without A and B",
        16 * (kernel + factors): "that trains the kernel too; a frozen kernel has no gradient and no averages",
        4 * 4 * factors: "the frozen kernel is missing: it is not trained, but it has to be there",
        4 * kernel + 4 * factors: "A and B have gradients and Adam's two averages beside them",
        4 * kernel + 3 * 4 * factors: "Adam keeps two averages a number, of the gradient and of its square",
        4 * kernel + 2 * 4 * factors: "the gradients are in it; Adam's two averages are missing",
        kernel + 4 * factors: "those are numbers; each of them takes 4 bytes",
        4 * kernel + 16 * 4 * 500 * 1000: "A is 1,000 × 4 and B is 4 × 500; neither has the kernel's size",
        4 * kernel + 16 * 4 * 1000: "that counts A alone; B is 4 × 500",
        4 * kernel + 16 * 4 * 500: "that counts B alone; A is 1,000 × 4",
    }
    praise = f"{right:,} bytes; full fine-tuning would keep {16 * kernel:,}."
    hint = "the kernel once; A and B four times: themselves, their gradients, and Adam's two averages; 4 bytes each"
    number_verdict("training_bytes_by_hand", answer, right, praise, slips, hint)


def _factors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A layer's arrays with all sizes different, so that no wrong order of factors fits by accident."""
    rank, d_in, d_out, tokens = (int(size) for size in rng.permutation([2, 3, 4, 5, 6])[:4])
    rank, tokens = min(rank, tokens), max(rank, tokens)
    shapes = {"x": (tokens, d_in), "dy": (tokens, d_out), "kernel": (d_in, d_out)}
    shapes |= {"lora_a": (d_in, rank), "lora_b": (rank, d_out)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _cases(names: tuple[str, ...], **numbers: Callable) -> list[dict[str, Any]]:
    """Twenty calls: the named arrays of a random layer, and numbers such as alpha drawn for each."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        layer = _factors(rng)
        cases.append({name: layer[name] for name in names} | {name: draw(rng) for name, draw in numbers.items()})
    return cases


def _odd(rng: np.random.Generator) -> float:
    """A number between 1 and 8 that is neither the rank nor its root."""
    return float(rng.integers(4, 32)) / 4 + 0.1


def lora_forward(function: Callable) -> None:
    """Checks `function(x, kernel, lora_a, lora_b, alpha)`: the layer's output, (tokens, d_out)."""

    def right(x, kernel, lora_a, lora_b, alpha):
        update = np.einsum("ir,ro->io", lora_a, lora_b) * alpha / len(lora_b)
        return np.einsum("ti,io->to", x, kernel + update)

    def with_scaling(scaling):
        return lambda x, kernel, lora_a, lora_b, alpha: x @ kernel + scaling(alpha, len(lora_b)) * x @ lora_a @ lora_b

    slips = {
        "the update is scaled by alpha, not by alpha / rank": with_scaling(lambda alpha, rank: alpha),
        "the update is not scaled": with_scaling(lambda alpha, rank: 1.0),
        "the scaling is 1 / rank; alpha is forgotten": with_scaling(lambda alpha, rank: 1 / rank),
        "the scaling is rsLoRA's, alpha / sqrt(rank)": with_scaling(lambda alpha, rank: alpha / math.sqrt(rank)),
        "the scaling is upside down": with_scaling(lambda alpha, rank: rank / alpha),
        "the frozen kernel's part is missing": lambda x, kernel, lora_a, lora_b, alpha: (
            alpha / len(lora_b) * x @ lora_a @ lora_b
        ),
        "the update is missing": with_scaling(lambda alpha, rank: 0.0),
        "the kernel is scaled too": lambda x, kernel, lora_a, lora_b, alpha: (
            alpha / len(lora_b) * x @ (kernel + lora_a @ lora_b)
        ),
        "the update is subtracted": with_scaling(lambda alpha, rank: -alpha / rank),
    }
    names = ("x", "kernel", "lora_a", "lora_b")
    verdict("lora_forward", function, _cases(names, alpha=_odd), right, slips)


def gradient_of_a(function: Callable) -> None:
    """Checks `function(x, dy, lora_b, scaling)`: the loss's gradient with respect to A, (d_in, rank)."""

    def right(x, dy, lora_b, scaling):
        return scaling * np.einsum("ti,to,ro->ir", x, dy, lora_b)

    slips = {
        "B is missing: that is the kernel's gradient, xᵀ dy": lambda x, dy, lora_b, scaling: scaling * x.T @ dy,
        "x is missing: that is the gradient of x A": lambda x, dy, lora_b, scaling: scaling * dy @ lora_b.T,
    }
    cases = _cases(("x", "dy", "lora_b"), scaling=_odd)
    verdict("gradient_of_a", function, cases, right, slips | _slips_of_a_gradient(right, "A"))


def gradient_of_b(function: Callable) -> None:
    """Checks `function(x, dy, lora_a, scaling)`: the loss's gradient with respect to B, (rank, d_out)."""

    def right(x, dy, lora_a, scaling):
        return scaling * np.einsum("ti,ir,to->ro", x, lora_a, dy)

    slips = {"A is missing: that is the kernel's gradient, xᵀ dy": lambda x, dy, lora_a, scaling: scaling * x.T @ dy}
    cases = _cases(("x", "dy", "lora_a"), scaling=_odd)
    verdict("gradient_of_b", function, cases, right, slips | _slips_of_a_gradient(right, "B"))


def _slips_of_a_gradient(right: Callable, factor: str) -> dict[str, Callable]:
    """What goes wrong with A's gradient and with B's alike."""
    return {
        "the scaling is forgotten": lambda scaling, **rest: right(scaling=1.0, **rest),
        "the scaling comes in twice": lambda scaling, **rest: right(scaling=scaling**2, **rest),
        "it is divided by the scaling": lambda scaling, **rest: right(scaling=1 / scaling, **rest),
        f"the gradient is transposed; it must have {factor}'s shape": lambda **case: right(**case).T,
        "it is divided by the number of tokens; that is in dy already": lambda x, **rest: right(x=x, **rest) / len(x),
        "the sign is wrong; a gradient points uphill": lambda **case: -right(**case),
    }


def merge_rslora(function: Callable) -> None:
    """Checks `function(kernel, lora_a, lora_b, alpha)`: the kernel with an rsLoRA update added, (d_in, d_out)."""

    def right(kernel, lora_a, lora_b, alpha):
        update = sum(np.outer(column, row) for column, row in zip(lora_a.T, lora_b, strict=True))
        return kernel + alpha / math.sqrt(len(lora_b)) * update

    def with_scaling(scaling):
        return lambda kernel, lora_a, lora_b, alpha: kernel + scaling(alpha, *lora_a.shape) * lora_a @ lora_b

    slips = {
        "the scaling is LoRA's, alpha / rank": with_scaling(lambda alpha, d_in, rank: alpha / rank),
        "the update is scaled by alpha alone": with_scaling(lambda alpha, d_in, rank: alpha),
        "the scaling is forgotten": with_scaling(lambda alpha, d_in, rank: 1.0),
        "the root is taken of alpha too": with_scaling(lambda alpha, d_in, rank: math.sqrt(alpha / rank)),
        "the scaling multiplies by the root instead of dividing": with_scaling(
            lambda alpha, d_in, rank: alpha * math.sqrt(rank)
        ),
        "the root is taken of d_in, not of the rank": with_scaling(lambda alpha, d_in, rank: alpha / math.sqrt(d_in)),
        "the update alone is returned": lambda kernel, lora_a, lora_b, alpha: (
            alpha / math.sqrt(len(lora_b)) * lora_a @ lora_b
        ),
        "the update is taken out, as in unmerging": with_scaling(lambda alpha, d_in, rank: -alpha / math.sqrt(rank)),
    }
    verdict("merge_rslora", function, _cases(("kernel", "lora_a", "lora_b"), alpha=_odd), right, slips)


def common_rank(function: Callable) -> None:
    """Checks `function(spectra, share)`: the smallest rank at which every update keeps that share of its energy."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = [
        {"spectra": [np.array([2.0, 1.0, 1.0, 1.0, 1.0]), np.array([1.0, 0.1])], "share": 0.5}
    ]
    for _ in range(19):
        spectra = [np.sort(rng.uniform(0.1, 3.0, int(rng.integers(5, 9))) ** 2)[::-1].copy() for _ in range(4)]
        cases.append({"spectra": spectra, "share": round(float(rng.uniform(0.6, 0.97)), 2)})

    def needed(values, share):
        squares = [float(value) ** 2 for value in values]
        return next(r for r in range(1, len(squares) + 1) if sum(squares[:r]) >= share * sum(squares))

    def right(spectra, share):
        return max(needed(values, share) for values in spectra)

    def summed(spectra, share):
        total = np.zeros(max(map(len, spectra)))
        for values in spectra:
            total[: len(values)] += np.square(values)
        return needed(np.sqrt(total), share)

    slips = {
        "one update is enough; all of them must keep the share": lambda spectra, share: min(
            needed(values, share) for values in spectra
        ),
        "only the first update is looked at": lambda spectra, share: needed(spectra[0], share),
        "only the last update is looked at": lambda spectra, share: needed(spectra[-1], share),
        "the updates' ranks are averaged": lambda spectra, share: float(
            np.mean([needed(values, share) for values in spectra])
        ),
        "the singular values are summed without squaring": lambda spectra, share: right(
            [np.sqrt(values) for values in spectra], share
        ),
        "the rank is one too small: the count starts at 0": lambda spectra, share: right(spectra, share) - 1,
        "the energies of all updates are thrown together": summed,
        "the ranks are added up": lambda spectra, share: sum(needed(values, share) for values in spectra),
    }
    verdict("common_rank", function, cases, right, slips)


def choose_rank(function: Callable) -> None:
    """Checks `function(losses, tolerance)`: the smallest rank whose loss is within `tolerance` of the best, relatively.

    `losses` is `{rank: validation loss}`; within 0.05 means at most 1.05 times the smallest loss.
    """
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = [{"losses": {16: 0.2, 1: 0.25, 4: 0.2}, "tolerance": 0.0}]
    for _ in range(24):
        ranks = rng.permutation([1, 2, 4, 8, 16, 32])[:5]
        losses = {int(r): round(float(0.2 + 0.3 / r + rng.uniform(0, 0.08)), 4) for r in ranks}
        cases.append({"losses": losses, "tolerance": round(float(rng.uniform(0.02, 0.4)), 3)})

    def within(limit, choose):
        def pick(losses, tolerance):
            return choose([rank for rank, loss in losses.items() if loss <= limit(min(losses.values()), tolerance)])

        return pick

    def relative(best, tolerance):
        return best * (1 + tolerance)

    slips = {
        "the rank of the smallest loss is returned; a smaller rank may be good enough": lambda losses, tolerance: min(
            losses, key=lambda rank: losses[rank]
        ),
        "the largest such rank is returned": within(relative, max),
        "the first such rank is returned; the dictionary is in no order": within(relative, lambda ranks: ranks[0]),
        "the tolerance is added to the loss; it is relative": within(lambda best, tolerance: best + tolerance, min),
        "the largest rank is taken for the best one": lambda losses, tolerance: min(
            rank for rank, loss in losses.items() if loss <= losses[max(losses)] * (1 + tolerance)
        ),
        "the loss is returned, not its rank": lambda losses, tolerance: losses[
            within(relative, min)(losses, tolerance)
        ],
        "the smallest rank is returned whatever its loss": lambda losses, tolerance: min(losses),
    }
    verdict("choose_rank", function, cases, within(relative, min), slips)
