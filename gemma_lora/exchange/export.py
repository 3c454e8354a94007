"""`export`: a fine-tuned Gemma for other programs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError, require_writable, write_text_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import EXPORT_FORMATS, export_type
from gemma_lora.data.templates import Template, template_of
from gemma_lora.exchange.model_card import NOTICE, card, run_of
from gemma_lora.lora.apply import lora_layers


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Invariants: `path` is the folder or file that was asked for; `files` are all files that were written; `notes` are
    sentences that a user should read, such as what rounding costs. `rounding` is |written − exact| / |update| over the
    matrices that the adapter changes, None where there is no adapter or it cannot be told.
    """

    path: Path
    format: str
    type: str
    files: tuple[Path, ...]
    rounding: float | None
    notes: tuple[str, ...]


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str = "huggingface",
    type: str | None = None,
    template: Template | None = None,
    adapter: str | os.PathLike | None = None,
) -> Export:
    """Writes a model in the format of other programs. The model itself stays as it is.

    Args:
        model: What `load_gemma` gave, with LoRA or DoRA or without. Packed layers are decoded and merged.
        path: A folder for "huggingface", else a file that ends in `.gguf`.
        format: "huggingface": the merged model as transformers loads it. "gguf": the merged model for llama.cpp and
            Ollama. "gguf-lora": the adapter alone, for llama.cpp.
        type: What weights are stored in. "huggingface": "F32" or "BF16"; by default what the model holds. "gguf":
            "F16" (the default), "F32", "BF16", "Q8_0", or what llama.cpp's quantizer makes, such as "Q4_K_M".
            "gguf-lora": "F32" (the default) or "F16".
        template: The text around a prompt; by default the one that the model was fine-tuned or loaded with.
        adapter: The adapter's folder, whose run the model card tells of.

    Returns:
        An `Export`.

    Raises:
        ValueError: If `format` or `type` is not as above.
        GemmaLoraError: If the model holds what the format cannot, or `path` cannot be written.

    Example:

    >>> model = load_adapter(load_gemma(), "runs/expenses/adapter")        # doctest: +SKIP
    >>> export(model, "expenses.gguf", "gguf", "Q8_0").rounding            # doctest: +SKIP
    0.0387
    """
    path = Path(path)
    kind = export_type(format, type) or ("BF16" if backbone_dtype(model) == "bfloat16" else "F32")
    check_path(path, format)
    template = template_of(model, template)
    if format == "huggingface":
        return _huggingface(model, path, kind, template, run_of(Path(adapter) if adapter else None))
    raise ValueError(f"`format` must be one of {', '.join(EXPORT_FORMATS)}. Received: format={format!r}")


def backbone_dtype(model: keras.Model) -> str:
    """What a model computes in."""
    return getattr(model, "backbone", model).token_embedding.compute_dtype


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


def _huggingface(model: keras.Model, folder: Path, kind: str, template: Template, run: dict[str, Any]) -> Export:
    from gemma_lora.exchange.huggingface import write_folder

    rounding = write_folder(model, folder, kind, template)
    notes = [sentence for sentence in (rounding.sentence(kind),) if sentence]
    source = getattr(model, "gemma_lora_source", None)
    adapted = bool(lora_layers(model))
    write_text_atomic(folder / "README.md", card(folder.resolve().name, source, kind, template, run, notes, adapted))
    write_text_atomic(folder / "NOTICE", NOTICE)
    names = ["model.safetensors", "tokenizer.model", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"]
    names += ["generation_config.json", "config.json", "README.md", "NOTICE"]
    files = tuple(folder / name for name in names)
    return Export(folder, "huggingface", kind, files, rounding.share_of_update, tuple(notes))
