"""Keeping the epoch that does best on lines that are not trained on."""

from __future__ import annotations

import math

import numpy as np

from gemma_lora.base.keras_on_jax import keras


class KeepBest(keras.callbacks.Callback):
    """Gives the model the weights of its best epoch in the end, and stops when it gets no better.

    As Keras's `EarlyStopping(restore_best_weights=True)`, but it keeps a copy of the weights that are trained only:
    with LoRA that is a hundredth of the model.

    Args:
        patience: Integer, epochs without a lower loss after which the training stops; None never stops it.
        monitor: The name of a loss in the epoch's logs.

    Attributes:
        best, best_epoch: The lowest loss, and the number of its epoch counted from 1; None before there is one.
    """

    def __init__(self, patience: int | None = None, monitor: str = "val_loss"):
        super().__init__()
        if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
            raise ValueError(f"`patience` must be an integer of at least 1, or None. Received: patience={patience!r}")
        self.patience, self.monitor = patience, monitor
        self.on_train_begin()

    def on_train_begin(self, logs=None):
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.waited = 0
        self.stopped = False
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch, logs=None):
        loss = (logs or {}).get(self.monitor)
        if loss is None or not math.isfinite(loss):
            return
        if self.best is None or loss < self.best:
            self.best, self.best_epoch, self.waited = float(loss), epoch + 1, 0
            self.weights = [np.array(variable.value) for variable in self.model.trainable_variables]
            return
        self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            self.stopped = self.model.stop_training = True

    def on_train_end(self, logs=None):
        for variable, value in zip(self.model.trainable_variables, self.weights, strict=bool(self.weights)):
            variable.assign(value)
        self.weights = []
