"""Every checker says ✓ to right answers however they are written, and to nothing else; it never raises."""

import json
from pathlib import Path

import numpy as np
import pytest

from gemma_lora import checks
from tests.checker_rules import CheckerRules, exported, said_by


def loop_mask(segment_ids, window):
    size = len(segment_ids)
    rows = [[0] * size for _ in range(size)]
    for t in range(size):
        for s in range(max(0, t - window + 1), t + 1):
            rows[t][s] = int(segment_ids[t] == segment_ids[s] != 0)
    return rows


def array_mask(segment_ids, window):
    distance = np.subtract.outer(np.arange(len(segment_ids)), np.arange(len(segment_ids)))
    same = np.equal.outer(segment_ids, segment_ids)
    return same & (segment_ids > 0) & (distance >= 0) & (distance < window)


def parsed_equal(answer, reference):
    try:
        return json.loads(answer) == json.loads(reference)
    except json.JSONDecodeError:
        return False


def every_field_equal(answer, reference):
    try:
        given, wanted = json.loads(answer), json.loads(reference)
    except ValueError:
        return False
    if not isinstance(given, dict) or len(given) != len(wanted):
        return False
    return all(name in given and given[name] == value for name, value in wanted.items())


def weights_by_slice(prompt_length, answer_length):
    weights = np.zeros(prompt_length + answer_length)
    weights[prompt_length - 1 : -1] = 1
    return weights


def merge_einsum(kernel, lora_a, lora_b, alpha):
    return kernel + np.einsum("ir,ro->io", lora_a, lora_b) * alpha / lora_a.shape[1]


#: Exercise -> two right functions, written differently.
RIGHT = {
    "lora_parameters": [
        lambda shapes, rank, blocks: blocks * sum(rank * (d_in + d_out) for d_in, d_out in shapes),
        lambda shapes, rank, blocks: np.sum(np.array(shapes)) * rank * blocks,
    ],
    "loss_weights": [
        weights_by_slice,
        lambda prompt_length, answer_length: [0] * (prompt_length - 1) + [1] * answer_length + [0],
    ],
    "segment_mask": [loop_mask, array_mask],
    "merge": [
        lambda kernel, lora_a, lora_b, alpha: kernel + (alpha / len(lora_b)) * (lora_a @ lora_b),
        merge_einsum,
    ],
    "json_match": [parsed_equal, every_field_equal],
    "points_to_gain": [
        lambda kinds, right, kind: 100 * np.mean((kinds == kind) & ~right),
        lambda kinds, right, kind: 100 * sum(not right[i] for i in np.flatnonzero(kinds == kind)) / len(right),
    ],
}

