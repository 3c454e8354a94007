"""Checkers of lesson 03's exercises. Each compares with a computation of its own, exact or in numpy."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from gemma_lora.checks.verdict import number_verdict, verdict

_SEED = 3


def rank_by_hand(answer: int | None) -> None:
    """Checks the rank of [[1, 2, 0, 1], [2, 4, 1, 3], [3, 6, 1, 4]].

    Args:
        answer: The rank, or None or `...` while there is none.
    """
    slips: dict[float, str] = {
        0: "only the zero matrix has rank 0",
        1: "row 2 is no multiple of row 1",
        3: "one of the three rows is a sum of the other two",
        4: "there are only three rows, and the rank is at most the smaller of rows and columns",
    }
    praise, hint = "rank 2. Row 3 is row 1 plus row 2.", "count the rows that are left after elimination"
    number_verdict("rank_by_hand", answer, 2, praise, slips, hint)


def eliminate(function: Callable) -> None:
    """Checks `function(matrix, row, pivot_row, column)`: the matrix after `row` has got a zero in `column`."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    while len(cases) < 20:
        m, n = (int(size) for size in rng.integers(3, 5, 2))
        row, pivot_row = (int(i) for i in rng.permutation(m)[:2])
        column = int(rng.integers(0, n))
        matrix = rng.integers(-5, 6, (m, n)).astype(float)
        above, below = matrix[pivot_row, column], matrix[row, column]
        if above * below and abs(above) != abs(below):  # else inverted and forgotten factors would not show
            cases.append({"matrix": matrix, "row": row, "pivot_row": pivot_row, "column": column})

    def right(matrix, row, pivot_row, column):
        exact = [[Fraction(x) for x in line] for line in matrix.tolist()]
        factor = exact[row][column] / exact[pivot_row][column]
        exact[row] = [x - factor * p for x, p in zip(exact[row], exact[pivot_row], strict=True)]
        return np.array(exact, float)

    def with_row(change):
        def slip(matrix, row, pivot_row, column):
            matrix[row] = change(matrix[row], matrix[pivot_row], matrix[row, column], matrix[pivot_row, column])
            return matrix

        return slip

    def wrong_row(matrix, row, pivot_row, column):
        return right(matrix, pivot_row, row, column)

    slips = {
        "the multiple is added, not subtracted": with_row(lambda r, p, x, pivot: r + x / pivot * p),
        "the pivot row is subtracted once, whatever the entries are": with_row(lambda r, p, x, pivot: r - p),
        "the factor is upside down: it is the entry over the pivot": with_row(lambda r, p, x, pivot: r - pivot / x * p),
        "the factor is the entry alone; it must be divided by the pivot": with_row(lambda r, p, x, pivot: r - x * p),
        "the sign of the whole row is turned": with_row(lambda r, p, x, pivot: x / pivot * p - r),
        "the pivot row is changed; it stays, and `row` changes": wrong_row,
        "one row is returned; the whole matrix is asked for": lambda matrix, row, pivot_row, column: right(
            matrix, row, pivot_row, column
        )[row],
        "only the one entry is set to zero; the rest of the row changes too": lambda matrix, row, pivot_row, column: (
            np.where(_only(matrix.shape, row, column), 0, matrix)
        ),
    }
    verdict("eliminate", function, cases, right, slips)


def largest_saving_rank(function: Callable) -> None:
    """Checks `function(d_in, d_out)`: the largest rank whose two factors hold fewer numbers than the matrix."""
    rng = np.random.default_rng(_SEED)
    shapes = [*rng.integers(2, 60, (14, 2)).tolist(), [4, 4], [4, 12], [6, 3], [640, 2048], [3, 3], [2, 2]]
    cases = [{"d_in": int(a), "d_out": int(b)} for a, b in shapes]

    def right(d_in, d_out):
        saving = [rank for rank in range(min(d_in, d_out) + 1) if rank * d_in + rank * d_out < d_in * d_out]
        return saving[-1]

    slips = {
        "a rank with as many numbers as the matrix counts; fewer are asked for": lambda d_in, d_out: (
            d_in * d_out // (d_in + d_out)
        ),
        "the break-even rank is rounded, not taken down": lambda d_in, d_out: round(d_in * d_out / (d_in + d_out)),
        "the break-even rank itself is returned; a rank is an integer": lambda d_in, d_out: (
            d_in * d_out / (d_in + d_out)
        ),
        "one factor alone is counted": lambda d_in, d_out: d_out - 1,
        "the shorter side is returned; factors that thick are no saving": lambda d_in, d_out: min(d_in, d_out),
        "half of the shorter side is returned; that is right for square matrices only": lambda d_in, d_out: (
            (min(d_in, d_out) - 1) // 2
        ),
    }
    verdict("largest_saving_rank", function, cases, right, slips)


