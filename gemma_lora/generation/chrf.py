"""chrF: how much of a reference's letter sequences a longer answer has, by sacrebleu. No JAX."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.generation.bootstrap import PerLine

_ORDER = 6  # the longest n-grams, in characters
_BETA = 2  # recall counts twice as much as precision


def require_sacrebleu() -> None:
    """Raises where sacrebleu is missing.

    Raises:
        GemmaLoraError: It says what to install, and what works without.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise GemmaLoraError(
            "The metric 'text' (chrF) needs the package sacrebleu: pip install sacrebleu. "
            "Or choose another metric: exact, json, classification or loss."
        )


def chrf_lines(answers: Sequence[str], references: Sequence[str]) -> PerLine:
    """What chrF, 0 to 100, sums over lines: the score of all of them is sacrebleu's `corpus_score`.

    Returns:
        Per line (N, 18): for n = 1 … 6 the n-grams of the answer, of the reference, and in both.

    Raises:
        GemmaLoraError: If sacrebleu is missing.

    Reference: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation", equation 1.
    """
    require_sacrebleu()
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    rows = []
    for answer, reference in zip(answers, references, strict=True):
        row: list[int] = []
        pairs = zip(*(extract_all_char_ngrams(text, _ORDER, False) for text in (answer, reference)), strict=True)
        for given, right in pairs:
            # A reference too short for such n-grams says nothing about the answer's.
            row += [given.total() if right else 0, right.total(), (given & right).total()]
        rows.append(row)
    return PerLine(np.array(rows, float).reshape(len(rows), 3 * _ORDER), _chrf)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """The F-score of mean precision and mean recall over the orders that both sides have, times 100."""
    given, right, both = np.moveaxis(sums.reshape(*sums.shape[:-1], _ORDER, 3), -1, 0)  # (…, 6) each
    there = (given > 0) & (right > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    precision = np.where(there, both / np.maximum(given, 1), 0).sum(axis=-1) / orders
    recall = np.where(there, both / np.maximum(right, 1), 0).sum(axis=-1) / orders
    weighted = _BETA**2 * precision + recall
    return 100 * (1 + _BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1)
