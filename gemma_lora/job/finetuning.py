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
from rich.markup import escape as _escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gemma_lora.base.files import GemmaLoraError, require_writable, write_json_atomic, write_jsonl_atomic
from gemma_lora.base.hardware import has_fast_bfloat16, machine, peak_memory_bytes, use_compilation_cache
from gemma_lora.data import dataset as data_module
from gemma_lora.exchange.peft import save_adapter
from gemma_lora.gemma.load import BUILTIN_NAME, BUILTIN_NOTE, load_gemma
from gemma_lora.generation.engine import generate
from gemma_lora.generation.evaluation import Scores, english_text, few_shot_template, perplexity, score
from gemma_lora.lora.apply import apply_lora
from gemma_lora.training.checkpoint import FILE as CHECKPOINT
from gemma_lora.training.checkpoint import changed_settings
from gemma_lora.training.tuner import FineTuner

#: The splits that the base model is scored on too, if the dataset has them.
BASE_SPLITS = ("validation", "test", "test_unseen")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of a fine-tuning job. Defaults were chosen on the expenses' validation lines."""

    data: str = "data/expenses"
    run_dir: str = "runs/expenses"
    model: str = BUILTIN_NAME
    quantization: str | None = None
    double_quant: bool = False
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    learning_rate: float = 5e-4
    warmup: float = 0.06
    epochs: int = 1
    limit: int | None = None
    rows: int = 1
    row_length: int = 384
    accumulate: int = 1
    remat: bool = False
    mixed_precision: bool | None = None  # where the machine multiplies bfloat16 faster
    filter_gradient: bool = True
    seed: int = 0
    shots: int = 4
    base_lines: int = 64
    max_new_tokens: int | None = None
    skip_bad_lines: bool = False
    evaluate_base: bool = True


