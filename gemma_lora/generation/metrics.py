"""Which score suits a task, and the scores of answers that are there already, with intervals. No JAX."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.settings import Metric, check
from gemma_lora.generation.bootstrap import Estimate, PerLine, differences, estimates, ratio, share
from gemma_lora.generation.chrf import chrf_lines, require_sacrebleu
from gemma_lora.generation.classes import Confusion, confusion, macro_f1
from gemma_lora.generation.matching import check_lengths, exact_match, field_scores, fields_right, is_match
from gemma_lora.generation.matching import parse_object as parse_object

#: A metric's main score, by its name in `Scores.scores`.
MAIN = {
    "exact": "exact match",
    "json": "exact match",
    "classification": "accuracy",
    "text": "chrF",
    "loss": "loss",
}
_SHORT = 60  # characters: longer answers are seldom equal to the letter, and never a class
_MOST_CLASSES = 50
_MOST_ASKED_FOR = 200  # classes of a confusion matrix that somebody asked for
_RARE = 20  # of so many lines, one may have an answer of its own and the task still be a classification


def choose_metric(references: Sequence[str]) -> Metric:
    """The metric that suits a task, by its right answers.

    | the right answers | metric |
    |---|---|
    | are JSON objects, all of them | `json` |
    | are few (2 to 50), short, of one line, and nearly every line's occurs again | `classification` |
    | are short: half of them at most 60 characters | `exact` |
    | are longer | `text` |

    Args:
        references: The right answers.

    Raises:
        ValueError: If there are none.

    Example:

    >>> choose_metric(["yes", "no", "no", "yes"]), choose_metric(['{"a": 1}']), choose_metric(["4", "9", "16"])
    ('classification', 'json', 'exact')
    """
    if not references:
        raise ValueError("`references` must hold at least one right answer. Received: none")
    if all(parse_object(reference) is not None for reference in references):
        return "json"
    counts = Counter(reference.strip() for reference in references)
    alone = sum(count for count in counts.values() if count == 1)
    short = all(len(name) <= _SHORT and "\n" not in name for name in counts)
    if short and 2 <= len(counts) <= _MOST_CLASSES and alone * _RARE <= len(references):
        return "classification"
    return "exact" if statistics.median(len(reference.strip()) for reference in references) <= _SHORT else "text"


def metric_of(metric: str | None, references: Sequence[str]) -> Metric:
    """The metric that was asked for, or else the one that suits.

    Raises:
        ValueError: If there is no such metric.
        GemmaLoraError: If it does not suit the right answers, or needs a package that is missing.
    """
    chosen: Metric = check(metric=metric)["metric"] or choose_metric(references)
    if chosen == "text":
        require_sacrebleu()
    wrong = next((reference for reference in references if parse_object(reference) is None), None)
    if chosen == "json" and wrong is not None:
        raise GemmaLoraError(
            f"The metric 'json' needs right answers that are JSON objects. Received: {wrong[:60]!r}. Choose 'exact'."
        )
    classes = len(set(map(str.strip, references)))
    if chosen == "classification" and classes > _MOST_ASKED_FOR:
        raise GemmaLoraError(
            f"The metric 'classification' takes up to {_MOST_ASKED_FOR} classes. Received: {classes} different right "
            "answers. Choose 'exact', or 'text' for long answers."
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result of `evaluate`. Shares are between 0 and 1, chrF between 0 and 100, losses in nats per token.

    Invariants: `scores` holds the metric's scores by name, each an `Estimate` with its interval; its entry
    `MAIN[metric]` is the main one, which `value` gives. `confusion` and `classes` are those of a classification.
    `answers` is empty where the loss was asked for and nothing was generated.
    """

    exact_match: float
    fields: dict[str, float]
    valid_json: float | None  # None where the references are not JSON objects
    count: int
    answers: list[str] = dataclasses.field(repr=False)
    metric: str = "exact"
    scores: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    classes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    confusion: Confusion | None = dataclasses.field(default=None, repr=False)
    cut: int = 0  # answers that were not finished when `max_new_tokens` were made
    cut_lines: list[int] = dataclasses.field(default_factory=list, repr=False)
    losses: list[tuple[float, int]] | None = dataclasses.field(default=None, repr=False)  # sum and tokens, per line

    @property
    def value(self) -> float:
        """The main score."""
        return self.scores[MAIN[self.metric]].value

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without what there is for every line."""
        left_out = ("answers", "cut_lines", "losses")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Scores:
        """The scores of which `dataclasses.asdict` gave the values."""
        losses, confusion = values["losses"], values["confusion"]
        return cls(
            **{
                **values,
                "scores": {name: Estimate(**value) for name, value in values["scores"].items()},
                "confusion": confusion and Confusion(**confusion),
                "losses": losses and [(loss, tokens) for loss, tokens in losses],
            }
        )


def score(
    answers: Sequence[str],
    references: Sequence[str],
    metric: str | None = None,
    cut: Sequence[bool] = (),
    losses: Sequence[tuple[float, int]] | None = None,
    labels: Sequence[str] = (),
) -> Scores:
    """The `Scores` of answers that are there already.

    Args:
        answers: Generated texts.
        references: The right ones, as many.
        metric: `exact`, `json`, `classification`, `text` or `loss`; by default the one that suits the references.
        cut: For each answer, whether it was cut off; by default none was.
        losses: For `loss`: each reference's loss, summed over its tokens, and its number of tokens.
        labels: For `classification`: classes there are besides, which none of these references may be.

    Raises:
        ValueError: If the lengths differ or are 0, or there is no such metric.
        GemmaLoraError: If the metric does not suit the references, or needs a package that is missing.

    Example:

    >>> found = score(["cat", "dog", "a cat", "dog"], ["cat", "dog", "cat", "dog"], "classification")
    >>> found.value, round(found.scores["macro F1"].value, 3), found.classes["cat"]["recall"]
    (0.75, 0.833, 0.5)
    """
    check_lengths(answers, references)
    chosen = metric_of(metric, references)
    objects = all(parse_object(reference) is not None for reference in references)
    table = confusion(answers, references, labels) if chosen == "classification" else None
    cut_lines = [number for number, was in enumerate(cut) if was]
    return Scores(
        exact_match=exact_match(answers, references),
        fields=field_scores(answers, references),
        valid_json=sum(parse_object(answer) is not None for answer in answers) / len(answers) if objects else None,
        count=len(answers),
        answers=list(answers),
        metric=chosen,
        scores=estimates(per_line(chosen, answers, references, losses)),
        classes=table.per_class() if table else {},
        confusion=table,
        cut=len(cut_lines),
        cut_lines=cut_lines,
        losses=None if losses is None else [(float(loss), int(tokens)) for loss, tokens in losses],
    )


def loss_scores(losses: Sequence[tuple[float, int]], whole: Sequence[bool]) -> Scores:
    """The `Scores` where only the loss was asked for.

    Args:
        losses: Each reference's loss, summed over its tokens, and its number of tokens.
        whole: Whether each of the reference's tokens is the likeliest: greedy generation would write it.
    """
    kept = [(float(loss), int(tokens)) for loss, tokens in losses]
    found = estimates({"loss": _loss_lines(kept), "exact match": share(whole)})
    exact = found["exact match"].value
    return Scores(exact, {}, None, len(kept), [], metric="loss", scores=found, losses=kept)


def compare(before: Scores, after: Scores, references: Sequence[str]) -> dict[str, Estimate]:
    """After minus before on the lines that both have, the first ones, with paired bootstrap intervals.

    Args:
        before, after: Scores of the same lines in the same order, by the same metric; one may have fewer.
        references: The right answers of those lines.

    Returns:
        `{name: difference}`, named as in `Scores.scores`. Of a loss, below 0 is better.
    """
    lines = min(before.count, after.count)
    sides = []
    for scores in (before, after):
        losses = scores.losses[:lines] if scores.losses is not None else None
        sides.append(per_line(after.metric, scores.answers[:lines], references[:lines], losses))
    return differences(*sides)


def per_line(
    metric: str, answers: Sequence[str], references: Sequence[str], losses: Sequence[tuple[float, int]] | None = None
) -> dict[str, PerLine]:
    """What a metric's scores are made of, by name, the main one first."""
    if metric == "loss" and losses is None:
        raise ValueError("`losses` must be given for the metric 'loss'. Received: None")
    right = share([is_match(answer, reference) for answer, reference in zip(answers, references, strict=True)])
    if metric == "classification":
        return {"accuracy": right, "macro F1": macro_f1(answers, references)}
    if metric == "text":
        return {"chrF": chrf_lines(answers, references), "exact match": right}
    if metric == "loss":
        return {"loss": _loss_lines(losses or []), "exact match": right}
    return {"exact match": right} | (_json_lines(answers, references) if metric == "json" else {})


def _json_lines(answers: Sequence[str], references: Sequence[str]) -> dict[str, PerLine]:
    found = {"valid JSON": share([parse_object(answer) is not None for answer in answers])}
    rights = [fields_right(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    for field in dict.fromkeys(name for line in rights for name in line):
        rows = [(line.get(field, False), field in line) for line in rights]
        found[f"field {field}"] = PerLine(np.array(rows, float), ratio)
    return found


def _loss_lines(losses: Sequence[tuple[float, int]]) -> PerLine:
    return PerLine(np.array(losses, float).reshape(len(losses), 2), ratio)
