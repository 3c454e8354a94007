"""Where an export goes: checked before a model is loaded. Importing this imports no JAX."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gemma_lora.base.files import GemmaLoraError, require_writable
from gemma_lora.base.settings import EXPORT_FORMATS, GGUF_TYPES


def check_path(path: Path, format: str, option: str = "path") -> None:
    """Raises where an export cannot go; to be called before slow work.

    Args:
        path: The folder or file.
        format: Of the export.
        option: What messages call it.
    """
    if format == "huggingface":
        if path.exists() and not path.is_dir():
            raise GemmaLoraError(f"{path}: is a file. Give a folder as {option}.")
        if path.is_dir() and (path / "adapter_config.json").exists():
            raise GemmaLoraError(f"{path}: holds an adapter; transformers would load that. Give another {option}.")
        require_writable(path / "config.json", option)
        return
    if path.suffix.lower() != ".gguf":
        raise GemmaLoraError(f"{path}: a GGUF file ends in .gguf. Give another {option}.")
    require_writable(path, option)


def is_installed(name: str) -> bool:
    """Whether a module is there; it is not imported."""
    return importlib.util.find_spec(name) is not None


def check_quantizer(kind: str | None) -> None:
    """Raises where a type is llama.cpp's to make and llama-cpp-python is not installed.

    Args:
        kind: A type, or None.
    """
    if kind in (None, *GGUF_TYPES) or kind not in EXPORT_FORMATS["gguf"]:
        return
    if not is_installed("llama_cpp"):
        raise GemmaLoraError(
            f"--type {kind} is made by llama.cpp's quantizer, which is not installed. Install it (it is compiled, some "
            'minutes): pip install "gemma_lora[serve]". Or give --type Q8_0, F16, BF16 or F32.'
        )
