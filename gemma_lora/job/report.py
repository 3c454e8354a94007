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
    """The before/after table of a run's metrics."""
    counts = ", ".join(str(n) for n in sorted({scores["count"] for scores in metrics["before"].values()}))
    caption = (
        f"before: the base model with worked examples in its prompt, on the first {counts} lines" if counts else None
    )
    table = Table(title="Before and after fine-tuning", caption=caption)
    table.add_column("split")
    table.add_column("score")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, after in metrics["after"].items():
        before = metrics["before"].get(name, {})
        table.add_row(_plain(name), "exact match", _percent(before.get("exact_match")), _percent(after["exact_match"]))
        for field, value in after["fields"].items():
            table.add_row("", _plain(field), _percent(before.get("fields", {}).get(field)), _percent(value))
    english = metrics["english_perplexity"]
    table.add_row("English text", "perplexity", f"{english['before']:.2f}", f"{english['after']:.2f}")
    return table


def answers_table(name: str, rows: list[dict[str, str]]) -> Table:
    """The first five lines of a split with the answers before and after, side by side."""
    table = Table(title=_plain(f"Five lines of {name}, side by side"), show_lines=True)
    for column in ("line", "before", "after", "right answer"):
        table.add_column(column, overflow="fold")
    for row in [row for row in rows if row["split"] == name][:5]:
        table.add_row(*map(_plain, (row["prompt"], row.get("before", "–"), row.get("after", "–"), row["response"])))
    return table


def show_report(console: Console, run_dir: Path, metrics: dict[str, Any], rows: list[dict[str, str]]) -> None:
    """Shows a finished run: both tables, its time and memory, and what lies in its folder."""
    console.print(report_table(metrics))
    console.print(answers_table(next(iter(metrics["after"])), rows))
    minutes, gigabytes = metrics["seconds"] / 60, metrics["peak_memory_bytes"] / 1e9
    console.print(f"{minutes:.1f} minutes, peak memory {gigabytes:.1f} GB. In {escape(os.fspath(run_dir))}/:")
    console.print("  adapter/ (PEFT), metrics.json, settings.json, answers.jsonl, training.jsonl, loss.png")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _plain(text: str) -> Text:
    """Text that is shown as it is, even where it looks like markup."""
    return Text(text)
