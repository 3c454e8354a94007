"""low_rank.py against numpy.linalg, exact fractions and the theorems about rank."""

from fractions import Fraction

import numpy as np
import pytest

from gemma_lora.lora.low_rank import (
    approximation_error,
    break_even_rank,
    energy_captured,
    numerical_rank,
    parameters_of_rank,
    row_echelon_form,
    spectrum_of_update,
    truncated_svd,
)

NOTES = [[1, 2, 3], [0, 4, 2], [2, 6, 5]]
MEANT = [[1, 2, 3], [1, 4, 2], [2, 6, 5]]
SEEDS = range(12)


def of_rank(rng, m, n, rank):
    """A random integer matrix (m, n) whose rank is `rank`, by its construction."""
    left = np.vstack([np.eye(rank, dtype=int), rng.integers(-3, 4, (m - rank, rank))])
    right = np.hstack([np.eye(rank, dtype=int), rng.integers(-3, 4, (rank, n - rank))])
    return rng.permutation(left) @ rng.permutation(right, axis=1)


def random_case(seed):
    rng = np.random.default_rng(seed)
    m, n = (int(size) for size in rng.integers(1, 9, 2))
    rank = int(rng.integers(0, min(m, n) + 1))
    return of_rank(rng, m, n, rank), rank


def determinant(rows):
    """Laplace's expansion: slow, exact, and without elimination."""
    if not rows:
        return Fraction(1)
    minors = [[row[:j] + row[j + 1 :] for row in rows[1:]] for j in range(len(rows))]
    return sum((-1) ** j * rows[0][j] * determinant(minor) for j, minor in enumerate(minors))


# --- row echelon form --------------------------------------------------------------------------------------


def test_the_notes_example_as_written_has_rank_3():
    form = row_echelon_form(NOTES)
    assert [step.text for step in form.steps] == ["R3 − 2·R1", "R3 − 1/2·R2"]
    assert form.matrix.tolist() == [[1, 2, 3], [0, 4, 2], [0, 0, -2]]
    assert form.rank == 3 and form.pivots == [0, 1, 2]


def test_the_notes_example_as_meant_has_rank_2():
    form = row_echelon_form(MEANT)
    assert [step.matrix.tolist() for step in form.steps] == [
        [[1, 2, 3], [0, 2, -1], [2, 6, 5]],
        [[1, 2, 3], [0, 2, -1], [0, 2, -1]],
        [[1, 2, 3], [0, 2, -1], [0, 0, 0]],
    ]
    assert form.rank == 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [int, Fraction, float])
def test_the_form_is_echelon_and_its_pivots_are_the_rank(seed, kind):
    matrix, rank = random_case(seed)
    rows = [[kind(int(x)) for x in row] for row in matrix]
    form = row_echelon_form(rows)
    if kind is not float:  # what elimination in floats leaves of a zero is numerical_rank's matter
        assert form.rank == rank == np.linalg.matrix_rank(matrix)
        assert all(isinstance(x, Fraction) for x in form.matrix.flat)
    assert form.pivots == sorted(set(form.pivots))
    for row, pivot in zip(form.matrix, form.pivots, strict=False):
        assert row[pivot] != 0 and not row[:pivot].any()
    assert not form.matrix[form.rank :].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_each_step_does_what_it_says(seed):
    matrix, _ = random_case(seed)
    before = np.array([[Fraction(int(x)) for x in row] for row in matrix], object)
    for text, after in row_echelon_form(matrix).steps:
        first, sign, rest = text.split(" ", 2)
        i, j = int(first[1:]) - 1, int(rest.split("R")[1]) - 1
        wanted = before.copy()
        if sign == "↔":
            wanted[[i, j]] = before[[j, i]]
        else:
            factor = Fraction(rest.split("·")[0]) if "·" in rest else Fraction(1)
            wanted[i] = before[i] - (factor if sign == "−" else -factor) * before[j]
        assert after.tolist() == wanted.tolist()
        before = after
    assert before.tolist() == row_echelon_form(matrix).matrix.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_full_square_matrix_keeps_its_determinant_but_for_exchanges(seed):
    matrix = np.random.default_rng(seed).integers(-4, 5, (4, 4))
    form = row_echelon_form(matrix)
    exchanges = sum("↔" in step.text for step in form.steps)
    assert (-1) ** exchanges * np.prod(np.diag(form.matrix)) == determinant(matrix.tolist())


