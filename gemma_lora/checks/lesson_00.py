"""The checker of lesson 00's one exercise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma_lora.checks.verdict import verdict

_SEED = 0


def share_right(function: Callable) -> None:
    """Checks `function(answers, references)`: the share of answers that equal their reference, between 0 and 1."""
    rng = np.random.default_rng(_SEED)
    words = ["cat", "dog", "cow"]
    cases = []
    for _ in range(20):
        references = [words[i] for i in rng.integers(0, 3, int(rng.integers(2, 6)))]
        answers = [word if rng.random() < 0.5 else words[rng.integers(0, 3)] for word in references]
        cases.append({"answers": answers, "references": references})

    def right(answers, references):
        hits = [1.0 if answers[i] == references[i] else 0.0 for i in range(len(references))]
        return sum(hits) / len(hits)

    def wrong_share(answers, references):
        return 1 - right(answers, references)

    def anywhere(answers, references):
        return sum(answer in references for answer in answers) / len(answers)

    slips = {
        "right answers are counted and not divided by how many there are": lambda answers, references: (
            right(answers, references) * len(references)
        ),
        "the share of wrong answers is given": wrong_share,
        "the result is in percent; a share is between 0 and 1": lambda answers, references: (
            100 * right(answers, references)
        ),
        "an answer counts wherever it stands among the references; each has a reference of its own": anywhere,
    }
    verdict("share_right", function, cases, right, slips)
