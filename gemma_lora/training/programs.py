"""Compiled steps: weights that do not change stay where they are, and a program is made anew when its model changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from gemma_lora.base.hardware import Program
from gemma_lora.base.keras_on_jax import keras

_Step = Callable[..., tuple[Any, tuple]]


class Fingerprint:
    """What a compiled program was made from: layers, their variables, what of them is no variable.

    Nothing is kept alive by it.

    Args:
        model: A Keras model.
    """

    def __init__(self, model: keras.Model):
        self._parts = [(weakref.ref(part), traits) for part, traits in _parts(model)]

    def matches(self, model: keras.Model) -> bool:
        """Whether the model is still built of these layers and variables."""
        now = list(_parts(model))
        return len(now) == len(self._parts) and all(
            then() is part and traits_then == traits
            for (then, traits_then), (part, traits) in zip(self._parts, now, strict=True)
        )


def _parts(model: keras.Model) -> Iterator[tuple[Any, tuple]]:
    for layer in model._flatten_layers():
        yield layer, (layer.trainable, layer.dtype_policy.name, getattr(layer, "dropout_rate", None))
    for variable in model.variables:
        yield variable, (variable.trainable, str(variable.dtype))


def train_program(train_step: _Step) -> _Step:
    """A compiled `train_step` of which only what changes is handed on.

    Keras gives all weights to each step (donates them) and takes them back. Those mapped from a file cannot be given
    away, so XLA would copy them: a second model in memory.

    Args:
        train_step: As a Keras model's on JAX: `(state, data) -> (logs, state)`.
    """

    def step(trainable, frozen, optimizer, metrics, data):
        logs, (trainable, after, optimizer, metrics) = train_step((trainable, frozen, optimizer, metrics), data)
        return logs, (trainable, _changed(frozen, after), optimizer, metrics)

    compiled = Program(step, donate=(0, 2, 3))

    def run(state, data):
        logs, (trainable, changed, optimizer, metrics) = compiled(*state, data)
        return logs, (trainable, _with_changes(state[1], changed), optimizer, metrics)

    return run


def evaluation_program(test_step: _Step) -> _Step:
    """A compiled `test_step` of which only what changes is handed on: see `train_program`."""

    def step(trainable, frozen, metrics, data):
        logs, (_, after, metrics) = test_step((trainable, frozen, metrics), data)
        return logs, (_changed(frozen, after), metrics)

    compiled = Program(step, donate=(2,))

    def run(state, data):
        logs, (changed, metrics) = compiled(*state, data)
        return logs, (state[0], _with_changes(state[1], changed), metrics)

    return run


def _changed(before: list, after: list) -> list:
    """What a traced step made anew; None where it hands back what it was given."""
    return [None if new is old else new for old, new in zip(before, after, strict=True)]


def _with_changes(before: list, changed: list) -> list:
    return [old if new is None else new for old, new in zip(before, changed, strict=True)]