def test_floats_take_the_largest_pivot():
    form = row_echelon_form([[1e-20, 1.0], [1.0, 1.0]])  # without exchange the second row would lose its 1
    assert form.steps[0].text == "R1 ↔ R2"
    assert form.matrix.tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_decimals_are_rank_2_in_fractions_and_3_in_floats():
    decimals = [["0.1", "0.5", "0.7"], ["0.2", "0.1", "0.3"], ["0.3", "0.6", "1.0"]]
    floats = [[float(x) for x in row] for row in decimals]
    assert row_echelon_form([[Fraction(x) for x in row] for row in decimals]).rank == 2
    assert row_echelon_form(floats).rank == 3
    assert numerical_rank(floats) == 2


def test_the_input_is_not_changed():
    matrix = np.array(MEANT, float)
    form = row_echelon_form(matrix)
    assert matrix.tolist() == MEANT
    assert form.steps[0].matrix is not form.steps[1].matrix


# --- numerical rank ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_rank_is_numpys_and_the_exact_one(seed, dtype):
    matrix, rank = random_case(seed)
    assert numerical_rank(matrix.astype(dtype)) == np.linalg.matrix_rank(matrix.astype(dtype)) == rank
    assert numerical_rank(matrix.T.astype(dtype)) == rank


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_tolerance_is_numpys_at_any_scale(seed):
    rng = np.random.default_rng(seed)
    for scale in (1e-12, 1.0, 1e12):
        matrix = scale * rng.normal(size=(30, 4)) @ rng.normal(size=(4, 20))
        assert numerical_rank(matrix) == np.linalg.matrix_rank(matrix) == 4
        assert np.linalg.matrix_rank(matrix, tol=0.0) == numerical_rank(matrix, tolerance=0.0) > 4


