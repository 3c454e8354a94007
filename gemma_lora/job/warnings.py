"""What a finished run's figures say against it, each with what to do. No JAX.

A run that learned nothing, or overfits its lines, ends with files that look like any other's. These are the
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
    if steps is None or steps >= _FEW_STEPS or metrics.get("training", {}).get("stopped_early"):
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
        f"The training loss was at {loss:.4f} throughout the second half: the model overfits the training lines. "
        "Give fewer --epochs, or more different lines."
    ]


def _validation(metrics: Mapping[str, Any]) -> list[str]:
    epochs = metrics.get("training", {})
    losses, training = epochs.get("validation_loss") or [], epochs.get("training_loss") or []
    if epochs.get("best_epoch") or len(losses) < 2 or len(training) < 2:  # the best epoch was kept: no harm was done
        return []
    if not training[-1] < training[0] or losses[-1] <= _RISE * min(losses):
        return []
    best = losses.index(min(losses)) + 1
    return [
        f"The validation loss rose from {min(losses):.3f} to {losses[-1]:.3f} while the training loss fell: "
        f"overfitting. It was lowest after epoch {best} of {len(losses)}. Leave --keep-best on, or give fewer --epochs."
    ]


def _english(metrics: Mapping[str, Any]) -> list[str]:
    english = metrics.get("english_perplexity", {})
    before, after = english.get("before"), english.get("after")
    if not before or after is None or after <= _WORSE_ENGLISH * before:
        return []
    mixed = metrics.get("replay")
    remedy = "Give a larger --replay" if mixed else "Give --replay 0.1, which mixes in the base model's own text"
    return [
        f"Perplexity on plain English rose from {before:.1f} to {after:.1f}: the model forgets other things. {remedy}, "
        "or halve --learning-rate. For other questions, ask the base model without the adapter."
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
