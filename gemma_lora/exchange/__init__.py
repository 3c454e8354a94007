"""Other tools' formats: PEFT's adapter folders, Hugging Face's model folders."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "export": ["Export", "export"],
    "peft": ["Slot", "slots", "save_adapter", "load_adapter"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
