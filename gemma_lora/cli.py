"""The command line: `gemma-lora finetune`, `evaluate`, `generate`, `chat`, `plan`, `export` and `serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from gemma_lora.base.files import GemmaLoraError, require_writable, write_json_atomic, write_jsonl_atomic
from gemma_lora.base.hardware import keep_freed_memory
from gemma_lora.base.settings import ANSWERING_FIELDS, DEFAULTS, SERVER_TIMEOUT, Answering, Settings
from gemma_lora.commands.export import EXAMPLES as EXPORTS
from gemma_lora.commands.export import export
from gemma_lora.commands.models import load, require_model
from gemma_lora.commands.options import ADAPTER, MODEL, OFFERED, STOP, takes
from gemma_lora.commands.serve import EXAMPLES as SERVERS
from gemma_lora.commands.serve import serve

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fine-tune Gemma with LoRA in Keras, on a laptop or an accelerator.",
)


# --- the commands ------------------------------------------------------------------------------------------


@app.command(
    epilog="Example: `gemma-lora finetune --data my.jsonl --run-dir runs/mine`  \n"
    "QLoRA: `gemma-lora finetune --data my.jsonl --run-dir runs/small --quantization nf4 --double-quant --remat`"
)
@takes(*OFFERED)
def finetune(
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that holds a run.")] = False,
    **chosen: Any,
) -> None:
    """Fine-tune with LoRA and report what changed, before and after.

    A run that was stopped, in whatever way, goes on when the same command is run again.
    """
    from gemma_lora.job import finetuning as job

    job.finetune(Settings(**chosen), Console(), overwrite=overwrite)


@app.command(
    epilog='Example: `gemma-lora generate --adapter runs/expenses/adapter "12 lug 2024 Café Lumière 769,08 €"`  \n'
    "A file: `gemma-lora generate --file prompts.jsonl --temperature 0.8 --top-p 0.95`  \n"
    'From a pipe, up to a word: `gemma-lora generate --stop "Q:" - < prompts.txt`  \n'
    'A server: `gemma-lora generate --server http://127.0.0.1:8000 "12 lug 2024 Café Lumière 769,08 €"`'
)
@takes(*MODEL, "max_new_tokens", answering=True)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts, or - for those of stdin, one a line.")
    ] = None,
    adapter: Annotated[Path | None, ADAPTER] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts: text, one a line; or .jsonl, or a .json array, of prompts or messages."),
    ] = None,
    *,
    stop: Annotated[list[str] | None, STOP] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask this OpenAI-compatible server, which has its own model.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="With --server: seconds to wait for one answer.", min=0.1)
    ] = SERVER_TIMEOUT,
    **chosen: Any,
) -> None:
    """Answer prompts: greedily, or with a temperature by drawing."""
    asked = _prompts(prompts or [], file)
    _require_stops(stop)
    if server is not None:
        _ask_server(server, timeout, asked, adapter, stop, chosen)
        return
    require_model(adapter, chosen)
    loaded = load(adapter, chosen)
    from gemma_lora.generation.engine import generate as answer

    for text in answer(loaded, asked, **_as_asked(chosen), stop=stop or ()):
        typer.echo(text)


def _ask_server(
    server: str, timeout: float, asked: list, adapter: Path | None, stop: list[str] | None, chosen: dict[str, Any]
) -> None:
    from gemma_lora.generation.server import ask

    if adapter is not None or any(chosen[name] != getattr(DEFAULTS, name) for name in MODEL):
        raise GemmaLoraError("--server answers with its own model. Leave --adapter, --model and --quantization out.")
    answering = Answering(**{name: chosen[name] for name in ANSWERING_FIELDS})
    for text in ask(server, asked, chosen["max_new_tokens"], answering, stop or (), timeout):
        typer.echo(text)


def _prompts(given: list[str], file: Path | None) -> list:
    """The prompts of the command line, of stdin or of a file; exactly one of them."""
    from gemma_lora.data.prompts import read_prompts

    if bool(given) == (file is not None):
        raise GemmaLoraError("Give prompts, or --file, or - for stdin; one of them.")
    if file is not None:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise GemmaLoraError(f"{file}: cannot be read ({error.strerror}). Give a text or JSONL file.") from error
        return read_prompts(raw, str(file), file.suffix.lower() in (".jsonl", ".json"))
    if "-" not in given:
        return given
    if len(given) > 1:
        raise GemmaLoraError("- takes all prompts from stdin. Give it alone.")
    return read_prompts(sys.stdin.buffer.read(), "stdin", jsonl=False)


def _require_stops(stop: list[str] | None) -> None:
    if "" in (stop or ()):
        raise GemmaLoraError("--stop: an empty text would end every answer at once. Give some text.")


def _as_asked(chosen: dict[str, Any]) -> dict[str, Any]:
    """Of a command's settings those that say how answers are made."""
    return {name: chosen[name] for name in ("max_new_tokens", *ANSWERING_FIELDS)}


