"""What happens between a training's batches: the log, checkpoints, steps that end with an epoch."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, write_text_atomic
from gemma_lora.base.hardware import memory_bytes
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.training import checkpoint

if TYPE_CHECKING:
    from gemma_lora.training.tuner import FineTuner


class TrainingLog(keras.callbacks.Callback):
    """Writes one JSON line per batch of a `FineTuner`: step, loss, seconds, tokens per second, memory in bytes.

    The loss is the batch's own mean over its tokens that carry loss (Keras shows the epoch's running mean), also where
    several batches make an optimizer step. `step` counts batches.

    Args:
        path: The JSON Lines file; an older one is replaced.
        tokens: Tokens that carry loss, a number per batch; None where it is not known.
        rows: Rows of batches that were made before; the numbering goes on after them.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        tokens: list[int] | None = None,
        rows: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.path = Path(path) if path else None
        self.tokens = tokens
        self.rows: list[dict[str, Any]] = list(rows or [])

    def on_train_begin(self, logs=None):
        self._file = None
        if self.path:
            write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = open(self.path, "a", encoding="utf-8")

    def on_epoch_begin(self, epoch, logs=None):
        self._clock = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(self.model.batch_loss)
        if not math.isfinite(loss):
            self.model.stop_training = True
            raise GemmaLoraError(
                f"The loss is {loss} at step {len(self.rows) + 1}. Lower the learning rate, or look at the data "
                "with show_mask."
            )
        now = time.perf_counter()
        row = {
            "step": len(self.rows) + 1,
            "loss": round(loss, 6),
            "seconds": round(now - self._clock, 3),
        }
        if self.tokens:
            row["tokens_per_second"] = round(self.tokens[batch % len(self.tokens)] / (now - self._clock), 1)
        row["memory_bytes"] = memory_bytes()
        self._clock = now
        self.rows.append(row)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def on_train_end(self, logs=None):
        if self._file:
            self._file.close()


class StepEnds(keras.callbacks.Callback):
    """Where several batches make a step, makes one of those that are left at an epoch's end.

    Args:
        tuner: The `FineTuner` that trains.
        ends: How many batches were seen at each end, where epochs follow each other in one pass of Keras's.
    """

    def __init__(self, tuner: FineTuner, ends: Collection[int] = ()):
        super().__init__()
        self.tuner, self.ends = tuner, frozenset(ends)

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 in self.ends:
            self.tuner.jax_state_sync()  # Keras keeps the values apart while it trains
            self.tuner.end_step()

    def on_epoch_end(self, epoch, logs=None):
        self.tuner.end_step()

    def on_test_begin(self, logs=None):  # validation comes before Keras calls an epoch ended
        self.tuner.end_step()


class Checkpoints(keras.callbacks.Callback):
    """Writes a checkpoint every so many seconds and after the last batch.

    Args:
        tuner: The `FineTuner` that trains.
        record: What the run is, as the checkpoint keeps it.
        log: The training's log; it counts the batches.
        last_step: Integer, batches of the whole training.
        seconds: Float, time between checkpoints.
    """

    def __init__(self, tuner: FineTuner, record: dict[str, Any], log: TrainingLog, last_step: int, seconds: float):
        super().__init__()
        self.tuner, self.record, self.log, self.last_step, self.seconds = tuner, record, log, last_step, seconds
        self.folder = Path(tuner.run_dir or ".")
        self._written = time.monotonic()
        self.saved_step = 0

    def state(self) -> str:
        """What is on disk, for the message when training ends early."""
        if not self.saved_step:
            return f"{self.folder} holds no checkpoint yet."
        return f"{self.folder} holds the checkpoint of step {self.saved_step} of {self.last_step}."

    def on_train_batch_end(self, batch, logs=None):
        step = len(self.log.rows)
        if step == self.last_step or time.monotonic() - self._written >= self.seconds:
            self.model.jax_state_sync()  # Keras keeps the values apart while it trains
            arrays = {name: np.asarray(v.value) for name, v in self.tuner.changing_variables().items()}
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise GemmaLoraError(f"A weight is not a finite number after step {step}. Lower the learning rate.")
            checkpoint.save(self.folder, checkpoint.Checkpoint(step, self.record, self.log.rows, arrays))
            self._written, self.saved_step = time.monotonic(), step
