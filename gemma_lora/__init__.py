"""Fine-tune Gemma with LoRA in Keras: the package behind the notebooks.

Names are imported when they are first used, so that `import gemma_lora` is quick and loads neither
KerasHub nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load_gemma": "gemma",
    "quantize_base": "qlora",
    "dequantize_base": "qlora",
    "apply_lora": "lora",
    "merge_lora": "lora",
    "unmerge_lora": "lora",
    "detach_lora": "lora",
    "LoRADense": "lora",
    "LoRAEinsumDense": "lora",
    "chunked_cross_entropy": "loss",
    "save_adapter": "peft",
    "load_adapter": "peft",
    "load_dataset": "data",
    "show_mask": "data",
    "Template": "templates",
    "generate": "generation",
    "FineTuner": "training",
    "exact_match": "evaluation",
    "evaluate": "evaluation",
    "perplexity": "evaluation",
    "teacher_forced": "evaluation",
    "apply_adapters": "adapters",
    "GemmaLoraError": "files",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gemma_lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gemma_lora.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
