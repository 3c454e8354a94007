"""Lesson 00's checker says ✓ to right answers however they are written, and names the slips."""

import numpy as np

from tests.checker_rules import CheckerRules


def by_mean(answers, references):
    return np.mean([a == b for a, b in zip(answers, references, strict=True)])


def by_loop(answers, references):
    right = 0
    for i in range(len(answers)):
        right += answers[i] == references[i]
    return right / len(references)


class TestLesson00(CheckerRules):
    LESSON, BY_HAND = "lesson_00", "lora_count_by_hand"  # this lesson asks for no number; lesson 08's stands in
    RIGHT = {"share_right": [by_mean, by_loop]}
    WRONG = {
        "share_right": [
            (lambda answers, references: by_mean(answers, references) * len(answers), "not divided"),
            (lambda answers, references: 1 - by_mean(answers, references), "wrong answers"),
            (lambda answers, references: 100 * by_mean(answers, references), "percent"),
            (lambda answers, references: sum(a in references for a in answers) / len(answers), "wherever it stands"),
        ]
    }
