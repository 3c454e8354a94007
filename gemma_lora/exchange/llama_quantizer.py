"""llama.cpp's own quantizer, through llama-cpp-python: k-quants and the other types that the `gguf` library lacks."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from gemma_lora.base.files import GemmaLoraError, atomic_path
from gemma_lora.base.lazy_tensorflow import quiet_stderr
from gemma_lora.exchange.destination import check_quantizer
from gemma_lora.exchange.gguf_model import tensor_name
from gemma_lora.exchange.merged import Part, Rounding


def quantize(source: Path, target: Path, kind: str) -> None:
    """Makes a GGUF file of fewer bits out of another one.

    Args:
        source: A GGUF file in floats.
        target: Where the new file goes, whole or not at all.
        kind: A type's name, such as "Q4_K_M". llama.cpp chooses other types for single tensors whose rows do not fit.

    Raises:
        GemmaLoraError: If llama-cpp-python is not installed, or refuses.
    """
    check_quantizer(kind)
    import llama_cpp
    from gguf import LlamaFileType

    with atomic_path(target) as temporary:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = int(LlamaFileType[f"MOSTLY_{kind}"])
        settings.nthread = os.cpu_count() or 1
        with quiet_stderr():  # a line for each tensor
            failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), ctypes.byref(settings))
        if failed:
            raise GemmaLoraError(f"llama.cpp cannot quantize the model to {kind}. Give another --type.")


def rounding_of(exact: list[Part], path: Path) -> Rounding:
    """What a written file's rounding costs.

    Args:
        exact: The model's parts.
        path: The file.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    rounding = Rounding()
    for part in exact:
        if part.adapted:
            tensor = stored[tensor_name(part)]
            rounding.add(part, part.read(), gguf.dequantize(tensor.data, tensor.tensor_type).reshape(part.shape))
    return rounding
