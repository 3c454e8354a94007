"""What only the lessons use: Gemma written from scratch, a byte model, the traps of lesson 12, the first cell."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "byte_model": [],
    "setup": [],
    "transformer": [],
    "traps": [],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
