"""Files and errors, the machine, Keras on JAX: no model, no numbers."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "backend": ["require_jax"],
    "files": [
        "GemmaLoraError",
        "atomic_path",
        "require_writable",
        "write_text_atomic",
        "write_json_atomic",
        "write_jsonl_atomic",
        "sha256_of",
    ],
    "hardware": [
        "peak_memory_bytes",
        "process_peak_bytes",
        "memory_bytes",
        "machine",
        "has_fast_bfloat16",
        "Choice",
        "choose",
        "use_compilation_cache",
        "compiler_options",
        "Program",
        "keep_freed_memory",
        "release_memory",
    ],
    "settings": [
        "Settings",
        "Answering",
        "DEFAULTS",
        "check",
        "target_names",
        "layer_patterns",
        "TARGET_NAMES",
        "BUILTIN_NAME",
    ],
    "lazy_tensorflow": ["quiet_stderr", "stand_ins", "left_out"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
