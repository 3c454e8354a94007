"""A run's folder: whose it is, what is in it, and what a later run of the same settings finds there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError, write_json_atomic, write_jsonl_atomic
from gemma_lora.base.settings import DEFAULTS, Settings
from gemma_lora.training.checkpoint import FILE as CHECKPOINT
from gemma_lora.training.checkpoint import changed_settings

#: What a job writes into its folder, beside `adapter/`.
RUN_FILES = (
    "settings.json",
    "before.json",
    "replay.json",
    "training_settings.json",
    "training.jsonl",
    CHECKPOINT,
    "metrics.json",
    "answers.jsonl",
    "loss.png",
    "confusion.png",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "template.json", "base.json", "README.md")


def finished_metrics(settings: Settings, data_sha256: str) -> dict[str, Any] | None:
    """The metrics of a job that is finished already, else None. Nothing is written.

    Args:
        settings: What was asked for.
        data_sha256: The dataset's digest.

    Raises:
        GemmaLoraError: If the folder holds a run with other settings or data; the message names them.
    """
    run_dir = Path(settings.run_dir)
    if not _began(run_dir):
        return None
    # A setting that did not exist when the run began was what it is by default.
    then = dataclasses.asdict(DEFAULTS) | read_json(run_dir / "settings.json")
    for name in ("versions", "chosen"):
        then.pop(name, None)
    if changed := changed_settings(then, dataclasses.asdict(settings) | {"data_sha256": data_sha256}):
        raise GemmaLoraError(
            f"{run_dir}: holds a run with other settings: {'; '.join(changed)}. Set them back to go on with it, "
            "choose another --run-dir, or pass --overwrite to replace it."
        )
    metrics = run_dir / "metrics.json"
    return read_json(metrics) if metrics.exists() else None


def claim(settings: Settings, data_sha256: str, chosen: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Makes the run's folder this job's: writes its settings there, or checks that they and the data are the same.

    Args:
        settings: What was asked for.
        data_sha256: The dataset's digest.
        chosen: What was chosen where the settings are None, to be recorded.

    Returns:
        The metrics if the job is finished already, else None.

    Raises:
        GemmaLoraError: If the folder holds a run with other settings; the message names them.
    """
    run_dir = Path(settings.run_dir)
    if _began(run_dir):
        return finished_metrics(settings, data_sha256)
    record = dataclasses.asdict(settings) | {"data_sha256": data_sha256, "chosen": chosen or {}}
    write_json_atomic(run_dir / "settings.json", record | {"versions": versions()})
    return None


@contextlib.contextmanager
def claimed(settings: Settings, data_sha256: str, chosen: dict[str, Any] | None = None) -> Iterator[None]:
    """As `claim`; a start that fails within leaves no folder that was not there before."""
    run_dir = Path(settings.run_dir)
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    claim(settings, data_sha256, chosen)
    try:
        yield
    except (GemmaLoraError, ValueError, OSError):
        if not _began(run_dir):
            (run_dir / "settings.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another's files are in it
                for folder in made:
                    folder.rmdir()
        raise


def _began(run_dir: Path) -> bool:
    """Whether a job has done something here; settings alone are of one that failed before it had."""
    others = [name for name in RUN_FILES if name != "settings.json"]
    return (run_dir / "settings.json").exists() and any((run_dir / name).exists() for name in others)


def remove_run(run_dir: str | os.PathLike) -> None:
    """Deletes what a job wrote into its folder, so that the next one begins anew; other files stay."""
    for name in (*RUN_FILES, *(f"adapter/{name}" for name in _ADAPTER_FILES)):
        (Path(run_dir) / name).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """An object that a job wrote.

    Raises:
        GemmaLoraError: If it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}). Pass --overwrite to begin anew.") from error
    if not isinstance(value, dict):
        raise GemmaLoraError(f"{path}: not what this program wrote. Pass --overwrite to begin anew.")
    return value


def stored_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a finished run's `answers.jsonl`; none if the file is gone."""
    path = run_dir / "answers.jsonl"
    if not path.exists():
        return []
    # Only "\n" ends a line: an answer may hold U+2028, which `splitlines` takes for an end too.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_run(run_dir: Path, metrics: dict[str, Any], losses: list[float], rows: list[dict[str, Any]]) -> None:
    """Writes answers, the pictures and, last, the metrics, which say that the run is finished."""
    from gemma_lora.plots import confusion_matrices, loss_curve, save_figure

    write_jsonl_atomic(run_dir / "answers.jsonl", rows)
    save_figure(loss_curve(losses), run_dir / "loss.png")
    tables = {name: scores["confusion"] for name, scores in metrics["after"].items() if scores.get("confusion")}
    if tables:
        save_figure(confusion_matrices(tables), run_dir / "confusion.png")
    write_json_atomic(run_dir / "metrics.json", metrics)


def versions() -> dict[str, str]:
    """The versions of the packages a run's result depends on."""
    names = ("gemma_lora", "keras", "keras-hub", "jax", "jaxlib", "numpy", "gguf")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
