"""The whole fine-tuning job: score the base, train, score again, and write a report one can look at.

What can be wrong with settings, paths and data is found first, before JAX is imported: within a second.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from gemma_lora.base.files import require_writable
from gemma_lora.base.settings import DEFAULTS
from gemma_lora.base.settings import Settings as Settings
from gemma_lora.data.dataset import Dataset, load_dataset
from gemma_lora.gemma.load import require_source
from gemma_lora.job.folder import claim, finished_metrics, remove_run, stored_rows, write_run
from gemma_lora.job.folder import versions as versions
from gemma_lora.job.report import progress_bar as progress_bar
from gemma_lora.job.report import report_table as report_table
from gemma_lora.job.report import show_report


def finetune(settings: Settings = DEFAULTS, console: Console | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Runs a fine-tuning job and leaves its folder behind.

    Args:
        settings: A `Settings`.
        console: Where progress and the report are shown.
        overwrite: Begin anew where the folder holds a run.

    Returns:
        The metrics, as written to `metrics.json`.

    Raises:
        GemmaLoraError: If the data cannot be used or the model cannot be loaded. The run's folder is then as it was.
    """
    console = console or Console()
    started = time.perf_counter()
    dataset = check_inputs(settings)
    finished = None if overwrite else finished_metrics(settings, dataset.digest)
    if dataset.skipped:
        console.print(f"[yellow]{escape(dataset.skipped_summary)}[/]")
    run_dir = Path(settings.run_dir)
    if finished is not None:
        console.print(f"{escape(settings.run_dir)}: this run is finished; its report follows.")
        show_report(console, run_dir, finished, stored_rows(run_dir))
        return finished
    metrics, losses, rows = _run(settings, dataset, console, overwrite, started)
    write_run(run_dir, metrics, losses, rows)
    show_report(console, run_dir, metrics, rows)
    return metrics


def check_inputs(settings: Settings) -> Dataset:
    """Finds what is wrong with a job's paths and lines before the slow work begins, and reads the lines.

    Raises:
        GemmaLoraError: If the model or the data are not there, a line is bad, or the run's folder cannot be written.
    """
    require_source(settings.model, settings.quantization)
    require_writable(Path(settings.run_dir) / "settings.json", "--run-dir")
    return load_dataset(settings.data, skip_bad_lines=settings.skip_bad_lines)


def _run(
    asked: Settings, dataset: Dataset, console: Console, overwrite: bool, started: float
) -> tuple[dict[str, Any], list[float], list[dict[str, str]]]:
    """The job itself: metrics, the loss of each step, and a row for each line that was answered."""
    from gemma_lora.job import stages

    model = stages.load_model(asked, console)
    digest, dataset = dataset.digest, stages.with_template(dataset, model, console)
    encoded = stages.encode_lines(dataset, model, asked, console)
    settings, chosen = stages.choose(asked, encoded, console)
    # Only now: a model or lines that cannot be used neither claim a folder nor cost the run that is in it.
    if overwrite:
        remove_run(asked.run_dir)
    claim(asked, digest, chosen)
    tests = dataset.tests or {"validation": dataset.validation}
    before, english_before = stages.answers_before(model, dataset, tests, settings, console)
    log, training_seconds, epochs = stages.train(model, dataset, settings, encoded)
    after = stages.answer_all(model, tests, dataset.template, settings, console, "fine-tuned")
    metrics = {
        "before": {name: scores.to_dict() for name, scores in before.items()},
        "after": {name: scores.to_dict() for name, scores in after.items()},
        "english_perplexity": {"before": english_before, "after": stages.english_perplexity(model)},
        "training_seconds": round(training_seconds, 1),
        "training_steps": len(log),
        "training": epochs,
        "seconds": round(time.perf_counter() - started, 1),
        **stages.circumstances(settings),
    }
    return metrics, [row["loss"] for row in log], _answer_rows(tests, before, after)


def _answer_rows(tests, before, after) -> list[dict[str, str]]:
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