@app.command(
    epilog='Example: `gemma-lora chat --adapter runs/mine/adapter --system "Be brief." --temperature 0.8`  \n'
    "From a pipe, a turn for each line: `gemma-lora chat --adapter runs/mine/adapter < turns.txt`"
)
@takes(*MODEL, "max_new_tokens", answering=True)
def chat(
    adapter: Annotated[Path | None, ADAPTER] = None,
    system: Annotated[str | None, typer.Option(help="Text that the model is given before the first turn.")] = None,
    *,
    stop: Annotated[list[str] | None, STOP] = None,
    **chosen: Any,
) -> None:
    """Talk to a model. Type /reset to begin anew, /quit or Ctrl-D to end."""
    _require_stops(stop)
    require_model(adapter, chosen)
    interactive = sys.stdin.isatty()
    loaded = load(adapter, chosen)
    from gemma_lora.generation import terminal
    from gemma_lora.generation.chat import Chat

    def write(text: str) -> None:
        typer.echo(text, nl=False)
        sys.stdout.flush()

    def note(text: str) -> None:
        typer.echo(text, err=True)

    if interactive:
        note(terminal.HELP)
    partner = Chat(loaded, system, **_as_asked(chosen), stop=stop or ())
    terminal.converse(partner, terminal.asker(interactive), write, note if interactive else None)


