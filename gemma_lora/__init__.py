"""Fine-tune Gemma with LoRA in Keras: the package behind the notebooks.

Names are imported when they are first used, so that `import gemma_lora` is quick and loads neither
KerasHub nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gemma_lora import moved
from gemma_lora.base.lazy import lazy_names

if TYPE_CHECKING:
    from gemma_lora.base.files import GemmaLoraError as GemmaLoraError
    from gemma_lora.data.dataset import load_dataset as load_dataset
    from gemma_lora.data.mask import show_mask as show_mask
    from gemma_lora.data.templates import Template as Template
    from gemma_lora.exchange.export import export as export
    from gemma_lora.exchange.peft import load_adapter as load_adapter
    from gemma_lora.exchange.peft import save_adapter as save_adapter
    from gemma_lora.gemma.load import load_gemma as load_gemma
    from gemma_lora.generation.base_text import base_text as base_text
    from gemma_lora.generation.callbacks import ScoreAfterEpoch as ScoreAfterEpoch
    from gemma_lora.generation.chat import Chat as Chat
    from gemma_lora.generation.classify import classify as classify
    from gemma_lora.generation.engine import generate as generate
    from gemma_lora.generation.evaluation import evaluate as evaluate
    from gemma_lora.generation.likelihood import perplexity as perplexity
    from gemma_lora.generation.likelihood import teacher_forced as teacher_forced
    from gemma_lora.generation.matching import exact_match as exact_match
    from gemma_lora.generation.metrics import score as score
    from gemma_lora.layers.loss import chunked_cross_entropy as chunked_cross_entropy
    from gemma_lora.lora.apply import apply_lora as apply_lora
    from gemma_lora.lora.apply import detach_lora as detach_lora
    from gemma_lora.lora.apply import merge_lora as merge_lora
    from gemma_lora.lora.apply import unmerge_lora as unmerge_lora
    from gemma_lora.lora.houlsby import apply_adapters as apply_adapters
    from gemma_lora.lora.layer import LoRADense as LoRADense
    from gemma_lora.lora.layer import LoRAEinsumDense as LoRAEinsumDense
    from gemma_lora.lora.named import adapter_names as adapter_names
    from gemma_lora.lora.named import adapters_in_use as adapters_in_use
    from gemma_lora.lora.named import remove_adapter as remove_adapter
    from gemma_lora.lora.named import use_adapter as use_adapter
    from gemma_lora.lora.qlora import dequantize_base as dequantize_base
    from gemma_lora.lora.qlora import quantize_base as quantize_base
    from gemma_lora.training.tuner import FineTuner as FineTuner

__version__ = "0.1.0"

_MODULES = {
    "base.files": ["GemmaLoraError"],
    "data.dataset": ["load_dataset"],
    "data.mask": ["show_mask"],
    "data.templates": ["Template"],
    "exchange.export": ["export"],
    "exchange.peft": ["load_adapter", "save_adapter"],
    "gemma.load": ["load_gemma"],
    "generation.base_text": ["base_text"],
    "generation.callbacks": ["ScoreAfterEpoch"],
    "generation.classify": ["classify"],
    "generation.chat": ["Chat"],
    "generation.engine": ["generate"],
    "generation.evaluation": ["evaluate"],
    "generation.likelihood": ["perplexity", "teacher_forced"],
    "generation.matching": ["exact_match"],
    "generation.metrics": ["score"],
    "layers.loss": ["chunked_cross_entropy"],
    "lora.houlsby": ["apply_adapters"],
    "lora.apply": ["apply_lora", "detach_lora", "merge_lora", "unmerge_lora"],
    "lora.layer": ["LoRADense", "LoRAEinsumDense"],
    "lora.named": ["adapter_names", "adapters_in_use", "remove_adapter", "use_adapter"],
    "lora.qlora": ["dequantize_base", "quantize_base"],
    "training.tuner": ["FineTuner"],
}
_get, _names, _public = lazy_names(__name__, _MODULES)
__all__ = ["__version__", *_public]

moved.install()


def __getattr__(name: str) -> Any:
    if name in moved.MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    value = globals()[name] = _get(name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
