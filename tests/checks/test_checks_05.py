"""Lesson 05's checkers say ✓ to right answers however they are written, and to nothing else; they never raise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checker_rules import CheckerRules, said_by


def forward(x, kernel, lora_a, lora_b, alpha):
    return x @ kernel + alpha / lora_a.shape[1] * (x @ lora_a) @ lora_b


def forward_merged(x, kernel, lora_a, lora_b, alpha):
    kernel += alpha * lora_a @ lora_b / lora_a.shape[1]  # the checker gives copies
    return (x @ kernel).tolist()


def output(x, lora_a, lora_b, scaling):
    return scaling * (x @ lora_a) @ lora_b


def a_by_hand(x, dy, lora_b, scaling):
    return x.T @ (dy @ lora_b.T) * scaling


def a_by_jax(x, dy, lora_b, scaling):
    start = jnp.zeros((x.shape[1], lora_b.shape[0]))
    return jax.grad(lambda a: jnp.sum(output(x, a, lora_b, scaling) * dy))(start)


def b_by_hand(x, dy, lora_a, scaling):
    return (scaling * x @ lora_a).T @ dy


def b_by_jax(x, dy, lora_a, scaling):
    start = jnp.zeros((lora_a.shape[1], dy.shape[1]))
    return jax.grad(lambda b: jnp.sum(output(x, lora_a, b, scaling) * dy))(start)


def merged(kernel, lora_a, lora_b, alpha):
    return kernel + alpha * lora_a.shape[1] ** -0.5 * lora_a @ lora_b


def merged_by_columns(kernel, lora_a, lora_b, alpha):
    for k in range(len(lora_b)):
        kernel += alpha / np.sqrt(len(lora_b)) * lora_a[:, k : k + 1] * lora_b[k]
    return kernel


def one_rank(values, share):
    return int(np.argmax(np.cumsum(values**2) >= share * np.sum(values**2))) + 1


def common_by_loop(spectra, share):
    rank = 1
    while any(np.sum(values[:rank] ** 2) < share * np.sum(values**2) for values in spectra):
        rank += 1
    return rank


def chosen_by_loop(losses, tolerance):
    for rank in sorted(losses):
        if losses[rank] <= min(losses.values()) * (1 + tolerance):
            return rank
    raise ValueError("no losses")


def up_to(losses, limit):
    return [rank for rank in losses if losses[rank] <= limit]


#: Exercise -> two right functions, written differently.
RIGHT = {
    "lora_forward": [forward, forward_merged],
    "gradient_of_a": [a_by_hand, a_by_jax],
    "gradient_of_b": [b_by_hand, b_by_jax],
    "merge_rslora": [merged, merged_by_columns],
    "common_rank": [common_by_loop, lambda spectra, share: max(one_rank(values, share) for values in spectra)],
    "choose_rank": [
        chosen_by_loop,
        lambda losses, tolerance: min(
            rank for rank, loss in losses.items() if loss / min(losses.values()) - 1 <= tolerance
        ),
    ],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "lora_forward": [
        (lambda x, kernel, lora_a, lora_b, alpha: x @ kernel + alpha * x @ lora_a @ lora_b, "by alpha, not by alpha /"),
        (lambda x, kernel, lora_a, lora_b, alpha: x @ (kernel + lora_a @ lora_b), "not scaled"),
        (lambda x, kernel, lora_a, lora_b, alpha: x @ (kernel + lora_a @ lora_b / len(lora_b)), "alpha is forgotten"),
        (
            lambda x, kernel, lora_a, lora_b, alpha: x @ kernel + alpha / len(lora_b) ** 0.5 * x @ lora_a @ lora_b,
            "rsLoRA's",
        ),
        (lambda x, kernel, lora_a, lora_b, alpha: forward(x, 0 * kernel, lora_a, lora_b, alpha), "kernel's part"),
        (lambda x, kernel, lora_a, lora_b, alpha: x @ kernel, "update is missing"),
        (lambda x, kernel, lora_a, lora_b, alpha: alpha / len(lora_b) * x @ (kernel + lora_a @ lora_b), "scaled too"),
        (lambda x, kernel, lora_a, lora_b, alpha: forward(x, kernel, lora_a, lora_b, -alpha), "subtracted"),
        (lambda x, kernel, lora_a, lora_b, alpha: forward(x, kernel, lora_a, lora_b, alpha + 1), "expected"),
        (lambda x, kernel, lora_a, lora_b, alpha: forward(x, kernel, lora_a, lora_b, alpha).T, "expected"),
    ],
    "gradient_of_a": [
        (lambda x, dy, lora_b, scaling: x.T @ dy @ lora_b.T, "forgotten"),
        (lambda x, dy, lora_b, scaling: a_by_hand(x, dy, lora_b, scaling**2), "twice"),
        (lambda x, dy, lora_b, scaling: a_by_hand(x, dy, lora_b, scaling).T, "transposed"),
        (lambda x, dy, lora_b, scaling: x.T @ dy * scaling, "B is missing"),
        (lambda x, dy, lora_b, scaling: scaling * dy @ lora_b.T, "x is missing"),
        (lambda x, dy, lora_b, scaling: a_by_hand(x, dy, lora_b, scaling) / x.shape[0], "number of tokens"),
        (lambda x, dy, lora_b, scaling: a_by_hand(x, -dy, lora_b, scaling), "sign"),
        (lambda x, dy, lora_b, scaling: x @ dy.T @ lora_b, "raised ValueError"),
        (lambda x, dy, lora_b, scaling: np.zeros((x.shape[1], len(lora_b))), "expected"),
    ],
    "gradient_of_b": [
        (lambda x, dy, lora_a, scaling: (x @ lora_a).T @ dy, "forgotten"),
        (lambda x, dy, lora_a, scaling: b_by_hand(x, dy, lora_a, scaling**2), "twice"),
        (lambda x, dy, lora_a, scaling: b_by_hand(x, dy, lora_a, scaling).T, "transposed"),
        (lambda x, dy, lora_a, scaling: scaling * x.T @ dy, "A is missing"),
        (lambda x, dy, lora_a, scaling: b_by_hand(x, dy, lora_a, scaling) / len(dy), "number of tokens"),
        (lambda x, dy, lora_a, scaling: -b_by_hand(x, dy, lora_a, scaling), "sign"),
        (lambda x, dy, lora_a, scaling: np.zeros((lora_a.shape[1], dy.shape[1])), "expected"),
    ],
    "merge_rslora": [
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha / len(lora_b) * lora_a @ lora_b, "LoRA's, alpha / rank"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha * lora_a @ lora_b, "alpha alone"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + lora_a @ lora_b, "forgotten"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + np.sqrt(alpha / len(lora_b)) * lora_a @ lora_b, "of alpha too"),
        (lambda kernel, lora_a, lora_b, alpha: merged(0 * kernel, lora_a, lora_b, alpha), "update alone"),
        (lambda kernel, lora_a, lora_b, alpha: merged(kernel, lora_a, lora_b, -alpha), "unmerging"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha / len(lora_a) ** 0.5 * lora_a @ lora_b, "d_in"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha / np.log(len(lora_b)) * lora_a @ lora_b, "expected"),
    ],
    "common_rank": [
        (lambda spectra, share: min(one_rank(values, share) for values in spectra), "one update is enough"),
        (lambda spectra, share: one_rank(spectra[0], share), "only the first"),
        (lambda spectra, share: one_rank(spectra[-1], share), "only the last"),
        (lambda spectra, share: np.mean([one_rank(values, share) for values in spectra]), "averaged"),
        (lambda spectra, share: common_by_loop([values**0.5 for values in spectra], share), "without squaring"),
        (lambda spectra, share: common_by_loop(spectra, share) - 1, "one too small"),
        (lambda spectra, share: sum(one_rank(values, share) for values in spectra), "added up"),
        (lambda spectra, share: len(spectra[0]), "expected"),
    ],
    "choose_rank": [
        (lambda losses, tolerance: min(losses, key=losses.get), "smallest loss"),
        (lambda losses, tolerance: max(up_to(losses, min(losses.values()) * (1 + tolerance))), "largest such"),
        (lambda losses, tolerance: up_to(losses, min(losses.values()) * (1 + tolerance))[0], "no order"),
        (lambda losses, tolerance: min(up_to(losses, min(losses.values()) + tolerance)), "it is relative"),
        (lambda losses, tolerance: min(up_to(losses, losses[max(losses)] * (1 + tolerance))), "taken for"),
        (lambda losses, tolerance: losses[chosen_by_loop(losses, tolerance)], "not its rank"),
        (lambda losses, tolerance: min(losses), "whatever its loss"),
        (lambda losses, tolerance: max(losses), "expected"),
    ],
}  # fmt: skip


class TestLesson05(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_05", "training_bytes_by_hand", RIGHT, WRONG


def test_the_bytes_by_hand_are_those_of_arrays(capsys):
    kernel = np.zeros((1000, 500), np.float32)
    trained = [np.zeros((1000, 4), np.float32), np.zeros((4, 500), np.float32)]
    kept = [kernel] + [np.zeros_like(array) for array in trained for _ in ("itself", "gradient", "m", "v")]
    assert "✓" in said_by(capsys, "training_bytes_by_hand", sum(array.nbytes for array in kept))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (8_000_000, "full fine-tuning"),
        (8_096_000, "frozen kernel has no gradient"),
        (96_000, "has to be there"),
        (2_024_000, "have gradients"),
        (2_072_000, "two averages a number"),
        (2_048_000, "averages are missing"),
        (524_000, "4 bytes"),
        (2_064_000, "A alone"),
        (2_032_000, "B alone"),
        (34_000_000, "neither has the kernel's size"),
        (1, "the kernel once"),
        ("x", "number"),
    ],
)
def test_wrong_bytes_by_hand_get_a_hint(capsys, answer, said):
    text = said_by(capsys, "training_bytes_by_hand", answer)
    assert "✗" in text and said in text
