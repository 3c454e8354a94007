"""The learning rate's schedule, the default optimizer, and how many steps a training has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from gemma_lora.base.keras_on_jax import keras


@keras.saving.register_keras_serializable(package="gemma_lora")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly to its peak, then falls to zero along a cosine.

    Args:
        peak: Float, the highest rate.
        steps: Integer, optimizer steps of the whole training.
        warmup: Float, the share of steps that rise.

    Example:

    >>> schedule = WarmupCosine(peak=0.1, steps=100, warmup=0.1)
    >>> [round(float(schedule(step)), 4) for step in (0, 9, 55, 99)]
    [0.01, 0.1, 0.05, 0.0]
    """

    def __init__(self, peak: float, steps: int, warmup: float = 0.06):
        self.peak, self.steps, self.warmup = float(peak), int(steps), float(warmup)

    def __call__(self, step):
        ops = keras.ops
        step = ops.cast(step, "float32")
        rising = max(1.0, self.warmup * self.steps)
        progress = ops.clip((step - rising) / max(1.0, self.steps - rising), 0.0, 1.0)
        return self.peak * ops.minimum((step + 1.0) / rising, 0.5 * (1.0 + ops.cos(math.pi * progress)))

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "warmup": self.warmup}


def default_optimizer(learning_rate: float, warmup: float, steps: int | None) -> keras.optimizers.Optimizer:
    """Adam with gradients clipped to a norm of 1, as a training gets it that names no optimizer.

    Args:
        learning_rate: Float, the peak rate.
        warmup: Float, the share of steps that rise.
        steps: Integer, optimizer steps of the whole training; None where that is not known: the rate is constant then.
    """
    rate = float(learning_rate) if steps is None else WarmupCosine(learning_rate, steps, warmup)
    return keras.optimizers.Adam(rate, beta_2=0.99, global_clipnorm=1.0)


def optimizer_steps(epochs: Iterable[int], accumulate: int) -> int:
    """Optimizer steps of epochs of so many batches, where `accumulate` batches make a step and an epoch ends one.

    Example:

    >>> optimizer_steps([10, 10], accumulate=4)
    6
    """
    return sum(-(-batches // accumulate) for batches in epochs)


def batches_per_epoch(
    x: Any, batch_size: int | None = None, steps_per_epoch: int | None = None, validation_split: float = 0.0
) -> int | None:
    """How many batches Keras's `fit` makes of its arguments in an epoch; None if that cannot be known before.

    Args:
        x: What `fit` takes: arrays with examples on axis 0, in dictionaries, lists or tuples; a `PyDataset`; a
            generator; …
        batch_size, steps_per_epoch, validation_split: As in `fit`.

    Example:

    >>> import numpy as np
    >>> batches_per_epoch({"token_ids": np.zeros((100, 8))}, batch_size=16)
    7
    """
    known = _length(x, batch_size, validation_split)
    if known is None or steps_per_epoch is None:
        return known if steps_per_epoch is None else steps_per_epoch
    return min(known, steps_per_epoch)


def _length(x: Any, batch_size: int | None, validation_split: float) -> int | None:
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    if leaves and all(len(getattr(leaf, "shape", ())) > 0 for leaf in leaves):
        examples = math.floor(int(leaves[0].shape[0]) * (1.0 - validation_split))
        return -(-examples // (batch_size or 32))  # 32 is Keras's default
    try:
        return len(x)  # batches: a `tf.data.Dataset`, a torch `DataLoader`
    except TypeError:
        return None
