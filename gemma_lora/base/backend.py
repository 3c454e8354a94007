"""Keras runs on JAX here: chosen before Keras is imported, or a clear error."""

from __future__ import annotations

import os
import sys

from gemma_lora.base import devices
from gemma_lora.base.files import GemmaLoraError

_REMEDY = (
    'Set it before anything imports Keras: put `import os; os.environ["KERAS_BACKEND"] = "jax"` in the '
    "first cell (or `export KERAS_BACKEND=jax` in the shell) and restart the kernel."
)


def require_jax() -> None:
    """Makes JAX Keras's backend, or raises before Keras or a model is loaded.

    Does nothing when Keras already runs on JAX. When Keras is not imported yet and the user
    has chosen no backend, JAX is chosen.

    Raises:
        GemmaLoraError: If another backend is chosen or already running, or JAX_PLATFORMS names a device that is not
            here.
    """
    if "keras" in sys.modules and hasattr(sys.modules["keras"], "config"):
        running = sys.modules["keras"].config.backend()
        if running != "jax":
            raise GemmaLoraError(f"Keras runs on the {running!r} backend; gemma_lora needs 'jax'. {_REMEDY}")
        return
    if os.environ.get("JAX_PLATFORMS") not in (None, "", "cpu"):  # else Keras's own import ends in a traceback
        devices.platform()
    chosen = os.environ.setdefault("KERAS_BACKEND", "jax")
    if chosen != "jax":
        raise GemmaLoraError(f"KERAS_BACKEND is {chosen!r}; gemma_lora needs 'jax'. {_REMEDY}")
