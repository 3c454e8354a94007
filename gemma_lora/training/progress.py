"""The lines that `fit` prints while it trains."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from gemma_lora.base.keras_on_jax import keras

#: Seconds between two plain lines, where a line cannot be written over.
_SECONDS_BETWEEN_LINES = 20.0


def is_live(stream: TextIO) -> bool:
    """Whether a line can be written over: a terminal, or a notebook's output."""
    return bool(getattr(stream, "isatty", lambda: False)()) or type(stream).__module__.startswith("ipykernel")


class ProgressLine(keras.callbacks.Callback):
    """One line that is written over at each step; plain lines where the output goes to a file.

    It shows the batch's own loss beside the epoch's mean. The first step compiles the program, which is said before
    it begins and is not counted in the time that is left.

    Args:
        tuner: The model that trains; its `batch_loss` is shown.
        epochs: Integer, the last epoch's number.
        steps: `{epoch: its steps}`, or a number for all; None if it is not known.
        verbose: 1 for a line that moves, 2 for one line an epoch.
    """

    def __init__(self, tuner: Any, epochs: int, steps: Any, verbose: int = 1):
        super().__init__()
        self._tuner, self._epochs, self._steps, self._verbose = tuner, epochs, steps, verbose
        self._compiled = False
        self._width = 0
        self._seen = self._timed = 0
        self._seconds = 0.0

    def on_train_begin(self, logs=None):
        self._live, self._shown = is_live(sys.stdout), time.monotonic()
        self._compiled, self._timed, self._seconds = False, 0, 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._began, self._clock, self._seen = epoch, time.monotonic(), time.monotonic(), 0

    def on_train_batch_begin(self, batch, logs=None):
        if not self._compiled and self._tuner.compiles_next:
            self._write("Compiling the training step: the first step takes longer than those after it.\n")
        self._clock = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        now = time.monotonic()
        count = len(self._tuner.batch_losses)
        if self._compiled or not self._tuner.compiled_last:
            self._timed += count
            self._seconds += now - self._clock
        self._compiled = True
        self._seen = batch + 1
        if self._verbose != 1:
            return
        if self._live:
            self._over(self._line(logs or {}))
        elif now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            self._write(self._line(logs or {}) + "\n")

    def on_epoch_end(self, epoch, logs=None):
        named = ", ".join(f"{name} {_short(value)}" for name, value in (logs or {}).items())
        line = f"Epoch {epoch + 1}/{self._epochs}: {named} ({_duration(time.monotonic() - self._began)})"
        if self._live and self._verbose == 1:
            self._over(line)
            line, self._width = "", 0
        self._write(line + "\n")

    def on_test_begin(self, logs=None):
        if self._live and self._verbose == 1 and self._width:
            self._over(f"Epoch {self._epoch + 1}/{self._epochs}: validation …")

    def _line(self, logs: dict[str, Any]) -> str:
        steps = self._steps.get(self._epoch) if isinstance(self._steps, dict) else self._steps
        place = f"step {min(self._seen, steps)}/{steps}" if steps else f"step {self._seen}"
        line = f"Epoch {self._epoch + 1}/{self._epochs}, {place}: loss {_short(float(self._tuner.batch_loss))}"
        if "loss" in logs:
            line += f", mean {_short(logs['loss'])}"
        if self._timed:
            each = self._seconds / self._timed
            line += f", {each:.2f} s a step"
            if steps:
                line += f", {_duration(each * self._left(steps))} left"
        return line

    def _left(self, steps: int) -> int:
        """Steps to come, in this epoch and those after it."""
        after = range(self._epoch + 1, self._epochs)
        if isinstance(self._steps, dict):
            return steps - self._seen + sum(self._steps.get(epoch, 0) for epoch in after)
        return steps - self._seen + steps * len(after)

    def _over(self, line: str) -> None:
        self._write("\r" + line.ljust(self._width))
        self._width = len(line)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"
