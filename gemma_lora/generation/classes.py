"""Answers that are classes: precision, recall and F1 per class, macro F1, and the confusion matrix. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_lora.generation.bootstrap import PerLine

#: What stands for answers that are none of the classes.
NO_CLASS = "(no class)"


def classes_of(references: Sequence[str]) -> list[str]:
    """The different references, stripped, the most frequent first."""
    stripped = [reference.strip() for reference in references]
    names, counts = np.unique(np.array(stripped, dtype=object), return_counts=True)
    return [name for _, name in sorted(zip(-counts, names, strict=True))]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How often which answer was given for which class.

    Invariants: `counts[i][j]` is the number of lines that were answered with `rows[i]` where `columns[j]` is right;
    `rows` are the classes and, last, `NO_CLASS` for all other answers; `columns` are the classes in the same order.
    """

    rows: list[str]
    columns: list[str]
    counts: list[list[int]]

    def per_class(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1, how many lines are right to be answered so, and how many were.

        A class that no line was answered with has precision 0. The last row is `NO_CLASS`: it has counts only.
        """
        counts = np.array(self.counts)
        scores: dict[str, dict[str, float]] = {}
        for number, name in enumerate(self.columns):
            hits, given, right = counts[number, number], counts[number].sum(), counts[:, number].sum()
            scores[name] = {
                "precision": float(hits / max(given, 1)),
                "recall": float(hits / max(right, 1)),
                "f1": float(2 * hits / max(given + right, 1)),
                "count": int(right),
                "answered": int(given),
            }
        scores[self.rows[-1]] = {"count": 0, "answered": int(counts[-1].sum())}
        return scores

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def confusion(answers: Sequence[str], references: Sequence[str], labels: Sequence[str] = ()) -> Confusion:
    """The confusion matrix of answers. Outer white space aside, an answer is a class to the letter or none.

    Args:
        answers: Generated texts.
        references: The right classes, as many.
        labels: Classes there are besides.

    Example:

    >>> found = confusion(["cat", "dog", "a cat"], ["cat", "cat", "dog"])
    >>> found.rows, found.columns, found.counts
    (['cat', 'dog', '(no class)'], ['cat', 'dog'], [[1, 0], [1, 0], [0, 1]])
    """
    names = list(dict.fromkeys([*classes_of(references), *(label.strip() for label in labels)]))
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names) + 1, len(names)), int)
    for answer, reference in zip(answers, references, strict=True):
        counts[place.get(answer.strip(), len(names)), place[reference.strip()]] += 1
    # A class may have this very name: then the row for all other answers takes another.
    other = NO_CLASS
    while other in place:
        other = f"({other})"
    return Confusion([*names, other], names, counts.tolist())


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> PerLine:
    """The mean of the classes' F1, each class with the same weight, however rare it is.

    Returns:
        Per line (N, 3 · classes): whether class c was answered and right, was answered, is right.
    """
    names = np.array(classes_of(references), dtype=object)
    given = np.array([answer.strip() for answer in answers], dtype=object)[:, None] == names  # (N, C)
    right = np.array([reference.strip() for reference in references], dtype=object)[:, None] == names
    return PerLine(np.concatenate([given & right, given, right], axis=1).astype(float), _mean_f1)


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    hits, given, right = np.split(sums, 3, axis=-1)  # (…, C) each
    there = right > 0  # a draw may hold no line of a rare class
    f1 = np.where(there, 2 * hits / np.maximum(given + right, 1), 0)
    return f1.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)
