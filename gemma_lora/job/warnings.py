"""What a finished run's figures say against it, each with what to do. No JAX.

A run that learned nothing, or learned its lines by heart, ends with files that look like any other's. These are the
signs in its own metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_lora.generation.metrics import MAIN

_FEW_STEPS = 40
_FEW_LINES = 20
_NO_LOSS = 0.01  # nats per token
_RISE = 1.02  # of a validation loss over its lowest value; less is chance
_WORSE_ENGLISH = 2.0


def find_warnings(metrics: Mapping[str, Any]) -> list[str]:
    """One sentence or two for each sign of harm in a run's metrics; none if there is no sign.

    Args:
        metrics: As `finetune` returns them. What a run of another version did not write is passed over.

    Example:

    >>> find_warnings({"training_steps": 400})
    []
    >>> find_warnings({"training_steps": 14})[0]
    'Only 14 training steps: the model may not have learned it. Give more --epochs, more lines, or fewer --rows.'
    """
    signs = (_steps, _lines, _left_out, _cut, _no_loss, _validation, _english, _not_better)
    return [sentence for sign in signs for sentence in sign(metrics)]


def _steps(metrics: Mapping[str, Any]) -> list[str]:
    steps = metrics.get("training_steps")
    if steps is None or steps >= _FEW_STEPS:
        return []
    return [
        f"Only {_counted(steps, 'training step')}: the model may not have learned it. "
        "Give more --epochs, more lines, or fewer --rows."
    ]


def _lines(metrics: Mapping[str, Any]) -> list[str]:
    counts = {name: scores["count"] for name, scores in metrics.get("after", {}).items()}
    if (validation := metrics.get("lines", {}).get("validation")) is not None:
        counts = {"validation": validation} | counts
    few = [f"{name} {count}" for name, count in counts.items() if count < _FEW_LINES]
    if not few:
        return []
    return [
        f"Few lines to judge by ({', '.join(few)}): the scores say little about other lines. "
        f"Give at least {_FEW_LINES} that are not trained on, better 100."
    ]


def _left_out(metrics: Mapping[str, Any]) -> list[str]:
    if not (count := metrics.get("lines_left_out", 0)):
        return []
    was = "was" if count == 1 else "were"
    return [
        f"{_counted(count, 'line')} {was} left out: bad, or longer than --row-length. Mend the file, or give a larger "
        "--row-length; without --skip-bad-lines the command names each."
    ]


def _cut(metrics: Mapping[str, Any]) -> list[str]:
    counts = {name: scores.get("cut", 0) for name, scores in metrics.get("after", {}).items()}
    if not (cut := {name: count for name, count in counts.items() if count}):
        return []
    where = ", ".join(f"{count} in {name}" for name, count in cut.items())
    return [
        f"Answers were cut off before they were done: {where}. Give a larger --max-new-tokens. If they then repeat "
        "themselves, the model has not learned to stop: give more --epochs or more lines."
    ]


def _no_loss(metrics: Mapping[str, Any]) -> list[str]:
    loss = metrics.get("training_loss", {}).get("second_half")
    if loss is None or loss >= _NO_LOSS:
        return []
    return [
        f"The training loss was at {loss:.4f} throughout the second half: the lines are known by heart (overfitting). "
        "Give fewer --epochs, or more different lines."
    ]


def _validation(metrics: Mapping[str, Any]) -> list[str]:
    losses = [_number(loss) for loss in metrics.get("validation_losses") or []]
    known = [loss for loss in losses if loss is not None]
    training = metrics.get("training_loss", {})
    falls = training.get("second_half", 0) < training.get("first_half", 0)
    if len(known) < 2 or not falls or known[-1] <= _RISE * min(known):
        return []
    best = known.index(min(known)) + 1
    return [
        f"The validation loss rose from {min(known):.3f} to {known[-1]:.3f} while the training loss fell: overfitting. "
        f"It was lowest at measurement {best} of {len(known)}. Give fewer --epochs, or more different lines."
    ]


def _number(loss: Any) -> float | None:
    """A loss, or the loss of a record of one."""
    if isinstance(loss, Mapping):
        loss = loss.get("loss", loss.get("val_loss"))
    return loss if isinstance(loss, (int, float)) and loss == loss else None


def _english(metrics: Mapping[str, Any]) -> list[str]:
    english = metrics.get("english_perplexity", {})
    before, after = english.get("before"), english.get("after")
    if not before or after is None or after <= _WORSE_ENGLISH * before:
        return []
    return [
        f"Perplexity on plain English rose from {before:.1f} to {after:.1f}: the model forgets other things. Halve "
        "--learning-rate; with an NF4 base that brought it from 113 down to 76, with no loss on the task "
        "(README, the table of methods). Or give a lower --rank, or mix in lines of another kind."
    ]


def _not_better(metrics: Mapping[str, Any]) -> list[str]:
    sentences = []
    for split, differences in metrics.get("difference", {}).items():
        metric = metrics["after"][split].get("metric", "exact")
        name = MAIN[metric]
        if (found := differences.get(name)) is None:
            continue
        sign = -1 if metric == "loss" else 1  # of a loss, less is better
        low, high = sorted((sign * found["low"], sign * found["high"]))
        if low > 0:
            continue
        what = "is worse than" if high < 0 else "may be no better than"
        sentences.append(
            f"{split}: the fine-tuned model {what} the base model with worked examples ({name}, with 95 % between "
            f"{_signed(found['low'], metric)} and {_signed(found['high'], metric)}). Look at the wrong answers in "
            "answers.jsonl, and give more lines or more --epochs."
        )
    return sentences


def _signed(difference: float, metric: str) -> str:
    if metric in ("text", "loss"):
        return f"{difference:+.2f}"
    return f"{100 * difference:+.1f} points"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
