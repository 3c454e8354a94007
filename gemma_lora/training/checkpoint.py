"""A training's state on disk: whole or absent, so that a run that was killed goes on where it stood.

One safetensors file holds everything that changes while a model trains (A and B, the optimizer's moments and step,
dropout's seeds, the running mean of the loss, what callbacks remember) and, in its metadata, the step and the
settings. It is written to a temporary name and renamed: at every moment the file of the last finished write stands
there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path

FILE = "checkpoint.safetensors"
_FORMAT = "gemma_lora checkpoint 1"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Invariants: `step` batches of the training that `settings` describes led to `arrays`; `log` has one row for each.
    `epochs` epochs have ended (None: older files do not say); `finished` if the training has, be it that a callback
    stopped it; `stopped` if a callback has, and the end may still be to do. `callbacks` is what `CallbackStates` took.
    Arrays that begin with `metric.` or `callback.` are not the training's own.
    """

    step: int
    settings: dict[str, Any]
    log: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    epochs: int | None = None
    finished: bool = False
    callbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stopped: bool = False


def save(folder: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint into a run's folder in place of the one before.

    Raises:
        GemmaLoraError: If the disk is full or the folder cannot be written to; the one before still stands.
    """
    from safetensors.numpy import save_file

    metadata = {
        "format": _FORMAT,
        "step": str(checkpoint.step),
        "settings": json.dumps(checkpoint.settings, sort_keys=True),
        "log": json.dumps(checkpoint.log),
        "epochs": json.dumps(checkpoint.epochs),
        "finished": json.dumps(checkpoint.finished),
        "callbacks": json.dumps(checkpoint.callbacks),
        "stopped": json.dumps(checkpoint.stopped),
    }
    path = Path(folder) / FILE
    try:
        with atomic_path(path) as temporary:
            save_file(
                {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}, temporary, metadata
            )
    except Exception as error:  # safetensors wraps the system's errors in its own
        if isinstance(error, OSError) or "os error" in str(error).lower():
            raise GemmaLoraError(
                f"{path}: cannot be written ({error}). Make room, then run the same command again: "
                "it goes on from the last checkpoint."
            ) from error
        raise


def load(folder: str | os.PathLike) -> Checkpoint | None:
    """Reads a run's checkpoint; None if there is none.

    Raises:
        GemmaLoraError: If the file is damaged or not a checkpoint of this package.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        # The last four are not in files of before there were such.
        later = (("epochs", "null"), ("finished", "false"), ("callbacks", "[]"), ("stopped", "false"))
        more = {name: json.loads(metadata.get(name, plain)) for name, plain in later}
        found = Checkpoint(
            int(metadata["step"]), json.loads(metadata["settings"]), json.loads(metadata["log"]), arrays, **more
        )
        _check(found)
        return found
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise GemmaLoraError(
            f"{path}: not a checkpoint of this version ({error}). "
            "Delete it to begin anew, or choose another run folder."
        ) from error


def _check(found: Checkpoint) -> None:
    """Checks a file's values before anything of it reaches a model."""
    if not isinstance(found.settings, dict):
        raise ValueError(f"settings are no object: {found.settings!r}")
    if not isinstance(found.log, list) or not all(isinstance(row, dict) for row in found.log):
        raise ValueError("the log is no list of rows")
    if found.step < 0:
        raise ValueError(f"step {found.step}")
    if found.epochs is not None and (not isinstance(found.epochs, int) or found.epochs < 0):
        raise ValueError(f"epochs {found.epochs!r}")
    if not isinstance(found.callbacks, list) or not all(isinstance(state, dict) for state in found.callbacks):
        raise ValueError("the callbacks are no list of states")
    if wrong := [name for name, array in _own(found).items() if not np.isfinite(array).all()]:
        raise ValueError(f"{wrong[0]} holds numbers that are not finite")


def _own(found: Checkpoint) -> dict[str, np.ndarray]:
    """The arrays that are the training's: weights, seeds, the optimizer's state."""
    return {name: array for name, array in found.arrays.items() if not name.startswith(("metric.", "callback."))}


def of_run(folder: str | os.PathLike, settings: Mapping[str, Any]) -> Checkpoint | None:
    """Reads a run's checkpoint for a training with these settings; None if there is none.

    Raises:
        GemmaLoraError: If the checkpoint is of a training with other settings, or no checkpoint.
    """
    found = load(folder)
    if found and (changed := changed_settings(found.settings, settings)):
        raise GemmaLoraError(
            f"{folder}: holds a run with other settings: {'; '.join(changed)}. Set them back to go on with it, choose "
            f"another run folder, or delete {FILE} to begin anew."
        )
    return found


def assign(folder: str | os.PathLike, checkpoint: Checkpoint, variables: Mapping[str, Any]) -> None:
    """Gives variables a checkpoint's values.

    Args:
        folder: Where it lies, for the message.
        checkpoint: As `load` gives it.
        variables: `{name: variable}`, with the names of its arrays.

    Raises:
        GemmaLoraError: If names or shapes differ; no variable was changed then.
    """
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    if shapes != {name: array.shape for name, array in _own(checkpoint).items()}:
        raise GemmaLoraError(f"{folder}/{FILE}: is of another model. Choose another run folder.")
    for name, variable in variables.items():
        variable.assign(checkpoint.arrays[name])


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says which settings differ: `"learning_rate was 0.002, is 0.001"`; empty if none does."""
    now = json.loads(json.dumps(dict(now)))  # tuples as JSON has them
    names = [name for name in (*then, *(name for name in now if name not in then))]
    return [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in names if then.get(name) != now.get(name)]
