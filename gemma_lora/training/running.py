"""How `fit` calls callbacks: in which order, with which weights in the model, and which ones cannot work."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.training.datasets import Epochs

_BATCH_METHODS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
_TEST_METHODS = ("on_test_batch_begin", "on_test_batch_end")
_Callbacks = Sequence[keras.callbacks.Callback]


def as_list(callbacks: Any) -> list[keras.callbacks.Callback]:
    """What a caller gave as `callbacks`: a callback, several in whatever nesting, a `CallbackList`, or None."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    return keras.tree.flatten(callbacks) if callbacks else []


class RunningCallbacks(keras.callbacks.CallbackList):
    """Keras's list of callbacks, for a training of `FineTuner`.

    While Keras trains it keeps the weights apart from the model's variables, which hold nothing then. Where a
    callback of the caller's looks at batches, the variables get the weights first, so it may generate or save.
    Places of an epoch that hold no batch (see `Epochs`) are passed over.

    Args:
        before: Our own callbacks that come first.
        callbacks: The caller's.
        after: Our own that come last.
        data: The epochs, if the training is of lines.
        more: As `CallbackList` takes it: `model`, `epochs`, `steps`, `verbose`.
    """

    def __init__(
        self, before: _Callbacks, callbacks: _Callbacks, after: _Callbacks, data: Epochs | None = None, **more: Any
    ):
        self._data, self._epoch = data, 0
        self._train_looks = any(_overrides(callback, _BATCH_METHODS) for callback in callbacks)
        self._test_looks = any(_overrides(callback, _TEST_METHODS) for callback in callbacks)
        given = [*before, *callbacks]
        if not any(isinstance(callback, keras.callbacks.History) for callback in given):
            given.append(keras.callbacks.History())
        super().__init__([*given, *after], add_history=True, **more)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if self._data is not None:
            self._data.epoch = epoch
        super().on_epoch_begin(epoch, logs)

    def _passes_over(self, first: int) -> bool:
        if self._data is None:
            return False
        block = range(first, first + self.model.steps_per_execution)
        return not any(self._data.holds(self._epoch, place) for place in block)

    def on_train_batch_begin(self, batch, logs=None):
        if not self._passes_over(batch):
            super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        if self._passes_over(batch - self.model.steps_per_execution + 1):
            return
        if self._train_looks:
            self.model.jax_state_sync()
        super().on_train_batch_end(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        if self._test_looks:
            self.model.jax_state_sync()
        super().on_test_batch_end(batch, logs)


def _overrides(callback: keras.callbacks.Callback, names: Sequence[str]) -> bool:
    plain = keras.callbacks.Callback
    return any(name in vars(callback) or getattr(type(callback), name) is not getattr(plain, name) for name in names)


def sets_the_rate(callbacks: _Callbacks) -> keras.callbacks.Callback | None:
    """The callback that sets the optimizer's learning rate itself, if there is one."""
    kinds = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
    return next((callback for callback in callbacks if isinstance(callback, kinds)), None)


def check_callbacks(callbacks: _Callbacks, optimizer: keras.optimizers.Optimizer | None, run_dir: Any) -> None:
    """Finds callbacks that would fail after an epoch or more, before anything is trained.

    Args:
        callbacks: The caller's.
        optimizer: The caller's; None where it is `fit`'s own.
        run_dir: The run's folder, or None.

    Raises:
        ValueError: If one cannot work; it says what to do instead.
        GemmaLoraError: If one needs a package that is not installed.
    """
    for callback in callbacks:
        kind = type(callback).__name__
        if not isinstance(callback, keras.callbacks.Callback):
            raise ValueError(f"`callbacks` must hold Keras callbacks. Received: {kind}")
        if isinstance(callback, keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
            raise ValueError(
                f"{kind} cannot save a FineTuner as a whole model: it is a Gemma with a loss around it. Give "
                "`save_weights_only=True` and a path that ends in '.weights.h5', or keep the best epoch with "
                f"`EarlyStopping(restore_best_weights=True)` and `save_adapter`. Received: {callback.filepath!r}"
            )
        if isinstance(callback, keras.callbacks.BackupAndRestore) and run_dir:
            raise ValueError(
                f"`run_dir` already keeps what {kind} would: a run that was stopped goes on where it stood, in the "
                f"middle of an epoch too. Use one of the two. Received: run_dir={str(run_dir)!r}"
            )
        if isinstance(callback, keras.callbacks.TensorBoard):
            missing = [name for name in ("tensorflow", "tensorboard") if importlib.util.find_spec(name) is None]
            if missing:
                raise GemmaLoraError(
                    f"Keras's {kind} needs {' and '.join(missing)}, which is not installed. Install it "
                    f"(`pip install {' '.join(missing)}`), or use `keras.callbacks.CSVLogger`."
                )
    setter = sets_the_rate(callbacks)
    if setter is not None and optimizer is not None and has_schedule(optimizer):
        raise ValueError(
            f"{type(setter).__name__} sets the learning rate, but the optimizer's rate is a schedule. Use one of the "
            "two: `compile` with a number as `learning_rate`, or leave the callback out."
        )


def has_schedule(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the optimizer's learning rate is a schedule of its own."""
    rate = optimizer.get_config().get("learning_rate")
    return isinstance(rate, dict)
