"""What a run is: every setting that its result depends on, as its folder keeps it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data.packing import Batch
from gemma_lora.lora.apply import lora_layers
from gemma_lora.lora.qlora import packed_layers


def run_record(
    settings: dict[str, Any], model: keras.Model, optimizer: keras.optimizers.Optimizer, batches: list[Batch]
) -> dict[str, Any]:
    """Describes a training, so that another one can be told from it.

    Args:
        settings: What is known by name already.
        model: A KerasHub Gemma `CausalLM`.
        optimizer: The training's optimizer.
        batches: All batches, in order.

    Returns:
        `settings`, and the LoRA layers, the optimizer, hashes of the data and of some of the base model's weights.
    """
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer), default=str))
    config["config"].pop("name", None)  # Keras numbers its objects: another name each time
    packed = sorted({type(layer.encoding).__name__ for layer in packed_layers(model)})
    layers = lora_layers(model)
    lora = sorted({(layer.name, layer.rank, layer.alpha, layer.dropout_rate, layer.rslora) for layer in layers})
    dora = sorted({layer.name for layer in layers if layer.dora})
    return {
        **settings,
        "lora (layer, rank, alpha, dropout, rslora)": [list(row) for row in lora],
        "optimizer": config,
        "batches": len(batches),
        "data (SHA-256 of the batches)": _data_digest(batches),
        "base model (SHA-256 of some weights)": _base_digest(model),
        # Named only where they are, so that runs from before there were such settings go on.
        **({"dora (layer)": dora} if dora else {}),
        **({"base model's encodings": packed} if packed else {}),
    }


def _data_digest(batches: list[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for array in (batch.token_ids, batch.segment_ids, batch.weights):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _base_digest(model: keras.Model) -> str:
    backbone = model.backbone
    digest = hashlib.sha256(np.asarray(backbone.layer_norm.scale).tobytes())
    some_tokens = np.arange(min(64, backbone.token_embedding.input_dim))
    digest.update(np.asarray(backbone.token_embedding(some_tokens)).tobytes())
    return digest.hexdigest()
