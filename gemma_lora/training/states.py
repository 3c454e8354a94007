"""What callbacks remember while a training runs, as data that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_lora.base.keras_on_jax import keras

#: Not a callback's own, or changed by Keras in a way that it repeats itself (the sign of `min_delta`).
_NEVER = {"model", "_model", "params", "min_delta"}


class _Unknown(Exception):
    """A value that is neither a number, text, array, nor a list or dictionary of such."""


class CallbackStates:
    """Which attributes of callbacks a training changes: `EarlyStopping`'s best loss, `History`'s losses, and so on.

    Settings that a caller gave (`patience`) are not changed by a training, and so are not kept: a run that goes on
    follows the callbacks it is given.

    Args:
        callbacks: The callbacks, in order.
        model: The model that trains; of its weights only those that are trainable are kept.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback], model: keras.Model):
        self._callbacks, self._model = list(callbacks), model
        self._start: list[dict[str, Any]] = [{} for _ in self._callbacks]

    def remember_start(self) -> None:
        """To be called once `on_train_begin` has set the callbacks to their start."""
        self._start = [self._values(callback, {}, "") for callback in self._callbacks]

    def take(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """What has changed since the start.

        Returns:
            `(states, arrays)`: for each callback its class and values that JSON can hold, and the arrays that they
            name.
        """
        arrays: dict[str, np.ndarray] = {}
        states = []
        for number, (callback, start) in enumerate(zip(self._callbacks, self._start, strict=True)):
            plain = self._values(callback, {}, "")
            changed = [name for name, value in plain.items() if name not in start or value != start[name]]
            kept = self._values(callback, arrays, f"callback.{number:04d}", changed)
            states.append({"class": type(callback).__name__, "values": kept})
        return states, arrays

    def give_back(self, states: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
        """Sets the callbacks to what `take` gave; the n-th of a class gets the state of the n-th of that class."""
        left = list(states)
        for callback in self._callbacks:
            mine = next((state for state in left if state.get("class") == type(callback).__name__), None)
            if mine is None:
                continue
            left.remove(mine)
            for name, value in mine["values"].items():
                setattr(callback, name, self._decoded(value, arrays))

    def _values(self, callback, arrays: dict[str, np.ndarray], prefix: str, names=None) -> dict[str, Any]:
        """A callback's attributes as data; those that are none are left out. With no prefix, arrays become a digest."""
        found = {}
        for name, value in vars(callback).items():
            if name in _NEVER or (names is not None and name not in names):
                continue
            try:
                found[name] = self._encoded(value, arrays, f"{prefix}.{name}" if prefix else "")
            except _Unknown:
                continue
        return found

    def _encoded(self, value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, keras.Variable):
            if not name:  # a large array is taken to be replaced, not written into
                return {"array": np.asarray(value).tobytes() if value.size < 10_000 else id(value)}
            arrays[name] = np.asarray(value)
            return {"array": name}
        if isinstance(value, list | tuple):
            if name and self._are_weights(value):
                kept = [index for index, weight in enumerate(self._model.weights) if weight.trainable]
                return {"weights": {str(i): self._encoded(value[i], arrays, f"{name}.{i:05d}") for i in kept}}
            return {"list": [self._encoded(part, arrays, name and f"{name}.{i:05d}") for i, part in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self._encoded(part, arrays, name and f"{name}.{key}") for key, part in value.items()}}
        raise _Unknown

    def _are_weights(self, values: Sequence[Any]) -> bool:
        weights = self._model.weights
        return len(values) == len(weights) > 0 and all(
            getattr(value, "shape", None) == tuple(weight.shape) for value, weight in zip(values, weights, strict=True)
        )

    def _decoded(self, value: Any, arrays: dict[str, np.ndarray]) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, held),) = value.items()
        if kind == "array":
            return arrays[held]
        if kind == "list":
            return [self._decoded(part, arrays) for part in held]
        if kind == "dict":
            return {key: self._decoded(part, arrays) for key, part in held.items()}
        weights = self._model.get_weights()  # those that no training changes are as they were
        for index, part in held.items():
            weights[int(index)] = self._decoded(part, arrays)
        return weights