def rank_with_tolerance(function: Callable) -> None:
    """Checks `function(matrix)`: the numerical rank in float64, with tolerance max(m, n) · eps · σ1."""
    rng = np.random.default_rng(_SEED)
    cases = [{"matrix": np.zeros((2, 3))}]
    for scale in (1e-18, 1e-9, 1.0, 1e9, 1e18):
        for _ in range(3):
            m, n = (int(size) for size in rng.integers(4, 9, 2))
            rank = int(rng.integers(1, min(m, n)))
            cases.append({"matrix": scale * rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))})
    for shape, factor in (((2, 8), 4), ((8, 2), 4), ((2, 8), 1.5), ((2, 8), 16)):  # below the tolerance, and above
        matrix = np.zeros(shape)
        matrix[0, 0], matrix[1, 1] = 1.0, factor * np.finfo(float).eps
        cases.append({"matrix": matrix})

    def right(matrix):
        return int(np.linalg.matrix_rank(matrix))

    def above(tolerance):
        def slip(matrix):
            values = np.linalg.svd(matrix)[1]
            return int((values > tolerance(matrix.shape, np.finfo(float).eps, values[0])).sum())

        return slip

    slips = {
        "no tolerance is used: rounding errors count": above(lambda shape, eps, largest: 0.0),
        "the tolerance does not grow with the largest singular value": above(
            lambda shape, eps, largest: max(shape) * eps
        ),
        "the tolerance does not grow with the matrix's longer side": above(lambda shape, eps, largest: eps * largest),
        "the tolerance uses the shorter side": above(lambda shape, eps, largest: min(shape) * eps * largest),
        "the tolerance is float32's; these are float64": above(
            lambda shape, eps, largest: max(shape) * np.finfo(np.float32).eps * largest
        ),
        "the number of singular values is returned; some of them are zero": lambda matrix: min(matrix.shape),
        "one fixed tolerance serves all scales: 1e-6": above(lambda shape, eps, largest: 1e-6),
        "one fixed tolerance serves all scales: 1e-8": above(lambda shape, eps, largest: 1e-8),
        "one fixed tolerance serves all scales: 1e-10": above(lambda shape, eps, largest: 1e-10),
        "one fixed tolerance serves all scales: 1e-12": above(lambda shape, eps, largest: 1e-12),
    }
    verdict("rank_with_tolerance", function, cases, right, slips)


def best_of_rank(function: Callable) -> None:
    """Checks `function(matrix, rank)`: the nearest matrix of that rank, (d_in, d_out)."""
    rng = np.random.default_rng(_SEED)
    cases = []
    for _ in range(20):
        d_in, d_out = (int(size) for size in rng.integers(4, 7, 2))
        cases.append({"matrix": rng.normal(size=(d_in, d_out)), "rank": int(rng.integers(1, min(d_in, d_out) - 1))})

    def right(matrix, rank):
        # Without SVD: the rows projected on the leading eigenvectors of the symmetric matrix AᵀA.
        _, vectors = np.linalg.eigh(matrix.T @ matrix)  # ascending eigenvalues
        leading = vectors[:, len(vectors) - rank :]
        return matrix @ leading @ leading.T

    def kept(which, power=1.0):
        def slip(matrix, rank):
            u, values, vt = np.linalg.svd(matrix, full_matrices=False)
            return (u[:, which(rank)] * values[which(rank)] ** power) @ vt[which(rank)]

        return slip

    def padded(matrix, rank):
        cut = np.zeros_like(matrix)
        cut[:rank] = matrix[:rank]
        return cut

    def first(rank):
        return slice(rank)

    slips = {
        "one singular value too many is kept": kept(lambda rank: slice(rank + 1)),
        "one singular value too few is kept": kept(lambda rank: slice(rank - 1)),
        "the smallest singular values are kept; numpy gives the largest first": kept(lambda rank: slice(-rank, None)),
        "what is dropped is returned, not what is kept": kept(lambda rank: slice(rank, None)),
        "the singular values are left out": kept(first, power=0.0),
        "the singular values come in twice, once with either factor": kept(first, power=2.0),
        "only the square roots of the singular values come in": kept(first, power=0.5),
        "the first rows are kept; that has the rank, but it is not the nearest": padded,
        "the result is transposed": lambda matrix, rank: right(matrix, rank).T,
    }
    verdict("best_of_rank", function, cases, right, slips)


