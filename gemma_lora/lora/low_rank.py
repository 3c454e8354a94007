"""Rank of a matrix, exact and numerical, and the best approximation of a given rank, on plain numpy arrays.

A matrix (d_in, d_out) of rank r has r linearly independent rows, and as many columns. It is a product of two thin
matrices, (d_in, r) and (r, d_out), and of none thinner. Its singular values σ1 ≥ σ2 ≥ … are zero past the r-th.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """One row operation, as "R3 − 2·R1" (row 3 loses twice row 1, counted from 1), and the matrix after it."""

    text: str
    matrix: np.ndarray  # (m, n)


class EchelonForm(NamedTuple):
    """A matrix whose row i has its first nonzero entry, its pivot, in column `pivots[i]`, and the way to it.

    Invariants: `pivots` increase; rows from `rank` on are zero.
    """

    matrix: np.ndarray  # (m, n)
    pivots: list[int]
    steps: list[Step]

    @property
    def rank(self) -> int:
        """The number of pivots."""
        return len(self.pivots)


class TruncatedSVD(NamedTuple):
    """The best approximation of rank r, `left @ right`; column i of `left` and row i of `right` have length √σi."""

    left: np.ndarray  # (d_in, r)
    right: np.ndarray  # (r, d_out)
    singular_values: np.ndarray  # (min(d_in, d_out),): all of them, the dropped ones too


def row_echelon_form(matrix: Any) -> EchelonForm:
    """Brings a matrix to row echelon form by exchanging rows and subtracting multiples of one from another.

    Neither operation changes the rank, which is then the number of rows that are not zero. Integers and
    `fractions.Fraction` are computed exactly; the pivot is the first entry that is not zero, as by hand. With floats
    it is the largest of its column (partial pivoting): factors are at most 1, and rounding errors stay small. They do
    not vanish, so of a float matrix ask `numerical_rank`.

    Args:
        matrix: (m, n), integers, Fractions or floats. The form is in Fractions (dtype object) or float64.

    Raises:
        ValueError: If `matrix` is not a matrix of finite numbers.

    Example:

    >>> form = row_echelon_form([[1, 2, 3], [1, 4, 2], [2, 6, 5]])
    >>> form.rank, [step.text for step in form.steps]
    (2, ['R2 − R1', 'R3 − 2·R1', 'R3 − R2'])

    Reference: Golub and Van Loan 2013, Matrix Computations, section 3.4. Matrices are square there; here a
    column without a pivot is passed over.
    """
    rows, exact = _exact_or_float(matrix)
    pivots: list[int] = []
    steps: list[Step] = []
    for column in range(rows.shape[1]):
        top = len(pivots)
        size = np.abs(rows[top:, column])
        if not size.any():
            continue
        best = top + int(np.argmax(size != 0 if exact else size))  # argmax is the first of equals
        if best != top:
            rows[[top, best]] = rows[[best, top]]
            steps.append(Step(f"R{top + 1} ↔ R{best + 1}", rows.copy()))
        for row in range(top + 1, len(rows)):
            if rows[row, column] != 0:
                factor = rows[row, column] / rows[top, column]
                rows[row] = rows[row] - factor * rows[top]
                rows[row, column] = Fraction(0)  # floats may have left a rounding error
                steps.append(Step(f"R{row + 1} {_times(factor)}R{top + 1}", rows.copy()))
        pivots.append(column)
    return EchelonForm(rows, pivots, steps)


def numerical_rank(matrix: Any, tolerance: float | None = None) -> int:
    """Counts the singular values above a tolerance.

    Rounding turns singular values that are zero into small ones, of about eps·σ1 and more in larger matrices. Hence
    the default, numpy's and MATLAB's: tolerance = max(m, n) · eps · σ1. It is for matrices that are exact but for
    rounding in their own dtype. Where entries carry a larger error (noise, or values that were bfloat16 once), give a
    tolerance of that error's size.

    Args:
        matrix: (m, n). float32 stays float32, with its eps of 1.2e-7; all else becomes float64, with 2.2e-16.
        tolerance: Float, in the matrix's unit; singular values of at most this size count as zero.

    Raises:
        ValueError: If `matrix` is not a matrix of finite numbers or `tolerance` is negative.

    Example:

    >>> numerical_rank([[0.1, 0.5], [0.2, 1.0]]), numerical_rank([[1.0, 0.0], [0.0, 0.01]], tolerance=0.1)
    (1, 1)

    Reference: Golub and Van Loan 2013, section 5.4.1; they leave the factor before eps to the user.
    """
    values = _float_matrix("matrix", matrix)
    singular_values = np.linalg.svd(values, compute_uv=False)
    if tolerance is None:
        tolerance = max(values.shape) * np.finfo(values.dtype).eps * float(singular_values[0])
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least 0. Received: tolerance={tolerance!r}")
    return int(np.count_nonzero(singular_values > tolerance))


def truncated_svd(matrix: Any, rank: int) -> TruncatedSVD:
    """Computes the matrix of rank `rank` that lies nearest to a given one, as a `TruncatedSVD` of two thin factors.

    From matrix = U Σ Vᵀ the largest `rank` singular values are kept: left = U_r √Σ_r, right = √Σ_r V_rᵀ. No matrix of
    that rank is nearer, in the Frobenius norm or the spectral one.

    Args:
        matrix: (d_in, d_out), a dtype as in `numerical_rank`.
        rank: Integer from 1 to min(d_in, d_out).

    Raises:
        ValueError: If `matrix` is not a matrix of finite numbers or `rank` is out of range.

    Example:

    >>> left, right, singular_values = truncated_svd([[3.0, 0.0], [0.0, 1.0]], rank=1)
    >>> np.abs(left @ right).round(6).tolist(), singular_values.tolist()
    ([[3.0, 0.0], [0.0, 0.0]], [3.0, 1.0])

    Reference: Eckart and Young 1936; Golub and Van Loan 2013, section 2.4. √Σ goes to either side as in PiSSA (Meng
    et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 and 3).
    """
    values = _float_matrix("matrix", matrix)
    _check_integer("rank", rank, 1, min(values.shape))
    u, singular_values, vt = np.linalg.svd(values, full_matrices=False)
    root = np.sqrt(singular_values[:rank])
    return TruncatedSVD(u[:, :rank] * root, root[:, None] * vt[:rank], singular_values)


def approximation_error(singular_values: Any, rank: int) -> float:
    """Frobenius norm of what the best approximation of a rank leaves out.

    error² = σ²_{rank+1} + σ²_{rank+2} + …, the dropped singular values squared.

    Args:
        singular_values: (k,), the matrix's, from the largest down.
        rank: Integer from 0 (everything is dropped) to k.

    Raises:
        ValueError: If the values are not at least 0 and in order, or `rank` is out of range.

    Example:

    >>> approximation_error([5.0, 4.0, 3.0], rank=1)
    5.0

    Reference: Eckart and Young 1936. Golub and Van Loan's theorem is about the spectral norm, which is σ_{rank+1}.
    """
    values = _check_singular_values(singular_values)
    _check_integer("rank", rank, 0, len(values))
    return float(np.sqrt(np.sum(values[rank:] ** 2)))


def energy_captured(singular_values: Any, rank: int) -> float:
    """Share of the matrix's squared entries that the best approximation of a rank keeps.

    (σ²_1 + … + σ²_rank) / (σ²_1 + … + σ²_k), which is 1 − error² / ‖matrix‖².
    Arguments and errors are `approximation_error`'s. The zero matrix gives 1: nothing of it can be lost.

    Example:

    >>> energy_captured([2.0, 1.0, 0.0], rank=1)
    0.8
    """
    values = _check_singular_values(singular_values)
    _check_integer("rank", rank, 0, len(values))
    total = np.sum(values**2)
    return float(np.sum(values[:rank] ** 2) / total) if total else 1.0


def parameters_of_rank(d_in: int, d_out: int, rank: int) -> int:
    """Numbers in two factors (d_in, rank) and (rank, d_out): rank · (d_in + d_out).

    Raises:
        ValueError: If an argument is not an integer of at least 1.

    Example:

    >>> parameters_of_rank(640, 2048, rank=16), 640 * 2048
    (43008, 1310720)

    Reference: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, section 5.1, where kernels are square.
    """
    for name, value in {"d_in": d_in, "d_out": d_out, "rank": rank}.items():
        _check_integer(name, value, 1)
    return int(rank) * (int(d_in) + int(d_out))


def break_even_rank(d_in: int, d_out: int) -> float:
    """The rank at which two factors hold as many numbers as the matrix: d_in · d_out / (d_in + d_out).

    Below it the factors are smaller, above it larger. Errors are `parameters_of_rank`'s.

    Example:

    >>> break_even_rank(3, 3)
    1.5
    """
    total = parameters_of_rank(d_in, d_out, 1)  # checks both
    return int(d_in) * int(d_out) / total


def spectrum_of_update(lora_a: Any, lora_b: Any, scaling: float = 1.0) -> np.ndarray:
    """Singular values of a LoRA update scaling · A @ B, without forming the product.

    With A = Q_a R_a and Bᵀ = Q_b R_b (QR), A B = Q_a (R_a R_bᵀ) Q_bᵀ. The Q's have orthonormal columns and leave
    singular values alone, so the small core R_a R_bᵀ has the update's. The cost grows with (d_in + d_out) · rank².

    Args:
        lora_a: (d_in, rank).
        lora_b: (rank, d_out).
        scaling: Float, alpha / rank in LoRA.

    Returns:
        (min(d_in, rank, d_out),) float64, from the largest down. The product's other singular values are zero.

    Raises:
        ValueError: If a factor is not a matrix of finite numbers, ranks differ, or `scaling` is not finite.

    Example:

    >>> spectrum_of_update([[3.0], [4.0]], [[0.0, 2.0, 0.0]], scaling=0.5).round(6).tolist()
    [5.0]

    Reference: Golub and Van Loan 2013, sections 2.4 (SVD) and 5.2 (QR).
    """
    a = _float_matrix("lora_a", lora_a).astype(np.float64)
    b = _float_matrix("lora_b", lora_b).astype(np.float64)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"`lora_b` must be (rank, d_out) with lora_a's rank. Received: {a.shape} and {b.shape}")
    if not np.isfinite(scaling):
        raise ValueError(f"`scaling` must be a finite number. Received: scaling={scaling!r}")
    _, r_a = np.linalg.qr(a)  # (min(d_in, rank), rank)
    _, r_b = np.linalg.qr(b.T)  # (min(d_out, rank), rank)
    return np.linalg.svd(scaling * r_a @ r_b.T, compute_uv=False)


def _exact_or_float(matrix: Any) -> tuple[np.ndarray, bool]:
    """A copy of a matrix in Fractions, or in float64 where it holds floats; and whether it is exact."""
    values = _matrix("matrix", matrix)
    if not all(isinstance(x, int | np.integer | Fraction) for x in values.flat):
        return _float_matrix("matrix", matrix).astype(np.float64), False
    return np.array([[Fraction(str(x)) for x in row] for row in values], object), True


def _float_matrix(name: str, value: Any) -> np.ndarray:
    values = _matrix(name, value)
    values = values.astype(np.float32 if values.dtype == np.float32 else np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"`{name}` must hold finite numbers. Received: {(~np.isfinite(values)).sum()} that are not")
    return values


def _matrix(name: str, value: Any) -> np.ndarray:
    values = np.asarray(value)
    if values.ndim != 2 or not values.size or values.dtype.kind in "cUSMm":
        what = f"shape={values.shape}, dtype={values.dtype}"
        raise ValueError(f"`{name}` must be a matrix of real numbers, not empty. Received: {what}")
    return values


def _check_singular_values(values: Any) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all() or array[-1] < 0 or (np.diff(array) > 0).any():
        raise ValueError(f"`singular_values` must be numbers of at least 0 from the largest down. Received: {values!r}")
    return array


def _check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be an integer {wanted}. Received: {name}={value!r}")


def _times(factor: Any) -> str:
    """A subtracted multiple as one writes it: "− ", "− 2·", "+ 1/2·"."""
    size = str(abs(factor)) if isinstance(factor, Fraction) else f"{abs(factor):.4g}"
    return ("− " if factor > 0 else "+ ") + ("" if size == "1" else f"{size}·")
