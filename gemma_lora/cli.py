"""The command line: `gemma-lora finetune`, `evaluate`, `generate` and `plan`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from gemma_lora.base.files import GemmaLoraError, require_writable, write_json_atomic, write_jsonl_atomic
from gemma_lora.base.hardware import keep_freed_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fine-tune Gemma with LoRA in Keras, on a laptop or an accelerator.",
)

_ADAPTER = typer.Option(help="Adapter folder (PEFT): adapter_config.json and adapter_model.safetensors.")
_MODEL = typer.Option(help="gemma3-270m, a .gguf file, a KerasHub preset name, hf://owner/name, or a preset folder.")
_Quantization = Literal["nf4", "int8", "int4", "gguf"]
_QUANTIZATION = typer.Option(help="QLoRA: what the frozen weights are kept in; gguf keeps a GGUF file's own blocks.")
_DOUBLE_QUANT = typer.Option("--double-quant", help="With nf4: its scales in 8 bits too.")


@app.command(
    epilog="Example: `gemma-lora finetune --data my.jsonl --run-dir runs/mine`  \n"
    "QLoRA: `gemma-lora finetune --data my.jsonl --run-dir runs/small --quantization nf4 --double-quant --remat`"
)
def finetune(
    data: Annotated[
        str, typer.Option(help="A dataset folder, or a JSONL file (prompt/response, Alpaca, ShareGPT, chat).")
    ] = "data/expenses",
    run_dir: Annotated[str, typer.Option(help="Where adapter, settings, metrics and report go.")] = "runs/expenses",
    model: Annotated[str, _MODEL] = "gemma3-270m",
    quantization: Annotated[_Quantization | None, _QUANTIZATION] = None,
    double_quant: Annotated[bool, _DOUBLE_QUANT] = False,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the update.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Scaling is alpha/rank; 2 * rank by default.")] = None,
    targets: Annotated[
        str, typer.Option(help="Comma-separated: query, key, value, attention_output, gate, up, down; or all-linear.")
    ] = "all-linear",
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Dropout on the update's input.")] = 0.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha/sqrt(rank).")] = False,
    dora: Annotated[
        bool, typer.Option("--dora", help="DoRA: train the length of a kernel's columns apart from their direction.")
    ] = False,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak rate of Adam.")] = 5e-4,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training lines.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on the first so many lines only.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Packed rows a batch.")] = 1,
    row_length: Annotated[int, typer.Option(min=32, help="Tokens a packed row; the longest line must fit.")] = 384,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches whose gradients make one step.")] = 1,
    remat: Annotated[bool, typer.Option("--remat", help="Compute activations twice: less memory, more time.")] = False,
    mixed_precision: Annotated[
        bool | None,
        typer.Option(
            help="Form large products in bfloat16, with sums in float32, while training and in the report. "
            "By default where the machine is faster at it."
        ),
    ] = None,
    filter_gradient: Annotated[
        bool, typer.Option(help="Leave tokens that have next to no probability out of the loss's gradient.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Start of A and order of the lines.")] = 0,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Count bad lines instead of stopping.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that holds a run.")] = False,
) -> None:
    """Fine-tune with LoRA and report what changed, before and after.

    A run that was stopped, in whatever way, goes on when the same command is run again.
    """
    from gemma_lora.job import finetuning as job

    names = targets if targets == "all-linear" else tuple(t.strip() for t in targets.split(","))
    from gemma_lora.lora.apply import target_names

    target_names(names)
    _check_quantization(quantization, double_quant)
    job.finetune(
        job.Settings(
            data=data,
            run_dir=run_dir,
            model=model,
            quantization=quantization,
            double_quant=double_quant,
            rank=rank,
            alpha=alpha,
            targets=names,
            dropout=dropout,
            rslora=rslora,
            dora=dora,
            learning_rate=learning_rate,
            epochs=epochs,
            limit=limit,
            rows=rows,
            row_length=row_length,
            accumulate=accumulate,
            remat=remat,
            mixed_precision=mixed_precision,
            filter_gradient=filter_gradient,
            seed=seed,
            skip_bad_lines=skip_bad_lines,
        ),
        Console(),
        overwrite=overwrite,
    )


@app.command(
    epilog='Example: `gemma-lora generate --adapter runs/expenses/adapter "12 lug 2024 Café Lumière 769,08 €"`'
)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    adapter: Annotated[Path | None, _ADAPTER] = None,
    model: Annotated[str, _MODEL] = "gemma3-270m",
    quantization: Annotated[_Quantization | None, _QUANTIZATION] = None,
    double_quant: Annotated[bool, _DOUBLE_QUANT] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 128,
) -> None:
    """Answer prompts, greedily."""
    from gemma_lora.generation.engine import generate as answer

    for text in answer(_load(model, adapter, quantization, double_quant), prompts, max_new_tokens=max_new_tokens):
        typer.echo(text)


@app.command(
    epilog="Example: `gemma-lora evaluate --adapter runs/expenses/adapter --data data/expenses/test.jsonl "
    "--output scores.json --answers answers.jsonl`"
)
def evaluate(
    data: Annotated[Path, typer.Option(help="A JSONL file whose responses are the right answers.")],
    adapter: Annotated[Path | None, _ADAPTER] = None,
    model: Annotated[str, _MODEL] = "gemma3-270m",
    quantization: Annotated[_Quantization | None, _QUANTIZATION] = None,
    double_quant: Annotated[bool, _DOUBLE_QUANT] = False,
    output: Annotated[Path | None, typer.Option(help="Where the scores go, as JSON.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Where every line goes with its answer and whether that is right, as JSONL."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 128,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Count bad lines instead of stopping.")
    ] = False,
    mixed_precision: Annotated[
        bool | None,
        typer.Option(help="Form large products in bfloat16, with sums in float32. By default where finetune does."),
    ] = None,
) -> None:
    """Score an adapter (or the base model) on any file."""
    from gemma_lora.base.hardware import has_fast_bfloat16
    from gemma_lora.data.formats import BadLines, read_jsonl
    from gemma_lora.generation.evaluation import evaluate as score
    from gemma_lora.generation.evaluation import is_match
    from gemma_lora.job.finetuning import progress_bar

    for path, option, taken in ((output, "--output", (data,)), (answers, "--answers", (data, output))):
        if path is None:
            continue
        if path.resolve() in [other.resolve() for other in taken if other is not None]:
            raise GemmaLoraError(f"{path}: is given twice, and would be overwritten. Give another {option}.")
        require_writable(path, option)
    bad = BadLines(skip_bad_lines)
    examples = read_jsonl(data, bad=bad)
    bad.finish()
    for file, count in bad.files.items():
        typer.echo(f"Bad lines skipped: {count} in {file}.", err=True)
    if not examples:
        raise GemmaLoraError(f"{data}: holds no usable example. Give one JSON object a line.")
    loaded = _load(model, adapter, quantization, double_quant)
    rounds = has_fast_bfloat16() if mixed_precision is None else mixed_precision
    with progress_bar(Console(stderr=True), str(data), len(examples)) as advance:
        found = score(loaded, examples, max_new_tokens=max_new_tokens, on_progress=advance, mixed_precision=rounds)
    scores = found.to_dict()
    if output is not None:
        write_json_atomic(output, scores)
    if answers is not None:
        rows = []
        for line, answer in zip(examples, found.answers, strict=True):
            known = {"prompt": line.prompt, "response": line.response}
            rows.append(known | {"answer": answer, "right": is_match(answer, line.response)})
        write_jsonl_atomic(answers, rows)
    typer.echo(f"exact match {100 * scores['exact_match']:.1f} % of {scores['count']}")
    for field, value in scores["fields"].items():
        typer.echo(f"  {field}: {100 * value:.1f} %")


@app.command(epilog="Example: `gemma-lora plan --model gemma3_1b --memory 16GB`")
def plan(
    model: Annotated[str, typer.Option(help="A model's shape: gemma3_270m, gemma3_1b, gemma2_2b_en, … gpt3_175b.")],
    memory: Annotated[str, typer.Option(help="What there is: 16GB, 7.5GiB. Of a GPU or TPU: its own memory.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the update.")] = 16,
    targets: Annotated[str, typer.Option(help="As of finetune.")] = "all-linear",
    dora: Annotated[bool, typer.Option("--dora", help="As of finetune.")] = False,
    row_length: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 384,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: weights and activations.")] = "float32",
    accelerator: Annotated[
        bool, typer.Option("--accelerator", help="Memory is a GPU's or TPU's: Python and its libraries are elsewhere.")
    ] = False,
) -> None:
    """Say where the bytes of fine-tuning would go, what fits, and with which settings.

    Nothing is loaded. On Gemma 3 270M and a CPU the sums are within 15 % of measured peaks; for other models and on
    accelerators they are arithmetic that nothing has checked.
    """
    from gemma_lora.gemma import memory as sizes

    if model not in sizes.CONFIGURATIONS:
        raise GemmaLoraError(f"--model: {model!r} is not known. Give one of {', '.join(sizes.CONFIGURATIONS)}.")
    try:
        available = sizes.parse_bytes(memory)
    except ValueError as error:
        raise GemmaLoraError(f"--memory: {error}") from None
    names = targets if targets == "all-linear" else tuple(t.strip() for t in targets.split(","))
    named = {"rank": rank, "targets": names, "dora": dora, "row_length": row_length, "dtype": dtype}
    named["accelerator"] = accelerator
    named["mixed_precision"] = dtype == "float32"  # finetune's default where it is faster, and the larger need
    Console().print(*_planned(sizes.CONFIGURATIONS[model], available, named), sep="\n", highlight=False, soft_wrap=True)


def _planned(configuration, available: int, named: dict):
    """The table of `plan`, and the sentence that says what to do."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from gemma_lora.gemma import memory as sizes

    headings = {"weights": "weights", "gradients": "grad.", "optimizer": "Adam", "activations": "activ."}
    headings |= {"logits": "loss", "process": "process", "total": "total"}
    title = f"{configuration.name}: GB of a step with one row of {named['row_length']} tokens; rows that fit"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # narrow: 27B's numbers in 80 columns
    for heading in ("method", *headings.values(), "rows"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    fits: dict[str, int] = {}
    for method in sizes.METHODS:
        for remat in (False, True):
            one = sizes.plan(configuration, method, remat=remat, **named)
            name = method + ("+remat" if remat else "")
            rows = fits[name] = sizes.most_rows(configuration, available, method=method, remat=remat, **named)
            # Constants of quantization and rounded copies are kept as long as the weights are.
            parts = one.parts() | {"weights": one.weights + one.constants + one.copies, "total": one.total}
            table.add_row(name, *(f"{parts[column] / 1e9:.2f}" for column in headings), str(rows or "–"))
    return table, _advice(configuration, fits, available, named)


def _advice(configuration, fits: dict[str, int], available: int, named: dict) -> str:
    """What to do, given `{method: rows that fit}`."""
    choice = next((name for name in ("lora", "lora+remat", "qlora", "qlora+remat") if fits[name]), None)
    name, size = configuration.name, f"{available / 1e9:g} GB"
    if choice is None:
        return f"Not even QLoRA of {name} fits {size}. Try shorter rows, --dtype bfloat16, or a smaller model."
    packed, label = choice.startswith("qlora"), "QLoRA" if choice.startswith("qlora") else "LoRA"
    rows = min(2 ** (fits[choice].bit_length() - 1), 8)  # more rows make fewer steps of the same lines
    if configuration.family == "gpt":
        return f"{label} fits {size}, with {rows} rows. This project trains Gemma only."
    length, remat = named["row_length"], choice.endswith("+remat")
    if named["dtype"] != "float32":  # finetune computes in float32 or mixed precision
        code = f"FineTuner(model, rows={rows}, row_length={length}, remat={remat})"
        kept = ', quantization="nf4", double_quant=True' if packed else ""
        return f'{label} fits {size}. In Python: load_gemma("{name}", dtype="{named["dtype"]}"{kept}) and {code}.'
    flags = [f"--rank {named['rank']} --rows {rows} --row-length {length}"]
    if name != "gemma3_270m":  # finetune's own
        flags.insert(0, f"--model {name}")
    if named["targets"] != "all-linear":
        flags.append(f"--targets {','.join(named['targets'])}")
    flags += ["--dora"] * named["dora"] + ["--quantization nf4 --double-quant"] * packed + ["--remat"] * remat
    return f"{label} fits {size}:\n  gemma-lora finetune {' '.join(flags)}"


def _check_quantization(quantization: str | None, double_quant: bool) -> None:
    if double_quant and quantization != "nf4":
        raise GemmaLoraError("--double-quant goes with --quantization nf4. Give both, or neither.")


def _load(model: str, adapter: Path | None, quantization: str | None, double_quant: bool):
    from gemma_lora.base.hardware import use_compilation_cache
    from gemma_lora.exchange.peft import load_adapter
    from gemma_lora.gemma.load import load_gemma

    _check_quantization(quantization, double_quant)
    use_compilation_cache()
    if adapter is not None and not adapter.is_dir():
        raise GemmaLoraError(f"{adapter}: no such folder. Give an adapter folder, such as runs/expenses/adapter.")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise GemmaLoraError(f"{adapter}: holds no adapter_config.json. Give a folder that save_adapter or PEFT wrote.")
    loaded = load_gemma(model, quantization=quantization, double_quant=double_quant)
    return load_adapter(loaded, adapter) if adapter is not None else loaded


def main() -> None:
    """Runs the command line; what a user can cause is one line on stderr and status 2."""
    os.environ["KERAS_BACKEND"] = "jax"
    keep_freed_memory()
    try:
        app()
    except (GemmaLoraError, ValueError, OSError) as error:
        message = Text.assemble(("error: ", "bold red"), str(error))  # not markup: a file may be called "[/]"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped", highlight=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
