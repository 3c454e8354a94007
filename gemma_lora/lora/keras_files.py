"""What Keras's and KerasHub's own files get of LoRA and packed layers: `.keras`, `.weights.h5`, presets, exports.

A KerasHub Gemma says nothing of such layers in its configuration, so a file is read into a plain Gemma, whose layers
want a kernel, and a bias if there is one, and nothing else. So that is what our layers write in their own place: the
kernel with the update in it, or decoded. What they hold besides is written beside it, where a plain layer does not look
and a layer of the same kind finds it: a model with LoRA takes back from `.weights.h5` what it wrote.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras


class Beside(keras.Operation):
    """A layer's own variables in Keras's files, in a place of their own.

    Keras finds it as the layer's attribute. It refers to the layer weakly: it is part of it.

    Args:
        layer: The layer.
        variables: From the layer to `{name: variable}`.
    """

    def __init__(self, layer: keras.layers.Layer, variables: Callable[[Any], dict[str, keras.Variable]]):
        super().__init__(name=f"{layer.name}_beside")
        self._of = weakref.ref(layer)
        self._named = variables

    def _variables(self) -> dict[str, keras.Variable]:
        layer = self._of()
        return {} if layer is None else self._named(layer)

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables under their names."""
        for name, variable in self._variables().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Reads them again; the file must be of a layer of the same kind."""
        variables = self._variables()
        if set(store.keys()) != set(variables):
            raise ValueError(
                f"The file holds {', '.join(sorted(store.keys())) or 'nothing'} for {self.name}, the layer needs "
                f"{', '.join(sorted(variables))}. It was written by a model without this layer's LoRA or encoding."
            )
        for name, variable in variables.items():
            variable.assign(store[name])


class ByPosition(list):
    """A layer's weights of which the first is not the kernel: Keras goes through them, exporters take one by its place.

    Args:
        weights: The weights.
        reason: Why there is no kernel among them, and the remedy.
    """

    def __init__(self, weights: Sequence[keras.Variable], reason: str):
        super().__init__(weights)
        self.reason = reason

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int):
            raise GemmaLoraError(self.reason)
        return super().__getitem__(place)
