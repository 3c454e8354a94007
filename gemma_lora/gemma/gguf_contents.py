"""What a GGUF file must hold to be read as a Gemma 3: anything else is refused by name, with what to do.

KerasHub's Gemma 3 fixes the wavelengths of rotation, the blocks with a window and the tied output matrix. A file that
says otherwise would load, and compute something else than llama.cpp does.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError

#: Kinds of files that are no model -> what they are, and what to load.
_NO_MODELS = {
    "adapter": (
        "a LoRA adapter, not a model",
        "Load the base model, and the adapter from its PEFT folder (load_adapter, --adapter).",
    ),
    "imatrix": ("an importance matrix of llama-imatrix, not a model", "Give the model's own file."),
    "mmproj": ("the picture encoder of a model", "Give the text model's own file."),
}
_TENSORS = re.compile(
    r"(token_embd|output|output_norm"
    r"|blk\.\d+\.(attn_(norm|q|k|v|output|q_norm|k_norm)|post_attention_norm|ffn_(norm|gate|up|down)|post_ffw_norm))"
    r"\.weight"
)
_PERIOD = 6  # of blocks, of which the last one has no window


def check_kind(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raises if a file is no whole Gemma 3 model.

    Args:
        path: The file.
        fields: Its metadata, arrays excepted.
        tensors: Its tensors by name.
    """
    if fields.get("split.count", 1) > 1:
        raise GemmaLoraError(
            f"{path}: is one part of a split model, number {fields.get('split.no', 0) + 1} of {fields['split.count']}. "
            "Merge the parts with llama-gguf-split --merge, giving it the first one."
        )
    kind, architecture = fields.get("general.type"), fields.get("general.architecture")
    if any(name.endswith(".lora_a") for name in tensors):
        kind = "adapter"  # files from before there was a type
    kind = "mmproj" if architecture == "clip" else kind
    if kind in _NO_MODELS:
        what, remedy = _NO_MODELS[kind]
        raise GemmaLoraError(f"{path}: is {what}. {remedy}")
    if architecture != "gemma3":
        raise GemmaLoraError(
            f"{path}: holds a model of architecture {architecture!r}; only 'gemma3' is read from GGUF. "
            "Load other Gemmas from a KerasHub preset or hf://."
        )


def check_tensors(path: Path, kinds: Mapping[str, str]) -> None:
    """Raises if there is a tensor that would not be used, or that cannot be decoded.

    Args:
        path: The file.
        kinds: ggml's name of each tensor's type.
    """
    for name in kinds:
        if not _TENSORS.fullmatch(name):
            raise GemmaLoraError(
                f"{path}: holds tensor {name}, which a Gemma 3 does not have; it would not be used. Convert the "
                "original model."
            )
    for kind in dict.fromkeys(kinds.values()):
        if not _can_decode(kind):
            name = next(name for name, of in kinds.items() if of == kind)
            raise GemmaLoraError(f"{path}: tensor {name} is of type {kind}, which {_upgrade()}")


def _can_decode(kind: str) -> bool:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except (NotImplementedError, ValueError):
        return False
    return True


def _upgrade() -> str:
    return (
        f"the gguf library {importlib.metadata.version('gguf')} cannot decode. Upgrade it (pip install -U gguf), or "
        "convert the file to another type: llama-quantize --allow-requantize FILE.gguf NEW.gguf Q8_0."
    )


def unknown_type(error: Exception) -> str | None:
    """What to say if the `gguf` library failed at a type of tensor that it does not know; else None."""
    found = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
    return f"holds a tensor of ggml's type {found[1]}, which {_upgrade()}" if found else None


def check_constants(path: Path, fields: Mapping[str, Any], window_pattern: Sequence[bool] | None) -> None:
    """Raises if the header asks for something that KerasHub's Gemma 3 does not compute.

    Args:
        path: The file.
        fields: Its metadata, arrays excepted.
        window_pattern: For each block whether it has a window, where the file says so in an array.
    """

    def refuse(name: str, expected: str) -> None:
        value = fields.get(f"gemma3.{name}", "absent")
        raise GemmaLoraError(
            f"{path}: gemma3.{name} is {value}; KerasHub's Gemma 3 computes {expected}. Run the file with llama.cpp, "
            "or load a Gemma 3 as Google made it."
        )

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"gemma3.{name}", default)

    if field("rope.freq_base", 1e4) != 1e6:  # llama.cpp's default is 10,000
        refuse("rope.freq_base", "1000000")
    if field("rope.freq_base_swa", 1e4) != 1e4:
        refuse("rope.freq_base_swa", "10000")
    if field("rope.scaling.type", "linear") not in ("linear", "none"):
        refuse("rope.scaling.type", "linear scaling or none")
    size = field("attention.key_length", 256)
    for name in ("attention.value_length", "rope.dimension_count"):
        if field(name, size) != size:
            refuse(name, f"{size}, the heads' size")
    if field("attention.sliding_window_pattern", _PERIOD) != _PERIOD:
        refuse("attention.sliding_window_pattern", "a window in five of six blocks")
    blocks = field("block_count", 0)
    if window_pattern is not None and list(window_pattern) != [(n + 1) % _PERIOD != 0 for n in range(blocks)]:
        raise GemmaLoraError(
            f"{path}: gemma3.attention.sliding_window_pattern names other blocks than KerasHub's Gemma 3, which has a "
            "window in five of six. Run the file with llama.cpp."
        )


def global_rope_scaling(fields: Mapping[str, Any]) -> float:
    """What positions are divided by in blocks without a window, under either of the names that files have for it."""
    if fields.get("gemma3.rope.scaling.type") == "none":
        return 1.0
    factor = fields.get("gemma3.rope.scaling.factor", fields.get("gemma3.rope.scale_linear", 0.0))
    return float(factor) or 1.0  # llama.cpp takes 0 for none


def refuse_untied(path: Path) -> None:
    """Raises: the output matrix differs from the embedding."""
    raise GemmaLoraError(
        f"{path}: output.weight is another matrix than token_embd.weight. A Gemma's output is its embedding, and "
        "gemma_lora computes no other one: logits would be wrong. Convert the original model, whose lm_head is tied, "
        "or run the file with llama.cpp."
    )
