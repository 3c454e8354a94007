"""`export`: a fine-tuned Gemma for other programs."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from gemma_lora.base.files import write_text_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import GGUF_TYPES, export_type
from gemma_lora.data.templates import Template, template_of
from gemma_lora.exchange.chat_templates import modelfile_of, strings_beside_tokens
from gemma_lora.exchange.destination import check_path, check_quantizer
from gemma_lora.exchange.model_card import NOTICE, base_name, card, run_of
from gemma_lora.gemma.load import BUILTIN_FILE, BUILTIN_NAME
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
    >>> [path.name for path in export(model, "expenses.gguf", "gguf", "Q8_0").files]    # doctest: +SKIP
    ['expenses.gguf', 'expenses.Modelfile']
    """
    path = Path(path)
    kind = export_type(format, type) or ("BF16" if backbone_dtype(model) == "bfloat16" else "F32")
    check_path(path, format)
    template = template_of(model, template)
    if format == "huggingface":
        return _huggingface(model, path, kind, template, run_of(Path(adapter) if adapter else None))
    return (_gguf if format == "gguf" else _gguf_lora)(model, path, kind, template)


def backbone_dtype(model: keras.Model) -> str:
    """What a model computes in."""
    return getattr(model, "backbone", model).token_embedding.compute_dtype


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


def _gguf(model: keras.Model, path: Path, kind: str, template: Template) -> Export:
    from gemma_lora.exchange import llama_quantizer
    from gemma_lora.exchange.gguf_model import write_model
    from gemma_lora.exchange.merged import parts

    if kind in GGUF_TYPES:
        rounding = write_model(model, path, kind, template, path.stem)
    else:
        check_quantizer(kind)
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
            write_model(model, Path(folder) / "float32.gguf", "F32", template, path.stem)
            llama_quantizer.quantize(Path(folder) / "float32.gguf", path, kind)
        rounding = llama_quantizer.rounding_of(list(parts(model)), path)
    notes = [sentence for sentence in (rounding.sentence(kind),) if sentence] + _about_stops(template)
    written = path.with_suffix(".Modelfile")
    write_text_atomic(written, modelfile_of(template, f"./{path.name}", notes=[NOTICE.strip()]))
    return Export(path, "gguf", kind, (path, written), rounding.share_of_update, tuple(notes))


def _gguf_lora(model: keras.Model, path: Path, kind: str, template: Template) -> Export:
    from gemma_lora.exchange.gguf_adapter import write_adapter

    write_adapter(model, path, kind, path.stem)
    source = getattr(model, "gemma_lora_source", None)
    base = BUILTIN_FILE if source == BUILTIN_NAME else Path(str(source)).name if source else "base.gguf"
    comments = [NOTICE.strip(), f"FROM must be the model that the adapter was trained on ({base_name(source)})."]
    written = path.with_suffix(".Modelfile")
    write_text_atomic(written, modelfile_of(template, f"./{base}", f"./{path.name}", comments))
    return Export(path, "gguf-lora", kind, (path, written), None, tuple(_about_stops(template)))


def _about_stops(template: Template) -> list[str]:
    strings = ", ".join(repr(text) for text in strings_beside_tokens(template))
    sentence = f"An answer also ends before {strings}: the Modelfile says so, other programs must be told."
    return [sentence] if strings else []
