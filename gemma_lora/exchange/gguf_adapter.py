"""A LoRA adapter alone as a GGUF file, for llama.cpp to put beside a model of its own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.exchange.gguf_model import ARCHITECTURES, query_factor
from gemma_lora.exchange.merged import generation_of
from gemma_lora.exchange.peft import slots
from gemma_lora.gemma.architectures import architecture_of
from gemma_lora.gemma.weights import backbone_of
from gemma_lora.layers.places import PLACES
from gemma_lora.lora.layer import LoRALayer


def write_adapter(model: keras.Model, path: Path, kind: str, name: str) -> None:
    """Writes a model's LoRA factors as a GGUF adapter, whole or not at all.

    llama.cpp computes `alpha / rank * B A` with one alpha for the file and each factor's own rank. Any other scaling
    (rsLoRA's alpha / sqrt(rank), an alpha per layer) is folded: the file's alpha is the first layer's, and another
    layer's B is multiplied by what is left.

    Args:
        model: A KerasHub Gemma with LoRA, merged or not.
        path: Where the file goes.
        kind: "F32" or "F16".
        name: What the file says the adapter is called.

    Raises:
        GemmaLoraError: If there is no LoRA, or it is DoRA.
    """
    import gguf

    adapted = [slot for slot in slots(model) if isinstance(slot.layer, LoRALayer)]
    if not adapted:
        raise GemmaLoraError("The model has no LoRA layers to export. Give --adapter, or call load_adapter first.")
    if any(slot.layer.dora for slot in adapted):
        raise GemmaLoraError(
            "The adapter is DoRA, which also scales each output by magnitude / norm. llama.cpp's adapters hold two "
            "factors and no scale. Export the merged model: --format gguf."
        )
    generation, first = generation_of(model), adapted[0].layer
    alpha = first.scaling * first.rank
    factor = 1.0 if generation == 3 else query_factor(architecture_of(backbone_of(model)), generation)
    dtype = np.float32 if kind == "F32" else np.float16
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[generation])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)
        writer.add_license("gemma")
        if source := getattr(model, "gemma_lora_source", None):
            writer.add_string("general.base_model.0.name", Path(str(source)).name)
        for slot in adapted:
            layer, block = slot.layer, slot.module.split(".")[2]
            tensor = f"blk.{block}.{PLACES[slot.target].gguf}.weight"
            rest = layer.scaling / (alpha / layer.rank) * (factor if slot.target == "query" else 1.0)
            lora_b = np.asarray(layer.lora_b, np.float32).T  # (d_out, rank)
            lora_b = lora_b if math.isclose(rest, 1.0, rel_tol=1e-7) else lora_b * np.float32(rest)
            for letter, array in {"a": np.asarray(layer.lora_a, np.float32).T, "b": lora_b}.items():
                writer.add_tensor(f"{tensor}.lora_{letter}", np.ascontiguousarray(array, dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