def rank_for_energy(function: Callable) -> None:
    """Checks `function(singular_values, share)`: the smallest rank that captures at least that share of the energy."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = [
        {"singular_values": np.array([2.0, 1.0, 1.0, 1.0, 1.0]), "share": 0.5},  # met exactly
        {"singular_values": np.array([1.0, 1.0]), "share": 1.0},
    ]
    for _ in range(18):
        values = np.sort(rng.uniform(0.1, 3.0, int(rng.integers(4, 10))))[::-1].copy()
        cases.append({"singular_values": values, "share": round(float(rng.uniform(0.3, 0.97)), 2)})

    def right(singular_values, share):
        squares = [float(value) ** 2 for value in singular_values]
        return next(r for r in range(len(squares) + 1) if sum(squares[:r]) >= share * sum(squares))

    def shares(values):
        return np.cumsum(values) / np.sum(values)

    slips = {
        "the singular values are summed without squaring": lambda singular_values, share: (
            int(np.argmax(shares(singular_values) >= share)) + 1
        ),
        "the rank is one too small: the count starts at 0": lambda singular_values, share: int(
            np.argmax(shares(singular_values**2) >= share)
        ),
        "the rank is one too large": lambda singular_values, share: right(singular_values, share) + 1,
        "the small singular values are summed first": lambda singular_values, share: (
            int(np.argmax(shares(singular_values[::-1] ** 2) >= share)) + 1
        ),
        "the share of what is left out is compared": lambda singular_values, share: (
            int(np.argmax(shares(singular_values**2) >= 1 - share)) + 1
        ),
        "a share that is met exactly does not count": lambda singular_values, share: min(
            int(np.sum(shares(singular_values**2) <= share)) + 1, len(singular_values)
        ),
    }
    verdict("rank_for_energy", function, cases, right, slips)


def update_spectrum(function: Callable) -> None:
    """Checks `function(lora_a, lora_b, scaling)`: the update's min(d_in, rank, d_out) leading singular values."""
    rng = np.random.default_rng(_SEED)
    cases: list[dict[str, Any]] = []
    for _ in range(20):
        rank = int(rng.integers(2, 4))
        d_in, d_out = (int(size) for size in rng.integers(4, 8, 2))
        cases.append({"lora_a": rng.normal(size=(d_in, rank)), "lora_b": rng.normal(size=(rank, d_out))})
        cases[-1]["scaling"] = float(rng.integers(2, 9)) / 4 + 0.1

    def full(lora_a, lora_b, scaling):
        return np.linalg.svd(scaling * lora_a @ lora_b, compute_uv=False)

    def right(lora_a, lora_b, scaling):
        return full(lora_a, lora_b, scaling)[: lora_a.shape[1]]

    def of_each(lora_a, lora_b, scaling):
        return scaling * full(lora_a, np.eye(len(lora_b)), 1.0) * full(np.eye(len(lora_b)), lora_b, 1.0)

    def core(lora_a, lora_b, scaling):
        return scaling * np.linalg.qr(lora_a)[1] @ np.linalg.qr(lora_b.T)[1].T

    slips = {
        "the scaling is forgotten": lambda lora_a, lora_b, scaling: right(lora_a, lora_b, 1.0),
        "the scaling comes in twice": lambda lora_a, lora_b, scaling: right(lora_a, lora_b, scaling**2),
        "the squares are returned: eigenvalues, whose square roots are the singular values": (
            lambda lora_a, lora_b, scaling: right(lora_a, lora_b, scaling) ** 2
        ),
        "singular values of A and B are multiplied; those of a product are not that": of_each,
        "the smallest comes first": lambda lora_a, lora_b, scaling: right(lora_a, lora_b, scaling)[::-1],
        "the whole product was decomposed: all values past the rank are zero, and not asked for": full,
        "the core's diagonal is returned, not its singular values": lambda lora_a, lora_b, scaling: np.abs(
            np.diag(core(lora_a, lora_b, scaling))
        ),
        "only A is decomposed": lambda lora_a, lora_b, scaling: full(lora_a, np.eye(len(lora_b)), scaling),
    }
    verdict("update_spectrum", function, cases, right, slips)


def _only(shape: tuple[int, int], row: int, column: int) -> np.ndarray:
    cells = np.zeros(shape, bool)
    cells[row, column] = True
    return cells
