"""What the scripts that compare trainings share: a training that tells how far it is, and an adapter's size on disk."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fit(tuner, dataset, limit: int, every: int = 10, callbacks: Sequence = (), epochs: int = 1) -> str | None:
    """Trains on the first `limit` lines and tells of every so many steps on the error stream.

    Returns:
        None; or, where the loss stopped being a number since the rate is too high, the error's message.
    """
    import keras

    import gemma_lora as gl

    def tell(step, logs):
        if step % every == every - 1:
            print(f"  step {step + 1}: loss {tuner.log.rows[-1]['loss']:.3f}", file=sys.stderr, flush=True)

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=tell)
    try:
        tuner.fit(dataset, epochs=epochs, limit=limit, verbose=0, validation_data=False, callbacks=[watch, *callbacks])
    except gl.GemmaLoraError as error:
        return str(error)
    return None


def trained_parameters(model) -> int:
    return sum(int(variable.value.size) for variable in model.trainable_variables)


def adapter_bytes(model: Any) -> int | None:
    """Size of the file of a model's LoRA or Houlsby adapters; None if it has neither."""
    import gemma_lora as gl
    from gemma_lora import lora
    from gemma_lora.lora import houlsby as adapters

    with tempfile.TemporaryDirectory() as folder:
        if lora.lora_layers(model):
            gl.save_adapter(model, folder)
        elif adapters.adapter_layers(model):
            adapters.save(model, Path(folder) / "adapters.safetensors")
        else:
            return None
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
