"""Building a Keras model without numbers in it, for weights that are about to be read from a file.

KerasHub's constructors fill every weight with random numbers: a second model in memory, and some seconds. Keras itself
puts that off for variables that are made inside a stateless scope. This file alone knows where it keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gemma_lora.base.keras_on_jax import keras


@contextlib.contextmanager
def unfilled_variables() -> Iterator[None]:
    """Within, variables get a shape and a dtype and no value. Every one of them must be assigned to afterwards."""
    from keras.src.backend.common import global_state

    name = "uninitialized_variables"
    before = global_state.get_global_attribute(name, [])
    global_state.set_global_attribute(name, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Keras would fill them at the end of the next scope.
        global_state.set_global_attribute(name, before)