def finetune(settings: Settings, console: Console | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Runs a fine-tuning job and leaves its folder behind.

    Args:
        settings: A `Settings`.
        console: Where progress and the report are shown.
        overwrite: Begin anew where the folder holds a run.

    Returns:
        The metrics, as written to `metrics.json`.

    Raises:
        GemmaLoraError: If the data cannot be used or the model cannot be loaded.
    """
    console = console or Console()
    started = time.perf_counter()
    run_dir = Path(settings.run_dir)
    require_writable(run_dir / "settings.json", "--run-dir")
    dataset = data_module.load_dataset(settings.data, skip_bad_lines=settings.skip_bad_lines)
    if settings.mixed_precision is None:
        settings = dataclasses.replace(settings, mixed_precision=has_fast_bfloat16())
    # Only now: data that cannot be read neither claim a folder nor cost the run that is in it.
    if overwrite:
        remove_run(run_dir)
    finished = claim(settings, dataset.digest)
    if dataset.skipped:
        console.print(f"[yellow]{_escape(dataset.skipped_summary)}[/]")
    tests = dataset.tests or {"validation": dataset.validation}
    if finished is not None:
        console.print(f"{_escape(settings.run_dir)}: this run is finished; its report follows.")
        _show_report(console, run_dir, finished, _stored_rows(run_dir))
        return finished
    use_compilation_cache()
    console.print(f"Loading {_escape(settings.model)} …")
    model = load_gemma(settings.model, quantization=settings.quantization, double_quant=settings.double_quant)
    if settings.model == BUILTIN_NAME:
        console.print(f"[dim]{BUILTIN_NOTE}[/]")
    # Bad lines, too long ones among them, are found before the slow work begins.
    encoded = data_module.encode(
        dataset.train,
        model.preprocessor.tokenizer,
        dataset.template,
        settings.row_length,
        skip_bad_lines=settings.skip_bad_lines,
    )
    if encoded.skipped:
        console.print(f"[yellow]{_escape(encoded.skipped_summary)}[/]")
    if settings.max_new_tokens is None:  # a quarter more than the longest answer of train
        longest = max(int(mask.sum()) for mask in encoded.loss_mask)
        settings = dataclasses.replace(settings, max_new_tokens=longest + longest // 4 + 1)

    before, english_before = _before(model, dataset, tests, settings, console)
    apply_lora(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        dropout=settings.dropout,
        rslora=settings.rslora,
        dora=settings.dora,
        seed=settings.seed,
    )
    names = ["learning_rate", "warmup", "rows", "row_length", "accumulate", "remat"]
    names += ["mixed_precision", "filter_gradient", "seed"]
    tuner = FineTuner(model, run_dir=run_dir, **{name: getattr(settings, name) for name in names})
    training_started = time.perf_counter()
    tuner.fit(dataset, epochs=settings.epochs, limit=settings.limit, skip_bad_lines=settings.skip_bad_lines)
    training_seconds = time.perf_counter() - training_started
    save_adapter(model, run_dir / "adapter", template=dataset.template)

    after = _evaluate_all(model, tests, dataset.template, settings, console, "fine-tuned")
    log_rows = tuner.log.rows if tuner.log else []
    metrics = {
        "before": {name: scores.to_dict() for name, scores in before.items()},
        "after": {name: scores.to_dict() for name, scores in after.items()},
        "english_perplexity": {"before": english_before, "after": perplexity(model, english_text())},
        "training_seconds": round(training_seconds, 1),
        "training_steps": len(log_rows),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "model_note": BUILTIN_NOTE if settings.model == BUILTIN_NAME else None,
        "machine": machine(),
    }
    rows = _answer_rows(tests, before, after)
    _write_run(run_dir, metrics, log_rows, rows)
    _show_report(console, run_dir, metrics, rows)
    return metrics


def claim(settings: Settings, data_sha256: str) -> dict[str, Any] | None:
    """Makes the run's folder this job's: writes its settings there, or checks that they and the data are the same.

    Returns:
        The metrics if the job is finished already, else None.

    Raises:
        GemmaLoraError: If the folder holds a run with other settings; the message names them.
    """
    run_dir = Path(settings.run_dir)
    path = run_dir / "settings.json"
    now = dataclasses.asdict(settings) | {"data_sha256": data_sha256}
    began = any((run_dir / name).exists() for name in _RUN_FILES if name != path.name)
    if path.exists() and began:  # settings alone are of a job that failed before it had done anything
        then = _read_json(path)
        then.pop("versions", None)
        if changed := changed_settings(then, now):
            raise GemmaLoraError(
                f"{run_dir}: holds a run with other settings: {'; '.join(changed)}. Set them back to go on with it, "
                "choose another --run-dir, or pass --overwrite to replace it."
            )
        if (run_dir / "metrics.json").exists():
            return _read_json(run_dir / "metrics.json")
        return None
    write_json_atomic(path, now | {"versions": versions()})
    return None


def remove_run(run_dir: str | os.PathLike) -> None:
    """Deletes what a job wrote into its folder, so that the next one begins anew; other files stay."""
    for name in _RUN_FILES:
        (Path(run_dir) / name).unlink(missing_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "template.json"):
        (Path(run_dir) / "adapter" / name).unlink(missing_ok=True)


_RUN_FILES = (
    "settings.json",
    "before.json",
    "training_settings.json",
    "training.jsonl",
    CHECKPOINT,
    "metrics.json",
    "answers.jsonl",
    "loss.png",
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}). Pass --overwrite to begin anew.") from error
    if not isinstance(value, dict):
        raise GemmaLoraError(f"{path}: not what this program wrote. Pass --overwrite to begin anew.")
    return value


def _before(model, dataset, tests, settings: Settings, console: Console) -> tuple[dict[str, Scores], float]:
    """The base model's scores on the tests, from `before.json` where a run that was stopped left them."""
    path = Path(settings.run_dir) / "before.json"
    if path.exists():
        stored = _read_json(path)
        console.print("[dim]The base model's answers are from before.json.[/]")
        return {name: Scores(**scores) for name, scores in stored["scores"].items()}, stored["english_perplexity"]
    scores: dict[str, Scores] = {}
    if settings.evaluate_base:
        shown = few_shot_template(dataset.template, dataset.train[: settings.shots])
        # What the base cannot do is seen on fewer lines, too; `count` in the scores says on how many.
        main = {name: examples for name, examples in tests.items() if name in BASE_SPLITS} or tests
        main = {name: examples[: settings.base_lines] for name, examples in main.items()}
        scores = _evaluate_all(model, main, shown, settings, console, f"base, {settings.shots} examples shown")
    english = perplexity(model, english_text())
    stored_scores = {name: dataclasses.asdict(value) for name, value in scores.items()}
    write_json_atomic(path, {"scores": stored_scores, "english_perplexity": english})
    return scores, english


def _stored_rows(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a finished run's `answers.jsonl`; none if the file is gone."""
    path = run_dir / "answers.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _evaluate_all(model, tests, template, settings: Settings, console: Console, what: str) -> dict[str, Scores]:
    # All splits in one call: their batches are full, and XLA compiles once.
    examples = [example for split in tests.values() for example in split]
    with progress_bar(console, f"{', '.join(tests)}: {what}", len(examples)) as advance:
        answers = generate(
            model,
            [example.prompt for example in examples],
            template,
            max_new_tokens=settings.max_new_tokens or 128,
            on_progress=advance,
            mixed_precision=bool(settings.mixed_precision),
        )
    scores, start = {}, 0
    for name, split in tests.items():
        references = [example.response for example in split]
        scores[name] = score(answers[start : start + len(split)], references)
        start += len(split)
    return scores


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


def _answer_rows(tests, before: dict[str, Scores], after: dict[str, Scores]) -> list[dict[str, str]]:
    """One row a test line: split, prompt, right response, and the answers before and after."""
    rows = []
    for name, examples in tests.items():
        for number, example in enumerate(examples):
            row = {"split": name, "prompt": example.prompt, "response": example.response}
            for when, scores in (("before", before), ("after", after)):
                if name in scores and number < scores[name].count:
                    row[when] = scores[name].answers[number]
            rows.append(row)
    return rows


def _write_run(run_dir: Path, metrics, log_rows, rows: list[dict[str, str]]) -> None:
    from gemma_lora.plots import loss_curve, save_figure

    write_jsonl_atomic(run_dir / "answers.jsonl", rows)
    save_figure(loss_curve([row["loss"] for row in log_rows]), run_dir / "loss.png")
    # Last, for it says that the run is finished.
    write_json_atomic(run_dir / "metrics.json", metrics)


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


def _show_report(console: Console, run_dir: Path, metrics, rows: list[dict[str, str]]) -> None:
    console.print(report_table(metrics))
    name = next(iter(metrics["after"]))
    sides = Table(title=_plain(f"Five lines of {name}, side by side"), show_lines=True)
    for column in ("line", "before", "after", "right answer"):
        sides.add_column(column, overflow="fold")
    for row in [row for row in rows if row["split"] == name][:5]:
        sides.add_row(*map(_plain, (row["prompt"], row.get("before", "–"), row.get("after", "–"), row["response"])))
    console.print(sides)
    minutes, gigabytes = metrics["seconds"] / 60, metrics["peak_memory_bytes"] / 1e9
    console.print(f"{minutes:.1f} minutes, peak memory {gigabytes:.1f} GB. In {_escape(os.fspath(run_dir))}/:")
    console.print("  adapter/ (PEFT), metrics.json, settings.json, answers.jsonl, training.jsonl, loss.png")


def _plain(text: str):
    from rich.text import Text

    return Text(text)
