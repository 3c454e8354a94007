"""What happens between a training's batches: the log, checkpoints, steps that end with an epoch."""

from __future__ import annotations

import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, write_text_atomic
from gemma_lora.base.hardware import memory_bytes
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.training import checkpoint
from gemma_lora.training.states import CallbackStates

if TYPE_CHECKING:
    from gemma_lora.training.tuner import FineTuner


class TrainingLog(keras.callbacks.Callback):
    """Writes one JSON line per batch of a `FineTuner`: step, loss, seconds, tokens per second, memory in bytes.

    The loss is the batch's own mean over its tokens that carry loss (Keras shows the epoch's running mean), also where
    several batches make an optimizer step, or several are trained in one execution. `step` counts batches.

    Args:
        path: The JSON Lines file; an older one is replaced.
        tokens: Tokens that carry loss, a number per batch of the whole training; None where it is not known.
        rows: Rows of batches that were made before; the numbering goes on after them.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        tokens: Sequence[int] | None = None,
        rows: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.path = Path(path) if path else None
        self.tokens = tokens
        self.rows: list[dict[str, Any]] = list(rows or [])

    def on_train_begin(self, logs=None):
        if self.path:
            write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def on_epoch_begin(self, epoch, logs=None):
        self._clock = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        losses = [float(loss) for loss in self.model.batch_losses]
        now = time.perf_counter()
        rows = [self._row(loss, (now - self._clock) / len(losses)) for loss in losses]
        self._clock = now
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def _row(self, loss: float, seconds: float) -> dict[str, Any]:
        step = len(self.rows) + 1
        if not math.isfinite(loss):
            self.model.stop_training = True
            raise GemmaLoraError(
                f"The loss is {loss} at step {step}. Lower the learning rate, or look at the data with show_mask."
            )
        row = {"step": step, "loss": round(loss, 6), "seconds": round(seconds, 3)}
        if self.tokens:
            row["tokens_per_second"] = round(self.tokens[(step - 1) % len(self.tokens)] / seconds, 1)
        row["memory_bytes"] = memory_bytes()
        self.rows.append(row)
        return row


class StepEnds(keras.callbacks.Callback):
    """Where several batches make a step, makes one of those that are left at an epoch's end.

    Args:
        tuner: The `FineTuner` that trains.
    """

    def __init__(self, tuner: FineTuner):
        super().__init__()
        self.tuner = tuner

    def on_epoch_end(self, epoch, logs=None):
        self.tuner.end_step()

    def on_test_begin(self, logs=None):  # validation comes before Keras calls an epoch ended
        self.tuner.end_step()


class Checkpoints(keras.callbacks.Callback):
    """Writes a checkpoint at the start, every so many seconds, after each epoch and when the training has ended.

    It comes after all other callbacks, so that what they changed is kept, and gives a run that goes on its state.

    Args:
        tuner: The `FineTuner` that trains.
        record: What the run is, as the checkpoint keeps it.
        log: The training's log; it counts the batches.
        ends: How many batches there are up to the end of each epoch.
        first: Integer, the number of the first epoch.
        seconds: Float, time between checkpoints.
        found: The checkpoint that the run goes on from.
    """

    def __init__(
        self,
        tuner: FineTuner,
        record: dict[str, Any],
        log: TrainingLog,
        ends: Sequence[int],
        first: int,
        seconds: float,
        found: checkpoint.Checkpoint | None,
    ):
        super().__init__()
        self.tuner, self.record, self.log, self.ends, self.first = tuner, record, log, list(ends), first
        self.seconds, self.found = seconds, found
        self.folder = Path(tuner.run_dir or ".")
        self.epochs = epochs_ended(found, self.ends)
        self.saved_step = found.step if found else 0
        self._written = time.monotonic()
        self._states = CallbackStates([], tuner)

    def watch(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Says whose states are kept."""
        self._states = CallbackStates(callbacks, self.tuner)

    def state(self) -> str:
        """What is on disk, for the message when training ends early."""
        return f"{self.folder} holds the checkpoint of step {self.saved_step} of {self.ends[-1]}."

    def give_back_states(self) -> None:
        """Sets the callbacks to where the checkpoint has them."""
        if self.found:
            self._states.give_back(self.found.callbacks, self.found.arrays)

    def on_train_begin(self, logs=None):
        self._states.remember_start()
        self.give_back_states()
        if not self.found:
            self._save()

    def on_epoch_begin(self, epoch, logs=None):
        found, self.found = self.found, None
        # In the middle of an epoch its beginning has been: what other callbacks did just now, such as setting the
        # learning rate, is undone, and the mean of the losses goes on.
        if found and found.step > ([0, *self.ends])[self.epochs]:
            checkpoint.assign(self.folder, found, self.tuner.changing_variables())
            for number, variable in enumerate(self.model.metrics_variables):
                if (name := f"metric.{number:04d}") in found.arrays:
                    variable.assign(found.arrays[name])

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() - self._written >= self.seconds:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        self.epochs = epoch + 1 - self.first
        self._save()

    def on_train_end(self, logs=None):
        self._save(finished=True)

    def _save(self, finished: bool = False) -> None:
        step = len(self.log.rows)
        self.model.jax_state_sync()  # Keras keeps the values apart while it trains
        arrays = {name: np.asarray(v.value) for name, v in self.tuner.changing_variables().items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise GemmaLoraError(f"A weight is not a finite number after step {step}. Lower the learning rate.")
        states, more = self._states.take()
        metrics = {f"metric.{i:04d}": np.asarray(v.value) for i, v in enumerate(self.model.metrics_variables)}
        made = checkpoint.Checkpoint(
            step, self.record, self.log.rows, arrays | metrics | more, self.epochs, finished, states,
            stopped=bool(self.model.stop_training),
        )  # fmt: skip
        checkpoint.save(self.folder, made)
        self._written, self.saved_step = time.monotonic(), step


def epochs_ended(found: checkpoint.Checkpoint | None, ends: Sequence[int]) -> int:
    """How many epochs a checkpoint's training has ended."""
    if found is None:
        return 0
    return bisect_right(ends, found.step) if found.epochs is None else found.epochs