@pytest.mark.parametrize("factor, rank", [(0.5, 1), (2.0, 2)])
@pytest.mark.parametrize("shape", [(3, 100), (100, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_default_tolerance_is_max_m_n_eps_sigma(shape, factor, rank, dtype):
    matrix = np.zeros(shape, dtype)
    matrix[0, 0], matrix[1, 1] = 7.0, 7.0 * factor * 100 * np.finfo(dtype).eps
    assert numerical_rank(matrix) == rank


def test_only_the_zero_matrix_has_rank_0():
    assert numerical_rank(np.zeros((3, 5))) == 0 == row_echelon_form(np.zeros((3, 5), int)).rank
    tiny = np.zeros((3, 5))
    tiny[1, 2] = 1e-300
    assert numerical_rank(tiny) == 1 == row_echelon_form(tiny).rank


def test_a_tolerance_of_the_noises_size_finds_the_rank_below_it():
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 30)) + 1e-6 * rng.normal(size=(40, 30))
    assert numerical_rank(matrix) == 30
    assert numerical_rank(matrix, tolerance=1e-6 * (np.sqrt(40) + np.sqrt(30))) == 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rank_of_a_product_lies_between_sylvesters_bound_and_the_smaller_rank(seed):
    rng = np.random.default_rng(seed)
    m, n, p = (int(size) for size in rng.integers(2, 9, 3))
    a = of_rank(rng, m, n, int(rng.integers(1, min(m, n) + 1)))
    b = of_rank(rng, n, p, int(rng.integers(1, min(n, p) + 1)))
    for rank in (numerical_rank, lambda matrix: row_echelon_form(matrix).rank):
        assert rank(a) + rank(b) - n <= rank(a @ b) <= min(rank(a), rank(b))


# --- the best approximation --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_truncated_svd_is_numpys_and_its_error_the_dropped_values(shape):
    matrix = np.random.default_rng(5).normal(size=shape)
    u, wanted, vt = np.linalg.svd(matrix, full_matrices=False)
    for rank in range(1, min(shape) + 1):
        left, right, singular_values = truncated_svd(matrix, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        assert np.allclose(left @ right, sum(wanted[i] * np.outer(u[:, i], vt[i]) for i in range(rank)))
        assert np.allclose(singular_values, wanted)
        error = np.linalg.norm(matrix - left @ right)
        assert np.isclose(error**2, np.sum(wanted[rank:] ** 2), atol=1e-12)
        assert np.isclose(approximation_error(singular_values, rank), error, atol=1e-12)
        assert np.isclose(energy_captured(singular_values, rank), 1 - error**2 / np.sum(matrix**2))
        lengths = np.sqrt(singular_values[:rank])
        assert np.allclose(np.linalg.norm(left, axis=0), lengths)
        assert np.allclose(np.linalg.norm(right, axis=1), lengths)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_matrix_of_that_rank_is_nearer(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(8, 6)) @ np.diag([8, 4, 2, 1, 0.5, 0.25])
    left, right, singular_values = truncated_svd(matrix, 2)
    least = approximation_error(singular_values, 2)
    for size in (1e-3, 1e-1, 1.0):
        moved = (left + size * rng.normal(size=left.shape)) @ (right + size * rng.normal(size=right.shape))
        assert np.linalg.norm(matrix - moved) > least
    for _ in range(50):  # the best right factor for a random left one: least squares
        random_left = rng.normal(size=(8, 2))
        fitted = random_left @ np.linalg.lstsq(random_left, matrix, rcond=None)[0]
        assert np.linalg.norm(matrix - fitted) > least


def test_float32_stays_float32():
    left, right, singular_values = truncated_svd(np.eye(3, dtype="float32"), 2)
    assert {left.dtype, right.dtype, singular_values.dtype} == {np.dtype("float32")}


def test_errors_and_energy_by_hand():
    assert [approximation_error([12.0, 4.0, 3.0], rank) for rank in range(4)] == [13.0, 5.0, 3.0, 0.0]
    assert [energy_captured([3.0, 1.0], rank) for rank in range(3)] == [0.0, 0.9, 1.0]
    assert energy_captured([0.0, 0.0], 0) == 1.0


# --- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_parameters_are_the_factors_numbers_and_break_even_where_they_meet(seed):
    rng = np.random.default_rng(seed)
    d_in, d_out = (int(size) for size in rng.integers(1, 60, 2))
    even = break_even_rank(d_in, d_out)
    for rank in range(1, min(d_in, d_out) + 1):
        count = parameters_of_rank(d_in, d_out, rank)
        assert count == np.zeros((d_in, rank)).size + np.zeros((rank, d_out)).size
        assert np.sign(count - d_in * d_out) == np.sign(round(rank - even, 9))


def test_the_break_even_rank_of_known_shapes():
    assert break_even_rank(3, 3) == 1.5 and break_even_rank(4, 12) == 3
    assert 487 < break_even_rank(640, 2048) < 488


# --- the spectrum of an update -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 4, 30), (30, 4, 20), (3, 5, 9), (9, 5, 3), (4, 6, 4), (1, 1, 1)])
@pytest.mark.parametrize("scaling", [1.0, 2.0, -0.5, 0.0])
def test_the_spectrum_is_the_full_products(shape, scaling):
    d_in, rank, d_out = shape
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(d_in, rank)), rng.normal(size=(rank, d_out))
    wanted = np.linalg.svd(scaling * a @ b, compute_uv=False)
    spectrum = spectrum_of_update(a, b, scaling)
    assert spectrum.shape == (min(shape),)
    assert np.allclose(spectrum, wanted[: min(shape)]) and np.allclose(wanted[min(shape) :], 0)


def test_the_product_is_never_formed():
    size = 300_000  # the product would take 720 GB
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(size, 2)), rng.normal(size=(2, size))
    # The product's squared singular values are the eigenvalues of the small matrix (Aᵀ A)(B Bᵀ).
    wanted = np.sqrt(np.sort(np.linalg.eigvals(a.T @ a @ (b @ b.T)).real)[::-1])
    assert np.allclose(spectrum_of_update(a, b), wanted)


