"""The whole fine-tuning job: score the base, train, score again, and write a report one can look at."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gemma_lora import data as data_module
from gemma_lora.evaluation import Scores, english_text, evaluate, few_shot_template, perplexity
from gemma_lora.files import GemmaLoraError, write_json_atomic, write_text_atomic
from gemma_lora.gemma import BUILTIN_NAME, BUILTIN_NOTE, load_gemma
from gemma_lora.hardware import machine, peak_memory_bytes, use_compilation_cache
from gemma_lora.lora import apply_lora
from gemma_lora.peft import save_adapter
from gemma_lora.training import FineTuner


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of a fine-tuning job. Defaults were chosen on the expenses' validation lines."""

    data: str = "data/expenses"
    run_dir: str = "runs/expenses"
    model: str = BUILTIN_NAME
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    learning_rate: float = 2e-3
    warmup: float = 0.06
    epochs: int = 1
    limit: int | None = None
    rows: int = 4
    row_length: int = 256
    seed: int = 0
    shots: int = 4
    max_new_tokens: int = 112
    skip_bad_lines: bool = False
    evaluate_base: bool = True


def finetune(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Runs a fine-tuning job and leaves its folder behind.

    Args:
        settings: A `Settings`.
        console: Where progress and the report are shown.

    Returns:
        The metrics, as written to `metrics.json`.

    Raises:
        GemmaLoraError: If the data cannot be used or the model cannot be loaded.
    """
    console = console or Console()
    started = time.perf_counter()
    run_dir = Path(settings.run_dir)
    dataset = data_module.load_dataset(settings.data, skip_bad_lines=settings.skip_bad_lines)
    for file, count in dataset.skipped.items():
        console.print(f"[yellow]{file}: {count} bad lines skipped[/]")
    tests = dataset.tests or {"validation": dataset.validation}
    use_compilation_cache()
    console.print(f"Loading {settings.model} …")
    model = load_gemma(settings.model)
    if settings.model == BUILTIN_NAME:
        console.print(f"[dim]{BUILTIN_NOTE}[/]")
    # Bad lines, too long ones among them, are found before the slow work begins.
    tuner_settings = {
        name: getattr(settings, name) for name in ("learning_rate", "warmup", "rows", "row_length", "seed")
    }
    data_module.encode(dataset.train, model.preprocessor.tokenizer, dataset.template, settings.row_length)

    before: dict[str, Scores] = {}
    text = english_text()
    if settings.evaluate_base:
        shown = few_shot_template(dataset.template, dataset.train[: settings.shots])
        before = _evaluate_all(model, tests, shown, settings, console, f"base, {settings.shots} examples shown")
    perplexities = {"before": perplexity(model, text)}

    apply_lora(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        dropout=settings.dropout,
        rslora=settings.rslora,
        seed=settings.seed,
    )
    tuner = FineTuner(model, run_dir=run_dir, **tuner_settings)
    training_started = time.perf_counter()
    tuner.fit(dataset, epochs=settings.epochs, limit=settings.limit)
    training_seconds = time.perf_counter() - training_started
    save_adapter(model, run_dir / "adapter", template=dataset.template)

    after = _evaluate_all(model, tests, dataset.template, settings, console, "fine-tuned")
    perplexities["after"] = perplexity(model, text)
    metrics = {
        "before": {name: scores.to_dict() for name, scores in before.items()},
        "after": {name: scores.to_dict() for name, scores in after.items()},
        "english_perplexity": perplexities,
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "model_note": BUILTIN_NOTE if settings.model == BUILTIN_NAME else None,
        "machine": machine(),
    }
    _write_run(run_dir, settings, metrics, tuner.log.rows if tuner.log else [], tests, before, after)
    _show_report(console, run_dir, metrics, tests, before, after)
    return metrics


def _evaluate_all(model, tests, template, settings: Settings, console: Console, what: str) -> dict[str, Scores]:
    scores = {}
    for name, examples in tests.items():
        with progress_bar(console, f"{name}: {what}", len(examples)) as advance:
            scores[name] = evaluate(
                model,
                examples,
                template,
                max_new_tokens=settings.max_new_tokens,
                batch_size=32 if template is not None and len(template.prompt) > 200 else 64,
                on_progress=advance,
            )
    return scores


class progress_bar:
    """A progress bar as a context: entering it gives a function of (done, all)."""

    def __init__(self, console: Console, what: str, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._what, self._total = what, total

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        task = self._progress.add_task(self._what, total=self._total)
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def __exit__(self, *exception) -> None:
        self._progress.stop()


def _write_run(run_dir: Path, settings: Settings, metrics, log_rows, tests, before, after) -> None:
    from gemma_lora.plots import loss_curve, save_figure

    write_json_atomic(run_dir / "settings.json", dataclasses.asdict(settings) | {"versions": versions()})
    write_json_atomic(run_dir / "metrics.json", metrics)
    lines = []
    for name, examples in tests.items():
        for number, example in enumerate(examples):
            row = {"split": name, "prompt": example.prompt, "response": example.response}
            for when, scores in (("before", before), ("after", after)):
                if name in scores:
                    row[when] = scores[name].answers[number]
            lines.append(json.dumps(row, ensure_ascii=False))
    write_text_atomic(run_dir / "answers.jsonl", "\n".join(lines) + "\n")
    save_figure(loss_curve([row["loss"] for row in log_rows]), run_dir / "loss.png")


def versions() -> dict[str, str]:
    """The versions of the packages a run's result depends on."""
    import importlib.metadata

    names = ("gemma_lora", "keras", "keras-hub", "jax", "jaxlib", "numpy", "gguf")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def report_table(metrics: dict[str, Any]) -> Table:
    """The before/after table of a run's metrics."""
    table = Table(title="Before and after fine-tuning")
    table.add_column("split")
    table.add_column("score")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, after in metrics["after"].items():
        before = metrics["before"].get(name, {})
        table.add_row(name, "exact match", _percent(before.get("exact_match")), _percent(after["exact_match"]))
        for field, value in after["fields"].items():
            table.add_row("", field, _percent(before.get("fields", {}).get(field)), _percent(value))
    english = metrics["english_perplexity"]
    table.add_row("English text", "perplexity", f"{english['before']:.2f}", f"{english['after']:.2f}")
    return table


def _show_report(console: Console, run_dir: Path, metrics, tests, before, after) -> None:
    console.print(report_table(metrics))
    name = next(iter(tests))
    sides = Table(title=f"Five lines of {name}, side by side", show_lines=True)
    for column in ("line", "before", "after", "right answer"):
        sides.add_column(column, overflow="fold")
    for number, example in enumerate(tests[name][:5]):
        was = before[name].answers[number] if name in before else "–"
        sides.add_row(*map(_plain, (example.prompt, was, after[name].answers[number], example.response)))
    console.print(sides)
    minutes, gigabytes = metrics["seconds"] / 60, metrics["peak_memory_bytes"] / 1e9
    console.print(f"{minutes:.1f} minutes, peak memory {gigabytes:.1f} GB. Everything is in {os.fspath(run_dir)}/:")
    console.print("  adapter/ (PEFT), metrics.json, settings.json, answers.jsonl, training.jsonl, loss.png")


def _plain(text: str):
    from rich.text import Text

    return Text(text)


def require_new(run_dir: str | os.PathLike, overwrite: bool) -> None:
    """Refuses to train into a folder that holds a finished run, unless told to.

    Raises:
        GemmaLoraError: If `metrics.json` is there and `overwrite` is False.
    """
    if (Path(run_dir) / "metrics.json").exists() and not overwrite:
        raise GemmaLoraError(
            f"{run_dir}: holds a finished run (metrics.json). Choose another --run-dir, "
            "or pass --overwrite to replace it."
        )
