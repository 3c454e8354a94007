"""The model of a command: looked for before slow work, then loaded with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError


def require_model(adapter: Path | None, chosen: dict[str, Any]) -> None:
    """Raises where model or adapter are not there: before JAX is imported, within a second."""
    from gemma_lora.gemma.load import require_source

    if adapter is not None and not adapter.is_dir():
        raise GemmaLoraError(f"{adapter}: no such folder. Give an adapter folder, such as runs/expenses/adapter.")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if adapter is not None and not (adapter / name).is_file():
            raise GemmaLoraError(f"{adapter}: holds no {name}. Give a folder that save_adapter or PEFT wrote.")
    require_source(chosen["model"], chosen["quantization"])


def load(adapter: Path | None, chosen: dict[str, Any]):
    """The model with its adapter. From here on JAX is in memory."""
    from gemma_lora.base.hardware import use_compilation_cache
    from gemma_lora.exchange.peft import load_adapter
    from gemma_lora.gemma.load import load_gemma

    use_compilation_cache()
    loaded = load_gemma(chosen["model"], quantization=chosen["quantization"], double_quant=chosen["double_quant"])
    return load_adapter(loaded, adapter) if adapter is not None else loaded
