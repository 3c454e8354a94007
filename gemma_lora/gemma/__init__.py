"""Gemma in KerasHub: loading, GGUF files, the architecture, the one forward pass, the memory plan."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "architectures": ["Architecture", "Family", "FAMILIES", "architecture_of"],
    "attention": ["packed_rows"],
    "forward": ["hidden_states"],
    "gguf": ["read_index", "read_tensor"],
    "instruction": ["is_instruction_tuned"],
    "load": [
        "BUILTIN_NAME",
        "BUILTIN_FILE",
        "BUILTIN_SHA256",
        "BUILTIN_PACKAGES",
        "BUILTIN_NOTE",
        "import_keras_hub",
        "load_gemma",
        "require_source",
        "builtin_gguf",
    ],
    "memory": ["CONFIGURATIONS", "Configuration", "configuration_of", "plan"],
    "origin": ["Origin", "origin_of"],
    "weights": ["Weights", "collect"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
