"""`gemma-lora export`: a model or an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.settings import EXPORT_FORMATS, export_type
from gemma_lora.commands.models import load, require_model
from gemma_lora.commands.options import ADAPTER, MODEL, takes
from gemma_lora.data.templates import find_template

EXAMPLES = (
    "Example: `gemma-lora export --adapter runs/expenses/adapter --format huggingface --output expenses-hf`  \n"
    "llama.cpp, Ollama: `gemma-lora export --adapter runs/expenses/adapter --format gguf --type Q8_0 "
    "--output expenses.gguf`  \n"
    "The adapter alone: `gemma-lora export --adapter runs/expenses/adapter --format gguf-lora --output adapter.gguf`"
)


@takes(*MODEL)
def export(
    output: Annotated[Path, typer.Option(help="A folder for huggingface; else a file that ends in .gguf.")],
    adapter: Annotated[Path | None, ADAPTER] = None,
    format: Annotated[str, typer.Option(help=f"{', '.join(EXPORT_FORMATS)} (the adapter alone).")] = "huggingface",
    type: Annotated[
        str | None,
        typer.Option(
            help="What weights are stored in: F32, F16, BF16, Q8_0, or of llama.cpp's quantizer Q4_K_M and others. "
            "By default F16 for gguf, and for huggingface what the model holds."
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="The text around a prompt, if not the adapter's: a template.json, base or chat.")
    ] = None,
    **chosen: Any,
) -> None:
    """Write a tuned model for transformers, llama.cpp, Ollama and vLLM.

    The adapter is merged into the weights, except with gguf-lora. Packed weights are decoded first; what rounding them
    again costs is said. docs/take_it_with_you.md has every way, and what is equal.
    """
    from gemma_lora.exchange.destination import check_path, check_quantizer

    try:
        kind = export_type(format, type)
    except ValueError as error:
        raise GemmaLoraError(str(error).replace("`format`", "--format").replace("`type`", "--type")) from None
    check_path(output, format, "--output")
    check_quantizer(kind)
    if format == "gguf-lora" and adapter is None:
        raise GemmaLoraError("--format gguf-lora writes an adapter alone. Give --adapter.")
    found = find_template(template)
    require_model(adapter, chosen)
    loaded = load(adapter, chosen)
    from gemma_lora.exchange.export import export as write

    done = write(loaded, output, format, type, found, adapter)
    for sentence in done.notes:
        typer.echo(sentence, err=True)
    for path in done.files:
        typer.echo(path)
