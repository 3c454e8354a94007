"""Lesson 03's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import numpy as np
import pytest

from tests.checker_rules import CheckerRules, said_by

EPS = np.finfo(float).eps


def eliminate_in_place(matrix, row, pivot_row, column):
    matrix[row] -= matrix[row, column] / matrix[pivot_row, column] * matrix[pivot_row]
    return matrix


def eliminate_by_product(matrix, row, pivot_row, column):
    operation = np.eye(len(matrix))
    operation[row, pivot_row] = -matrix[row, column] / matrix[pivot_row, column]
    return (operation @ matrix).tolist()


def eliminate_with(change):
    def function(matrix, row, pivot_row, column):
        matrix[row] = change(matrix[row], matrix[pivot_row], matrix[row, column], matrix[pivot_row, column])
        return matrix

    return function


def saving_by_loop(d_in, d_out):
    rank = 0
    while (rank + 1) * (d_in + d_out) < d_in * d_out:
        rank += 1
    return rank


def rank_by_count(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    return sum(value > max(matrix.shape) * EPS * values[0] for value in values)


def rank_above(tolerance):
    return lambda matrix: int(np.sum(np.linalg.svd(matrix)[1] > tolerance(matrix)))


def best_by_sum(matrix, rank):
    u, values, vt = np.linalg.svd(matrix)
    return sum(values[i] * np.outer(u[:, i], vt[i]) for i in range(rank))


def best_by_zeroing(matrix, rank):
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    values[rank:] = 0
    return u @ np.diag(values) @ vt


def best_without_values(matrix, rank):
    u, _, vt = np.linalg.svd(matrix)
    return u[:, :rank] @ vt[:rank]


def first_rows(matrix, rank):
    matrix[rank:] = 0
    return matrix


def energy_by_loop(singular_values, share):
    total, so_far, rank = sum(value**2 for value in singular_values), 0.0, 0
    while so_far < share * total:
        so_far += singular_values[rank] ** 2
        rank += 1
    return rank


def spectrum_by_qr(lora_a, lora_b, scaling):
    core = np.linalg.qr(lora_a)[1] @ np.linalg.qr(lora_b.T)[1].T
    return scaling * np.linalg.svd(core)[1]


def spectrum_by_eigenvalues(lora_a, lora_b, scaling):
    values = np.linalg.eigvals((lora_a.T @ lora_a) @ (lora_b @ lora_b.T)).real
    return [scaling * value**0.5 for value in sorted(values, reverse=True)]


def values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


#: Exercise -> two right functions, written differently.
RIGHT = {
    "eliminate": [eliminate_in_place, eliminate_by_product],
    "largest_saving_rank": [lambda d_in, d_out: (d_in * d_out - 1) // (d_in + d_out), saving_by_loop],
    "rank_with_tolerance": [rank_by_count, lambda matrix: np.linalg.matrix_rank(matrix)],
    "best_of_rank": [best_by_sum, best_by_zeroing],
    "rank_for_energy": [
        energy_by_loop,
        lambda singular_values, share: (
            np.searchsorted(np.cumsum(singular_values**2), share * np.sum(singular_values**2)) + 1
        ),
    ],
    "update_spectrum": [spectrum_by_qr, spectrum_by_eigenvalues],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "eliminate": [
        (eliminate_with(lambda r, p, x, pivot: r + x / pivot * p), "added, not subtracted"),
        (eliminate_with(lambda r, p, x, pivot: r - p), "subtracted once"),
        (eliminate_with(lambda r, p, x, pivot: r - pivot / x * p), "upside down"),
        (eliminate_with(lambda r, p, x, pivot: r - x * p), "divided by the pivot"),
        (eliminate_with(lambda r, p, x, pivot: x / pivot * p - r), "sign of the whole row"),
        (lambda matrix, row, pivot_row, column: eliminate_in_place(matrix, pivot_row, row, column), "`row` changes"),
        (lambda matrix, row, pivot_row, column: eliminate_in_place(matrix, row, pivot_row, column)[row], "one row"),
        (lambda matrix, row, pivot_row, column: matrix * (matrix != matrix[row, column]), "expected"),
        (lambda matrix, row, pivot_row, column: matrix * (np.arange(len(matrix)) != row)[:, None], "expected"),
    ],
    "largest_saving_rank": [
        (lambda d_in, d_out: d_in * d_out // (d_in + d_out), "fewer are asked for"),
        (lambda d_in, d_out: round(d_in * d_out / (d_in + d_out)), "rounded"),
        (lambda d_in, d_out: d_in * d_out / (d_in + d_out), "integer"),
        (lambda d_in, d_out: d_out - 1, "one factor"),
        (min, "raised TypeError"),
        (lambda d_in, d_out: min(d_in, d_out), "shorter side"),
        (lambda d_in, d_out: (min(d_in, d_out) - 1) // 2, "square matrices only"),
        (lambda d_in, d_out: d_in + d_out, "expected"),
    ],
    "rank_with_tolerance": [
        (rank_above(lambda matrix: 0), "no tolerance"),
        (rank_above(lambda matrix: max(matrix.shape) * EPS), "largest singular value"),
        (rank_above(lambda matrix: EPS * values(matrix)[0]), "longer side"),
        (rank_above(lambda matrix: min(matrix.shape) * EPS * values(matrix)[0]), "shorter side"),
        (rank_above(lambda matrix: 1e-6), "1e-6"),
        (rank_above(lambda matrix: 1e-10), "1e-10"),
        (rank_above(lambda matrix: max(matrix.shape) * 1.1920929e-07 * values(matrix)[0]), "float32"),
        (lambda matrix: min(matrix.shape), "number of singular values"),
        (lambda matrix: rank_by_count(matrix) + 1, "expected"),
    ],
    "best_of_rank": [
        (lambda matrix, rank: best_by_sum(matrix, rank + 1), "too many"),
        (lambda matrix, rank: best_by_zeroing(matrix, rank - 1), "too few"),
        (lambda matrix, rank: matrix - best_by_sum(matrix, min(matrix.shape) - rank), "smallest"),
        (lambda matrix, rank: matrix - best_by_sum(matrix, rank), "dropped is returned"),
        (best_without_values, "left out"),
        (first_rows, "not the nearest"),
        (lambda matrix, rank: best_by_sum(matrix, rank).T, "transposed"),
        (lambda matrix, rank: matrix[:, :rank] @ matrix[:rank], "expected"),
        (lambda matrix, rank: matrix, "expected"),
    ],
    "rank_for_energy": [
        (lambda singular_values, share: energy_by_loop(np.sqrt(singular_values), share), "without squaring"),
        (lambda singular_values, share: energy_by_loop(singular_values, share) - 1, "one too small"),
        (lambda singular_values, share: energy_by_loop(singular_values, share) + 1, "one too large"),
        (lambda singular_values, share: energy_by_loop(singular_values[::-1], share), "small singular values"),
        (lambda singular_values, share: energy_by_loop(singular_values, 1 - share) or 1, "left out"),
        (lambda singular_values, share: energy_by_loop(singular_values, min(share + 1e-9, 1)), "met exactly"),
        (lambda singular_values, share: round(share * len(singular_values)), "expected"),
    ],
    "update_spectrum": [
        (lambda lora_a, lora_b, scaling: spectrum_by_qr(lora_a, lora_b, 1.0), "scaling is forgotten"),
        (lambda lora_a, lora_b, scaling: spectrum_by_qr(scaling * lora_a, scaling * lora_b, 1.0), "twice"),
        (lambda lora_a, lora_b, scaling: spectrum_by_qr(lora_a, lora_b, scaling) ** 2, "squares"),
        (lambda lora_a, lora_b, scaling: scaling * values(lora_a) * values(lora_b), "A and B are multiplied"),
        (lambda lora_a, lora_b, scaling: spectrum_by_qr(lora_a, lora_b, scaling)[::-1], "smallest comes first"),
        (lambda lora_a, lora_b, scaling: values(scaling * lora_a @ lora_b), "whole product"),
        (lambda lora_a, lora_b, scaling: scaling * values(lora_a), "only A"),
        (lambda lora_a, lora_b, scaling: scaling * values(lora_b), "expected"),
    ],
}  # fmt: skip


class TestLesson03(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_03", "rank_by_hand", RIGHT, WRONG


def test_the_rank_by_hand_is_the_one_numpy_finds(capsys):
    rank = np.linalg.matrix_rank([[1, 2, 0, 1], [2, 4, 1, 3], [3, 6, 1, 4]])
    for answer in (rank, int(rank), float(rank)):
        assert "✓" in said_by(capsys, "rank_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (0, "zero matrix"),
        (1, "no multiple"),
        (3, "sum of the other two"),
        (4, "three rows"),
        (7, "count"),
        ("x", "number"),
    ],
)
def test_a_wrong_rank_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "rank_by_hand", answer)
    assert "✗" in text and said in text