@app.command(
    epilog="Example: `gemma-lora evaluate --adapter runs/expenses/adapter --data data/expenses/test.jsonl "
    "--output scores.json --answers answers.jsonl`"
)
@takes(*MODEL, "metric", "max_new_tokens", "skip_bad_lines", "mixed_precision")
def evaluate(
    data: Annotated[Path, typer.Option(help="A JSONL file whose responses are the right answers.")],
    adapter: Annotated[Path | None, ADAPTER] = None,
    output: Annotated[Path | None, typer.Option(help="Where the scores go, as JSON.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Where every line goes with its answer and whether that is right, as JSONL."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Where a classification's confusion matrix goes, .png or .svg; by default beside --output."),
    ] = None,
    **chosen: Any,
) -> None:
    """Score an adapter (or the base model) on any file.

    The metric follows the right answers: JSON objects are compared field by field, a few short answers that occur again
    and again are classes, other short ones are compared to the letter, and long ones by chrF. --metric sets another;
    loss is the right answers' mean loss, and generates nothing.
    """
    _require_places(data, output, answers, picture)
    require_model(adapter, chosen)
    examples = _read_lines(data, chosen["skip_bad_lines"])
    asked = chosen["metric"]
    chosen["metric"] = metric = _metric(data, examples, asked, picture)
    if asked is None:
        typer.echo(f"Metric: {metric}, which suits the right answers; --metric sets another.", err=True)
    loaded = load(adapter, chosen)
    found = _score(loaded, str(data), examples, chosen)
    if output is not None:
        write_json_atomic(output, found.to_dict())
    if answers is not None:
        write_jsonl_atomic(answers, _judged(examples, found))
    if found.confusion is not None and (picture or output):
        from gemma_lora.plots import confusion_matrix, save_figure

        table, place = found.confusion, picture or _beside(output)
        save_figure(confusion_matrix(table.counts, table.rows, table.columns, title=data.name), place)
    for line in _said(found):
        typer.echo(line)


def _beside(output: Path | None) -> Path:
    """Where a picture goes that belongs to the scores in a file."""
    output = output or Path("scores.json")
    return output.with_name(f"{output.stem}_confusion.png")


def _metric(data: Path, examples: list, asked: str | None, picture: Path | None) -> str:
    """The metric to score by; raises where it does not suit the lines, or has no picture and one is asked for."""
    from gemma_lora.generation.metrics import metric_of

    try:
        metric = metric_of(asked, [example.response for example in examples])
    except GemmaLoraError as error:
        raise GemmaLoraError(f"{data}: {error}") from None
    if picture is not None and metric != "classification":
        raise GemmaLoraError(
            f"--picture: only the metric classification has a confusion matrix, and here it is {metric}. "
            "Leave --picture out, or give --metric classification."
        )
    return metric


def _said(found: Any) -> list[str]:
    """The lines that `evaluate` prints: each score with its interval, classes, and answers that were cut off."""
    from gemma_lora.job.report import shown_interval, shown_score

    scores = {name: vars(one) for name, one in found.scores.items()}
    scores = scores or {"exact match": {"value": found.exact_match}}
    lines = []
    for number, (name, one) in enumerate(scores.items()):
        of = f" of {found.count}" if number == 0 else ""
        interval = shown_interval(name, one) and f" {shown_interval(name, one)}"
        field = name.startswith("field ")
        label = f"  {name.removeprefix('field ')}:" if field else name
        lines.append(f"{label} {shown_score(name, one['value'])}{of}{interval}")
    for name, one in found.classes.items():
        if not one["count"] and not one["answered"]:
            continue  # no answer was outside the classes
        parts = [f"{of} {shown_score(of, one[of])}" for of in ("precision", "recall", "f1") if of in one]
        parts += [f"lines {one['count']}", f"answered {one['answered']}"]
        lines.append(f"  {name}: {', '.join(parts)}")
    if found.cut:
        lines.append(f"cut off before they were done: {found.cut} of {found.count}. Give a larger --max-new-tokens.")
    return lines


def _require_places(data: Path, output: Path | None, answers: Path | None, picture: Path | None) -> None:
    """Raises where a result cannot be written, or would be written over something else of the same call."""
    places = ((output, "--output", (data,)), (answers, "--answers", (data, output)))
    for path, option, taken in (*places, (picture, "--picture", (data, output, answers))):
        if path is None:
            continue
        if path.resolve() in [other.resolve() for other in taken if other is not None]:
            raise GemmaLoraError(f"{path}: is given twice, and would be overwritten. Give another {option}.")
        require_writable(path, option)
    if picture is not None and picture.suffix.lower() not in (".png", ".svg"):
        raise GemmaLoraError(f"{picture}: a picture ends in .png or .svg. Give another --picture.")


def _read_lines(data: Path, skip_bad_lines: bool) -> list:
    """The examples of a file; says on stderr what is to be known about them, and how many bad lines were left out."""
    from gemma_lora.data.formats import BadLines, read_examples

    bad = BadLines(skip_bad_lines)
    examples = read_examples(data, bad=bad)
    bad.finish()
    for sentence in bad.notices.sentences():
        typer.echo(sentence, err=True)
    for file, count in bad.files.items():
        typer.echo(f"Bad lines skipped: {count} in {file}.", err=True)
    if not examples:
        raise GemmaLoraError(f"{data}: holds no usable example. Give one JSON object a line.")
    return examples


def _score(loaded, what: str, examples: list, chosen: dict[str, Any]):
    """The model's answers to the examples, and their scores."""
    from gemma_lora.generation.evaluation import evaluate as score
    from gemma_lora.job.report import progress_bar

    named = {name: chosen[name] for name in ("max_new_tokens", "mixed_precision", "metric")}
    with progress_bar(Console(stderr=True), what, len(examples)) as advance:
        return score(loaded, examples, on_progress=advance, **named)


def _judged(examples: list, found: Any) -> list[dict[str, Any]]:
    """A row for each example: what the model was asked, right response, answer, and whether it is right.

    Where only losses were computed, the loss of the right answer in nats per token stands in the answer's place.
    """
    from gemma_lora.generation.matching import is_match
    from gemma_lora.job.finetuning import shown_line

    rows = [shown_line(line) for line in examples]
    for row, answer in zip(rows, found.answers, strict=False):
        row |= {"answer": answer, "right": is_match(answer, row["response"])}
    for number in found.cut_lines:
        rows[number]["cut"] = True
    for row, (loss, tokens) in zip(rows, found.losses or [], strict=False):
        row["loss"] = loss / tokens
    return rows


@app.command(epilog="Example: `gemma-lora plan --model gemma3_1b --memory 16GB`")
@takes("rank", "targets", "dora", "row_length", "dtype")
def plan(
    model: Annotated[str, typer.Option(help="A model's shape: gemma3_270m, gemma3_1b, gemma2_2b_en, … gpt3_175b.")],
    memory: Annotated[str, typer.Option(help="What there is: 16GB, 7.5GiB. Of a GPU or TPU: its own memory.")],
    *,
    accelerator: Annotated[
        bool, typer.Option("--accelerator", help="Memory is a GPU's or TPU's: Python and its libraries are elsewhere.")
    ] = False,
    **chosen: Any,
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
    named = chosen | {"accelerator": accelerator}
    named["mixed_precision"] = chosen["dtype"] == "float32"  # finetune's default where it is faster; the larger need
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


app.command(epilog=EXPORTS)(export)
app.command(epilog=SERVERS)(serve)


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