def test_an_update_with_b_at_zero_is_the_matrix_of_rank_0():
    spectrum = spectrum_of_update(np.ones((6, 2), "float32"), np.zeros((2, 5), "float32"))
    assert spectrum.tolist() == [0, 0] and spectrum.dtype == np.float64


# --- bad input ---------------------------------------------------------------------------------------------

BAD_MATRICES = [[1.0, 2.0], np.zeros((2, 0)), np.zeros((2, 2, 2)), [["a", "b"]], [[1j]], [[np.nan, 1.0]], [[np.inf]]]


@pytest.mark.parametrize("matrix", BAD_MATRICES, ids=repr)
@pytest.mark.parametrize("function", [row_echelon_form, numerical_rank, lambda matrix: truncated_svd(matrix, 1)])
def test_a_bad_matrix_is_named(function, matrix):
    with pytest.raises(ValueError, match="`matrix` must .*Received"):
        function(matrix)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: numerical_rank(np.eye(2), tolerance=-1.0), "`tolerance` must be at least 0.*-1.0"),
        (lambda: numerical_rank(np.eye(2), tolerance=np.nan), "`tolerance` must be at least 0.*nan"),
        (lambda: truncated_svd(np.eye(3), 0), "`rank` must be an integer from 1 to 3.*rank=0"),
        (lambda: truncated_svd(np.eye(3), 4), "`rank` must be an integer from 1 to 3.*rank=4"),
        (lambda: truncated_svd(np.eye(3), 1.0), "`rank` must be an integer.*rank=1.0"),
        (lambda: truncated_svd(np.eye(3), True), "`rank` must be an integer.*rank=True"),
        (lambda: approximation_error([2.0, 1.0], 3), "`rank` must be an integer from 0 to 2.*rank=3"),
        (lambda: approximation_error([1.0, 2.0], 1), "`singular_values` must be .*largest down"),
        (lambda: energy_captured([1.0, -1.0], 1), "`singular_values` must be .*at least 0"),
        (lambda: energy_captured([np.nan, 1.0], 1), "`singular_values` must be "),
        (lambda: energy_captured([], 0), "`singular_values` must be "),
        (lambda: energy_captured([1.0], -1), "`rank` must be .*-1"),
        (lambda: parameters_of_rank(0, 3, 1), "`d_in` must be an integer of at least 1.*d_in=0"),
        (lambda: parameters_of_rank(3, 2.5, 1), "`d_out` must be an integer of at least 1.*d_out=2.5"),
        (lambda: parameters_of_rank(3, 3, 0), "`rank` must be an integer of at least 1.*rank=0"),
        (lambda: break_even_rank("a", 3), "`d_in` must be an integer.*'a'"),
        (lambda: spectrum_of_update(np.ones(3), np.ones((1, 3))), "`lora_a` must be a matrix"),
        (lambda: spectrum_of_update(np.ones((3, 1)), [[np.nan]]), "`lora_b` must hold finite numbers.*1 that"),
        (lambda: spectrum_of_update(np.ones((3, 2)), np.ones((3, 3))), r"`lora_b` must be .*\(3, 2\) and \(3, 3\)"),
        (lambda: spectrum_of_update(np.ones((3, 1)), np.ones((1, 3)), np.inf), "`scaling` must be .*inf"),
    ],
)
def test_bad_input_is_named_with_what_was_expected_and_what_came(call, said):
    with pytest.raises(ValueError, match=said):
        call()
