"""Keras, imported once its backend is JAX: `from gemma_lora.base.keras_on_jax import keras, ops`.

Every module of the package takes Keras from here, so that the first one that is imported cannot bring in TensorFlow.
"""

from __future__ import annotations

from gemma_lora.base.backend import require_jax

require_jax()

import keras as keras  # noqa: E402
from keras import ops as ops  # noqa: E402

__all__ = ["keras", "ops"]
