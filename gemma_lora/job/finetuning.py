"""The whole fine-tuning job: score the base, train, score again, and write a report one can look at.

What can be wrong with settings, paths and data is found first, before JAX is imported: within a second.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from gemma_lora.base.files import require_writable
from gemma_lora.base.settings import DEFAULTS, Metric
from gemma_lora.base.settings import Settings as Settings
from gemma_lora.data.dataset import Dataset, load_dataset
from gemma_lora.data.formats import Example, turns_before_answer
from gemma_lora.gemma.load import require_source
from gemma_lora.generation.metrics import MAIN, Scores, compare, metric_of
from gemma_lora.job.folder import claimed, finished_metrics, remove_run, stored_rows, write_run
from gemma_lora.job.folder import versions as versions
from gemma_lora.job.report import progress_bar as progress_bar
from gemma_lora.job.report import report_table as report_table
from gemma_lora.job.report import show_report
from gemma_lora.job.warnings import find_warnings


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
    for notice in dataset.notices:
        console.print(escape(notice), highlight=False)
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
    dataset = load_dataset(
        settings.data,
        settings.template,
        settings.skip_bad_lines,
        validation=settings.validation,
        on_notice=lambda notice: None,  # the job shows them, on its console
    )
    _metric(settings, dataset)
    return dataset


def _metric(settings: Settings, dataset: Dataset) -> Metric:
    """What the answers are scored by: what was asked for, or what suits all the right answers there are."""
    lines = [*dataset.train, *dataset.validation, *(line for split in dataset.tests.values() for line in split)]
    return metric_of(settings.metric, [line.response for line in lines])


def _run(
    asked: Settings, dataset: Dataset, console: Console, overwrite: bool, started: float
) -> tuple[dict[str, Any], list[float], list[dict[str, Any]]]:
    """The job itself: metrics, the loss of each step, and a row for each line that was answered."""
    from gemma_lora.job import stages

    model = stages.load_model(asked, console)
    digest, dataset = dataset.digest, stages.with_template(dataset, model, console)
    encoded = stages.encode_lines(dataset, model, asked, console)
    settings, chosen = stages.choose(asked, encoded, dataset, model, console)
    settings, chosen = _with_metric(settings, chosen, dataset, console)
    # Only now: a model or lines that cannot be used neither claim a folder nor cost the run that is in it.
    if overwrite:
        remove_run(asked.run_dir)
    tests = dataset.tests or {"validation": dataset.validation}
    with claimed(asked, digest, chosen):
        before, english_before = stages.answers_before(model, dataset, tests, settings, console)
    log, training_seconds, epochs = stages.train(model, dataset, settings, console, encoded)
    after = stages.answer_all(model, tests, dataset, settings, console, "fine-tuned")
    losses = [row["loss"] for row in log]
    metrics = {
        "metric": settings.metric,
        "before": {name: scores.to_dict() for name, scores in before.items()},
        "after": {name: scores.to_dict() for name, scores in after.items()},
        "difference": _differences(tests, before, after),
        "english_perplexity": {"before": english_before, "after": stages.english_perplexity(model)},
        "lines": {"train": len(encoded.tokens[: settings.limit]), "validation": len(dataset.validation)},
        "lines_left_out": sum(dataset.skipped.values()) + sum(encoded.skipped.values()),
        "training_loss": _halves(losses),
        "training_seconds": round(training_seconds, 1),
        "training_steps": len(log),
        "training": epochs,
        "replay": settings.replay,
        "seconds": round(time.perf_counter() - started, 1),
        **stages.circumstances(settings),
    }
    return metrics | {"warnings": find_warnings(metrics)}, losses, _answer_rows(tests, before, after)


def _with_metric(
    settings: Settings, chosen: dict[str, Any], dataset: Dataset, console: Console
) -> tuple[Settings, dict[str, Any]]:
    """The settings with a metric, which is among what was chosen if nobody named one; says which it is."""
    metric = _metric(settings, dataset)
    why = "as asked for" if settings.metric else "for the right answers suit it; --metric sets another"
    console.print(f"Metric: {metric} ({MAIN[metric]}), {why}.", highlight=False)
    if settings.metric is None:
        chosen = chosen | {"metric": metric}
    return dataclasses.replace(settings, metric=metric), chosen


def _differences(
    tests: dict[str, list[Example]], before: dict[str, Scores], after: dict[str, Scores]
) -> dict[str, dict[str, Any]]:
    """After minus before, on the lines that both answered, for each split and score: value, low and high."""
    found = {}
    for name in (name for name in after if name in before):
        references = [example.response for example in tests[name]]
        of_split = compare(before[name], after[name], references)
        found[name] = {score: dataclasses.asdict(value) for score, value in of_split.items()}
    return found


def _halves(losses: list[float]) -> dict[str, float]:
    """The mean training loss of the first and of the second half of the steps; empty if there are fewer than two."""
    middle = len(losses) // 2
    if not middle:
        return {}
    first, second = losses[:middle], losses[middle:]
    return {"first_half": sum(first) / len(first), "second_half": sum(second) / len(second)}


def _answer_rows(
    tests: dict[str, list[Example]], before: dict[str, Scores], after: dict[str, Scores]
) -> list[dict[str, Any]]:
    """One row a test line: split, prompt, right response, a chat's history, and the answers before and after."""
    rows = []
    for name, examples in tests.items():
        for number, example in enumerate(examples):
            row: dict[str, Any] = {"split": name} | shown_line(example)
            for when, scores in (("before", before), ("after", after)):
                if name in scores and number < scores[name].count:
                    row[when] = scores[name].answers[number]
                    row |= {f"{when}_cut": True} if number in scores[name].cut_lines else {}
            rows.append(row)
    return rows


def shown_line(example: Example) -> dict[str, Any]:
    """An example as files of answers show it: prompt and right response, and of a chat all that the model was asked.

    Example:

    >>> turns = (("user", "Hello"), ("model", "Hi"), ("user", "And now?"), ("model", "Bye"))
    >>> [turn["role"] for turn in shown_line(Example("And now?", "Bye", turns=turns))["messages"]]
    ['user', 'assistant', 'user']
    """
    line: dict[str, Any] = {"prompt": example.prompt, "response": example.response}
    if example.turns:
        roles = {"user": "user", "model": "assistant"}
        line["messages"] = [{"role": roles[role], "content": text} for role, text in turns_before_answer(example)]
    return line