#: Exercise -> plausible wrong functions, and a word of what the checker says about each.
WRONG = {
    "lora_parameters": [
        (lambda shapes, rank, blocks: rank * sum(a + b for a, b in shapes), "blocks"),
        (lambda shapes, rank, blocks: blocks * sum(a * b for a, b in shapes), "kernel"),
        (lambda shapes, rank, blocks: blocks * rank * sum(a for a, b in shapes), "B is forgotten"),
        (lambda shapes, rank, blocks: blocks * sum(a * rank * b for a, b in shapes), "expected"),
    ],
    "loss_weights": [
        (lambda prompt_length, answer_length: [0] * prompt_length + [1] * answer_length, "one position earlier"),
        (lambda prompt_length, answer_length: [1] * (prompt_length + answer_length - 1) + [0], "prompt carries"),
        (lambda prompt_length, answer_length: [1] * (prompt_length + answer_length), "every position"),
        (lambda prompt_length, answer_length: [0] * (prompt_length - 1) + [1] * (answer_length + 1), "last position"),
        (lambda prompt_length, answer_length: weights_by_slice(prompt_length, answer_length)[:-1], "expected"),
    ],
    "segment_mask": [
        (lambda segment_ids, window: array_mask(segment_ids, window).T, "exchanged"),
        (lambda segment_ids, window: array_mask(segment_ids, window + 1), "too wide"),
        (lambda segment_ids, window: array_mask(segment_ids, len(segment_ids)), "window is left out"),
        (lambda segment_ids, window: array_mask(segment_ids + 1, window), "padding is seen"),
        (lambda segment_ids, window: array_mask(np.ones_like(segment_ids), window), "expected"),
        (
            lambda segment_ids, window: array_mask(segment_ids, window) | array_mask(segment_ids, window).T,
            "come after it",
        ),
    ],
    "merge": [
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha * lora_a @ lora_b, "alpha / rank"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + lora_a @ lora_b, "not scaled"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha / len(lora_b) ** 0.5 * lora_a @ lora_b, "rsLoRA"),
        (lambda kernel, lora_a, lora_b, alpha: alpha / len(lora_b) * lora_a @ lora_b, "without the kernel"),
        (lambda kernel, lora_a, lora_b, alpha: kernel + alpha / len(lora_b) * lora_b @ lora_a, "raised ValueError"),
        (lambda kernel, lora_a, lora_b, alpha: kernel.T + alpha / len(lora_b) * (lora_a @ lora_b).T, "transposed"),
    ],
    "json_match": [
        (lambda answer, reference: answer == reference, "order and white space"),
        (lambda answer, reference: json.loads(answer) == json.loads(reference), "raised JSONDecodeError"),
        (lambda answer, reference: answer.startswith("{"), "expected"),
        (lambda answer, reference: sorted(answer) == sorted(reference), "expected"),
        (
            lambda answer, reference: all(part in answer for part in json.loads(reference).values()),
            "expected",
        ),
    ],
    "points_to_gain": [
        (lambda kinds, right, kind: 100 * np.mean(~right[kinds == kind]), "hundredth of all lines"),
        (lambda kinds, right, kind: 100 * np.mean(~right[kinds == kind]) / 2, "expected"),
        (lambda kinds, right, kind: 100 * np.mean((kinds == kind)[~right]), "number of wrong answers"),
        (lambda kinds, right, kind: 100 * np.mean(kinds == kind), "right already"),
        (lambda kinds, right, kind: 100 * np.mean(right & (kinds == kind)), "not the wrong ones"),
        (lambda kinds, right, kind: 100 * (1 - np.mean(~right & (kinds != kind))), "afterwards"),
        (lambda kinds, right, kind: np.mean(~right & (kinds == kind)), "100 points"),
        (lambda kinds, right, kind: right[kinds], "raised IndexError"),
    ],
}


class TestLesson08(CheckerRules):
    LESSON, BY_HAND, RIGHT, WRONG = "lesson_08", "lora_count_by_hand", RIGHT, WRONG


def test_every_lessons_checkers_have_a_test_file():
    tested = {"lesson_08", *(f"lesson_{path.stem[-2:]}" for path in Path(__file__).parent.glob("test_checks_*.py"))}
    assert set().union(*map(exported, tested)) == {*checks.__all__}


def test_a_function_may_change_its_inputs(capsys):
    def in_place(kernel, lora_a, lora_b, alpha):
        kernel += (alpha / len(lora_b)) * (lora_a @ lora_b)
        return kernel

    assert "✓" in said_by(capsys, "merge", in_place)


@pytest.mark.parametrize("answer", [368_640, 368_640.0, np.int64(368_640), 18 * 8 * (640 + 1024 + 640 + 256)])
def test_the_right_number_by_hand_passes(capsys, answer):
    assert "✓" in said_by(capsys, "lora_count_by_hand", answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (20_480, "one block"),
        (239_616, "query alone"),
        (129_024, "value projection alone"),
        (14_745_600, "kernels"),
        (46_080, "rank 1"),
        (737_280, "twice"),
        (7, "A has d_in"),
        ("many", "a number is needed"),
    ],
)
def test_a_wrong_number_by_hand_gets_a_hint(capsys, answer, said):
    text = said_by(capsys, "lora_count_by_hand", answer)
    assert "✗" in text and said in text
