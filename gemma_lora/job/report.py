"""What a job shows in a terminal: a progress bar, the table of before and after, answers side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class progress_bar:
    """A progress bar as a context: entering it gives a function of (done, all)."""

    def __init__(self, console: Console, what: str, total: int):
        label = TextColumn("{task.description}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._what, self._total = what, total

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        task = self._progress.add_task(self._what, total=self._total)
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def __exit__(self, *exception) -> None:
        self._progress.stop()


def report_table(metrics: dict[str, Any]) -> Table:
    """The before/after table of a run's metrics, with 95 % intervals."""
    counts = ", ".join(str(n) for n in sorted({scores["count"] for scores in metrics["before"].values()}))
    notes = [f"before: the base model with worked examples in its prompt, on the first {counts} lines"] * bool(counts)
    if any(scores.get("scores") for scores in metrics["after"].values()):
        notes.append("in brackets: 95 % intervals over the lines; change: on the lines that both answered")
    table = Table(title="Before and after fine-tuning", caption="\n".join(notes) or None)
    table.add_column("split")
    table.add_column("score")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name, after in metrics["after"].items():
        before, change = metrics["before"].get(name, {}), metrics.get("difference", {}).get(name, {})
        for number, (score, value) in enumerate(_scores(after).items()):
            cells = (_cell(score, _scores(before).get(score)), _cell(score, value), _change(score, change.get(score)))
            table.add_row(_plain("" if number else name), _plain(score.removeprefix("field ")), *cells)
        cut = after.get("cut", 0)
        if cut or before.get("cut", 0):
            table.add_row("", "answers cut off", str(before.get("cut", "–")), str(cut), "")
    english = metrics["english_perplexity"]
    table.add_row("English text", "perplexity", f"{english['before']:.2f}", f"{english['after']:.2f}", "")
    return table


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """A split's scores by name; those of a run from before there were intervals have none."""
    if not scores or scores.get("scores"):
        return scores.get("scores", {})
    shares = {"exact match": scores["exact_match"], **{f"field {name}": v for name, v in scores["fields"].items()}}
    return {name: {"value": value} for name, value in shares.items()}


def classes_table(name: str, classes: dict[str, dict[str, float]]) -> Table:
    """Precision, recall and F1 of each class of a split, and how many answers were none."""
    table = Table(title=_plain(f"Classes of {name}, after"))
    table.add_column("class")
    for column in ("precision", "recall", "F1", "lines", "answered so"):
        table.add_column(column, justify="right")
    for label, scores in classes.items():
        shares = (_percent(scores.get(of)) for of in ("precision", "recall", "f1"))
        table.add_row(_plain(label), *shares, str(scores["count"] or "–"), str(scores["answered"]))
    return table


def answers_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """The first five lines of a split with the answers before and after, side by side."""
    table = Table(title=_plain(f"Five lines of {name}, side by side"), show_lines=True)
    for column in ("line", "before", "after", "right answer"):
        table.add_column(column, overflow="fold")
    for row in [row for row in rows if row["split"] == name][:5]:
        table.add_row(*map(_plain, (row["prompt"], row.get("before", "–"), row.get("after", "–"), row["response"])))
    return table


def show_report(console: Console, run_dir: Path, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Shows a finished run: its tables, what speaks against it, its time and memory, and what lies in its folder."""
    console.print(report_table(metrics))
    for name, scores in metrics["after"].items():
        if scores.get("classes"):
            console.print(classes_table(name, scores["classes"]))
    console.print(answers_table(next(iter(metrics["after"])), rows))
    for sentence in training_sentences(metrics):
        console.print(sentence, highlight=False)
    for sentence in metrics.get("warnings", []):
        console.print(Text.assemble(("Warning: ", "bold yellow"), sentence), highlight=False)
    minutes, gigabytes = metrics["seconds"] / 60, metrics["peak_memory_bytes"] / 1e9
    console.print(f"{minutes:.1f} minutes, peak memory {gigabytes:.1f} GB. In {escape(os.fspath(run_dir))}/:")
    pictures = "loss.png" + (", confusion.png" if (run_dir / "confusion.png").exists() else "")
    console.print(f"  adapter/ (PEFT), metrics.json, settings.json, answers.jsonl, training.jsonl, {pictures}")


def training_sentences(metrics: dict[str, Any]) -> list[str]:
    """Which epoch a run kept, whether it stopped early, and what share of replayed text was mixed in.

    Args:
        metrics: As `finetune` returns them. What a run of another version did not write is passed over.

    Example:

    >>> training_sentences({"training": {"epochs": 4, "planned_epochs": 6, "kept_epoch": 2, "best_epoch": 2,
    ...                                  "stopped_early": True}, "replay": 0.1})[0]
    'Kept: epoch 2, whose validation loss was lowest. Stopped early, after epoch 4 of 6.'
    """
    sentences, training = [], metrics.get("training", {})
    if kept := training.get("kept_epoch"):
        why = "whose validation loss was lowest" if training.get("best_epoch") else "the last one"
        early = f"Stopped early, after epoch {training['epochs']} of {training['planned_epochs']}."
        whole = f"All {training['epochs']} epochs were trained." if training["epochs"] > 1 else "One epoch was trained."
        sentences.append(f"Kept: epoch {kept}, {why}. {early if training.get('stopped_early') else whole}")
    if "replay" in metrics:
        share = metrics["replay"] or 0.0
        mixed = f"{100 * share:g} % of the training tokens were text of the base model's own" if share else "none"
        sentences.append(f"Replay against forgetting: {mixed}.")
    return sentences


#: Scores that are no shares, and so are shown as they are.
_NO_SHARES = ("chrF", "loss")


def shown_score(score: str, value: float) -> str:
    """A score as it is shown: a share in percent, chrF and a loss as they are."""
    if score not in _NO_SHARES:
        return _percent(value)
    return f"{value:.1f}" if score == "chrF" else f"{value:.3f}"


def shown_interval(score: str, found: dict[str, float]) -> str:
    """The ends of a score's interval, in its unit; empty where there is none."""
    if "low" not in found:
        return ""
    low, high = (shown_score(score, found[end]).removesuffix(" %") for end in ("low", "high"))
    return f"({low} to {high})"


def _cell(score: str, found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{shown_score(score, found['value'])} {shown_interval(score, found)}".rstrip()


def _change(score: str, found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    scale, digits = (1, 3 if score == "loss" else 1) if score in _NO_SHARES else (100, 1)
    value, low, high = (f"{scale * found[end]:+.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _plain(text: str) -> Text:
    """Text that is shown as it is, even where it looks like markup."""
    return Text(text)
