"""The command line: what a user gets wrong is one line on stderr and status 2; texts are printed as they are."""

import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys
import types

import pytest

from gemma_lora import cli, lora
from gemma_lora.base import settings as settings_module
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.settings import FIELDS, Settings
from gemma_lora.commands import options
from gemma_lora.data.templates import Template
from gemma_lora.exchange.peft import save_adapter
from gemma_lora.generation.evaluation import Scores
from gemma_lora.generation.metrics import score
from gemma_lora.job import finetuning as job
from tests.conftest import CharacterTokenizer, tiny_gemma

MARKUP = "[bold]x[/bold] [/] [red"
TEMPLATE = Template("{prompt}:", "{response}<eos>")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")  # messages are searched as one line
    for name in ("gemma_lora.base.hardware.use_compilation_cache", "gemma_lora.job.stages.use_compilation_cache"):
        monkeypatch.setattr(name, lambda: None)
    for name in ("gemma_lora.gemma.load.load_gemma", "gemma_lora.job.stages.load_gemma"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("a model was loaded before the input was checked"))


def small_model():
    model = tiny_gemma(3)
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    return model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("gemma_lora.gemma.load.load_gemma", lambda source, **named: small_model())


@pytest.fixture
def adapter(tmp_path):
    import numpy as np

    model = small_model()
    lora.apply_lora(model, rank=2)
    for number, layer in enumerate(lora.lora_layers(model)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.3, layer.lora_b.shape))
    return save_adapter(model, tmp_path / "adapter", template=TEMPLATE)


def jsonl(path, *rows):
    path.parent.mkdir(exist_ok=True)  # a name such as "[/]" is a folder and a file
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {"prompt": "a", "response": "b"}


# --- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune", "evaluate", "generate", "chat", "export", "serve"])
def test_help_shows_an_example_that_the_command_understands(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert f"Example: gemma-lora {name} " in out
    example = out.split("Example: ")[1].split("\n")[0]
    options = {word for word in example.split() if word.startswith("--")}
    assert options and all(out.count(option) > 1 for option in options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate --data good.jsonl", "generate hi"])
def test_a_quantized_base_is_asked_for(command, monkeypatch, tmp_path, name):
    asked = []

    def load(source, **named):
        asked.append(named)
        return small_model()

    monkeypatch.setattr("gemma_lora.gemma.load.load_gemma", load)
    jsonl(tmp_path / "good.jsonl", ROW)
    status, _, err = command(*name.split(), "--quantization", "nf4", "--double-quant", "--max-new-tokens", "2")
    assert status == 0, err
    assert asked == [{"quantization": "nf4", "double_quant": True}]


def test_every_command_is_listed(command):
    _, out, _ = command("--help")
    assert all(name in out for name in ("finetune", "evaluate", "generate", "chat", "export", "serve"))


# --- bad input ---------------------------------------------------------------------------------------------


def finished_run(folder):
    folder.mkdir(exist_ok=True)
    settings = dataclasses.asdict(job.Settings(data="good.jsonl", run_dir=folder.name)) | {"rank": 99}
    for name, value in {"settings.json": settings, "metrics.json": {}}.items():
        (folder / name).write_text(json.dumps(value))


def bad_surroundings(folder):
    """Files that the cases below speak of; gives everything that is there."""
    jsonl(folder / "good.jsonl", ROW, ROW | {"prompt": "c"})
    jsonl(folder / "bad.jsonl", ROW, "not json", {"prompt": "x"})
    (folder / "sheet.csv").write_bytes(b"PK\x03\x04")
    for name in ("done", "empty", "half"):
        (folder / name).mkdir()
    (folder / "half" / "adapter_config.json").touch()
    finished_run(folder / "done")
    return sorted(folder.rglob("*"))


# Arguments, and what the message has to name: the place and the remedy.
BAD = {
    "no data": ("evaluate --data none.jsonl", ["none.jsonl", "JSONL"]),
    "no data to train on": ("finetune --data none.jsonl", ["none.jsonl", "JSONL"]),
    "a folder": ("evaluate --data empty", ["empty", "JSONL"]),
    "no train.jsonl": ("finetune --data empty", ["empty", "train.jsonl"]),
    "bad lines": ("evaluate --data bad.jsonl", ["bad.jsonl:2: not JSON", "bad.jsonl:3: ", "--skip-bad-lines"]),
    "bad lines to train on": ("finetune --data bad.jsonl", ["bad.jsonl:2: not JSON", "--skip-bad-lines"]),
    "bad validation lines": (
        "finetune --data good.jsonl --validation bad.jsonl",
        ["bad.jsonl:2: not JSON", "--skip-bad-lines"],
    ),
    "no validation lines": ("finetune --data good.jsonl --validation none.jsonl", ["none.jsonl", "--validation"]),
    "no template": ("finetune --data good.jsonl --template gemma", ["gemma: no such template", "base, chat"]),
    "no template in the file": (
        "finetune --data good.jsonl --template bad.jsonl",
        ["bad.jsonl: not a template", "prompt and response"],
    ),
    "a form that is not read": ("finetune --data sheet.csv", ["sheet.csv: is a zip or Excel file", "CSV"]),
    "targets": ("finetune --data good.jsonl --targets query,knob", ["knob", "attention_output"]),
    "rank": ("finetune --rank 0", ["--rank"]),
    "no number": ("finetune --learning-rate nan", ["--learning-rate must be a finite number above 0", "nan"]),
    "no passes": ("finetune --epochs 0", ["--epochs"]),
    "a bound that is not included": ("finetune --dropout 1", ["--dropout", "below 1", "dropout=1.0"]),
    "two that do not go together": ("finetune --remat --dropout 0.1", ["--remat", "--dropout"]),
    "no such option": ("finetune --rnak 4", ["--rnak"]),
    "no prompt": ("generate", ["prompts"]),
    "no adapter": ("generate --adapter nowhere hi", ["nowhere", "runs/expenses/adapter"]),
    "adapter without weights": ("generate --adapter half hi", ["half", "adapter_model.safetensors"]),
    "no model file": ("finetune --data good.jsonl --model none.gguf", ["none.gguf", "GGUF file"]),
    "no model file to ask": ("generate --model none.gguf hi", ["none.gguf", "GGUF file"]),
    "no model folder": ("evaluate --data good.jsonl --model no/such", ["no/such: no such folder", "preset"]),
    "no preset in the folder": ("generate --model ./empty hi", ["empty: holds no config.json", "save_to_preset"]),
    "blocks of no file": (
        "finetune --data good.jsonl --model gemma3_1b --quantization gguf",
        ["quantization='gguf'", ".gguf file"],
    ),
    "nothing to answer": ("generate", ["--file", "stdin"]),
    "prompts twice": ("generate hi --file good.jsonl", ["one of them"]),
    "no prompts file": ("generate --file nowhere.txt", ["nowhere.txt: cannot be read"]),
    "a bad prompts file": ("generate --file bad.jsonl", ["bad.jsonl:2: not JSON"]),
    "stdin and more": ("generate - hi", ["alone"]),
    "top-k of nothing": ("generate hi --top-k 5", ["--top-k", "--temperature"]),
    "top-p of nothing": ("chat --top-p 0.5", ["--top-p", "--temperature"]),
    "top-p of zero": ("chat --top-p 0 --temperature 1", ["--top-p", "above 0"]),
    "no temperature": ("generate hi --temperature nan", ["--temperature"]),
    "an empty stop": ("chat --stop=", ["--stop", "empty"]),
    "no adapter to talk to": ("chat --adapter nowhere", ["nowhere", "runs/expenses/adapter"]),
    "empty adapter": ("generate --adapter empty hi", ["empty", "adapter_config.json"]),
    "no adapter to score": ("evaluate --data good.jsonl --adapter nowhere", ["nowhere", "runs/expenses/adapter"]),
    "finished run": ("finetune --data good.jsonl --run-dir done", ["done", "rank was 99", "--overwrite", "--run-dir"]),
    "an encoding": ("generate --quantization int3 hi", ["int3", "nf4", "gguf"]),
    "double quantization of nothing": ("finetune --double-quant", ["--double-quant", "--quantization nf4"]),
    "double quantization of int8": ("generate --quantization int8 --double-quant hi", ["--quantization nf4"]),
    "place for answers": ("evaluate --data good.jsonl --answers bad.jsonl/a.jsonl", ["a.jsonl", "--answers"]),
    "answers over the data": ("evaluate --data good.jsonl --answers ./good.jsonl", ["good.jsonl", "--answers"]),
    "scores over the data": ("evaluate --data good.jsonl --output good.jsonl", ["good.jsonl", "--output"]),
    "both in one file": ("evaluate --data good.jsonl --output a.json --answers a.json", ["a.json", "--answers"]),
    "a picture of no classes": ("evaluate --data good.jsonl --metric exact --picture p.png", ["--picture", "exact"]),
    "a picture of no known kind": ("evaluate --data good.jsonl --picture p.jpg", ["p.jpg", ".svg", "--picture"]),
    "a picture over the data": ("evaluate --data good.jsonl --picture good.jsonl", ["good.jsonl", "--picture"]),
    "a metric": ("evaluate --data good.jsonl --metric rouge", ["rouge", "classification"]),
    "a metric that does not suit": ("evaluate --data good.jsonl --metric json", ["good.jsonl", "'b'", "'exact'"]),
    "place for scores": ("evaluate --data good.jsonl --output bad.jsonl/s.json", ["bad.jsonl/s.json", "--output"]),
    "place for a run": ("finetune --data good.jsonl --run-dir bad.jsonl/run", ["bad.jsonl/run", "--run-dir"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_remedy_before_any_model_is_loaded(command, tmp_path, case):
    before = bad_surroundings(tmp_path)
    arguments, words = BAD[case]
    status, out, err = command(*arguments.split())
    assert (status, out) == (2, "")
    assert [word for word in words if word not in err] == [], err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before  # no new folder either


EARLY = """
import json, sys
from gemma_lora import cli
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["gemma-lora", *arguments.split()]
    try:
        cli.main()
        raise RuntimeError(f"{name}: was not refused")
    except SystemExit as exit_:
        if exit_.code != 2:
            raise RuntimeError(f"{name}: status {exit_.code}")
    if late := {"jax", "keras", "keras_hub"} & set(sys.modules):
        raise RuntimeError(f"{name}: {late} imported before it was refused")
"""


@pytest.mark.slow
def test_bad_input_is_found_before_jax_is_imported(tmp_path):
    """That import takes seconds; a slip of the pen is to be answered within one."""
    bad_surroundings(tmp_path)
    cases = json.dumps({name: arguments for name, (arguments, _) in BAD.items()})
    command_line = [sys.executable, "-c", EARLY, cases]
    root = os.path.dirname(os.path.dirname(cli.__file__))
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError(28, "No space left", "f.txt"), 2)])
def test_interruptions_have_a_status_and_no_traceback(command, monkeypatch, error, status):
    def fail(source, **named):
        raise error

    monkeypatch.setattr("gemma_lora.gemma.load.load_gemma", fail)
    found, out, err = command("generate", "hi")
    assert (found, out) == (status, "")
    assert "Traceback" not in err
    assert status == 130 or ("No space left" in err and "f.txt" in err)


def test_a_defect_of_ours_is_not_hidden(command, monkeypatch):
    def fail(source, **named):
        raise ZeroDivisionError

    monkeypatch.setattr("gemma_lora.gemma.load.load_gemma", fail)
    with pytest.raises(ZeroDivisionError):
        command("generate", "hi")


# --- text that looks like markup ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[bold]x", "[/]", "a[/red]b", ":smile:", "back\\slash\\"])
def test_a_name_like_markup_is_printed_as_it_is(command, tmp_path, name):
    status, _, err = command("evaluate", "--data", f"{name}.jsonl")
    assert status == 2 and f"error: {name}.jsonl: cannot be read" in err
    status, _, err = command("finetune", "--data", name)
    assert status == 2 and f"error: {name}: not found" in err
    jsonl(tmp_path / f"{name}.jsonl", "[bold]")
    status, _, err = command("evaluate", "--data", f"{name}.jsonl")
    assert status == 2 and f"\n{name}.jsonl:1: not JSON" in err


def test_answers_like_markup_are_printed_as_they_are(command, small, monkeypatch):
    monkeypatch.setattr("gemma_lora.generation.engine.generate", lambda model, prompts, **named: list(prompts))
    status, out, _ = command("generate", MARKUP, ":smile:", "é ü")
    assert (status, out) == (0, f"{MARKUP}\n:smile:\né ü\n")


@pytest.mark.slow
def test_a_data_file_and_fields_named_like_markup_are_scored(command, small, adapter, tmp_path):
    row = {"prompt": MARKUP, "response": json.dumps({"[/]": "[bold]"})}
    path = jsonl(tmp_path / "[/] [bold].jsonl", row)
    arguments = ("evaluate", "--adapter", adapter, "--data", path, "--max-new-tokens", 2)
    status, out, err = command(*arguments)
    assert status == 0, err
    assert "  [/]: 0.0 %" in out


# --- what the commands do ----------------------------------------------------------------------------------


def answers_of(adapter, prompts):
    from gemma_lora.exchange.peft import load_adapter
    from gemma_lora.generation.engine import generate

    return generate(load_adapter(small_model(), adapter), prompts, max_new_tokens=6)


@pytest.mark.slow
def test_generate_prints_one_answer_a_prompt_with_the_adapters_template(command, small, adapter):
    prompts = ["one", "another", "third"]
    status, out, err = command("generate", "--adapter", adapter, "--max-new-tokens", 6, *prompts)
    assert status == 0, err
    assert out == "".join(answer + "\n" for answer in answers_of(adapter, prompts))


def readable(adapter, count):
    """Prompts whose answers a file of examples may hold: a random model writes control characters, too."""
    prompts = ["one", "zwölf", "third", *"abcdefghijklmnopqrstuvwxyz"]
    found = [p for p, answer in zip(prompts, answers_of(adapter, prompts), strict=True) if answer.isprintable()]
    return found[:count]


@pytest.mark.slow
def test_generate_takes_a_file_or_stdin(command, small, adapter, tmp_path, monkeypatch):
    prompts = ["one", "another", "third"]
    expected = "".join(answer + "\n" for answer in answers_of(adapter, prompts))
    (tmp_path / "p.txt").write_text("one\r\n\nanother\nthird", encoding="utf-8-sig")
    rows = [
        {"prompt": "one"},
        {"messages": [{"role": "user", "content": "another"}]},
        {"prompt": "third", "response": "x"},
    ]
    jsonl(tmp_path / "p.jsonl", *rows)
    common = ("generate", "--adapter", adapter, "--max-new-tokens", 6)
    for name in ("p.txt", "p.jsonl"):
        status, out, err = command(*common, "--file", name)
        assert (status, out) == (0, expected), err
    piped(monkeypatch, "one\nanother\nthird\n")
    assert command(*common, "-")[1] == expected


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_how_tokens_are_chosen_is_passed_on(command, small, monkeypatch, name):
    asked = {}

    class Chat:
        def __init__(self, model, system, **named):
            asked.update(named)

    def answer(model, prompts, **named):
        asked.update(named)
        return prompts

    monkeypatch.setattr("gemma_lora.generation.engine.generate", answer)
    monkeypatch.setattr("gemma_lora.generation.chat.Chat", Chat)
    piped(monkeypatch, "")
    options = "--temperature 0.7 --top-k 9 --top-p 0.9 --seed 4 --stop Q: --stop ## --max-new-tokens 5"
    status, _, err = command(name, *options.split(), *(["hi"] if name == "generate" else []))
    assert status == 0, err
    named = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 4, "stop": ["Q:", "##"], "max_new_tokens": 5}
    assert asked == named


def piped(monkeypatch, text, terminal=False):
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


class Parrot:
    """Answers with the number of the turn and what was said, a few signs at a time."""

    def __init__(self, model, system=None, **named):
        self.system, self.turns = system, 0

    def reset(self):
        self.turns = 0

    def stream(self, text):
        self.turns += 1
        if text == "too long":
            raise GemmaLoraError("The chat would have 9 tokens")
        if text == "interrupt":
            raise KeyboardInterrupt
        return iter([f"{self.turns} ", text[:2], text[2:]])


@pytest.fixture
def parrot(small, monkeypatch):
    monkeypatch.setattr("gemma_lora.generation.chat.Chat", Parrot)


def test_a_line_of_a_pipe_is_a_turn(command, parrot, monkeypatch):
    piped(monkeypatch, "hi\n\n/etc/hosts?\r\n/reset\né\x1b[2Jü\x07\u202e\n/quit\nnever\n")
    assert command("chat") == (0, "1 hi\n2 /etc/hosts?\n1 é␛[2Jü␇\\u202e\n", "")
    piped(monkeypatch, "a\ntoo long\nb\n")
    status, out, err = command("chat")
    assert (status, out) == (2, "1 a\n") and "9 tokens" in err and "Traceback" not in err


def test_at_a_terminal_an_error_is_said_and_the_chat_goes_on(command, parrot, monkeypatch):
    piped(monkeypatch, "", terminal=True)
    said = iter(["hi", "too long", "/reset", "b"])
    monkeypatch.setattr("builtins.input", lambda sign: next(said, None) or raised(EOFError()))
    status, out, err = command("chat")
    assert (status, out) == (0, "1 hi\n1 b\n")
    assert "9 tokens" in err and "/reset" in err and "/quit" in err and "A new chat." in err
    said = iter(["interrupt"])
    status, out, err = command("chat")
    assert status == 130 and "Traceback" not in err


def raised(error):
    raise error


@pytest.mark.slow
def test_chat_answers_as_generate_does(command, small, adapter, monkeypatch):
    from gemma_lora.exchange.peft import load_adapter
    from gemma_lora.generation.engine import generate

    model, chat = load_adapter(small_model(), adapter), [{"role": "system", "content": "Be brief."}]
    expected = []
    for turn in ("one", "two"):
        chat.append({"role": "user", "content": turn})
        expected += generate(model, [chat], max_new_tokens=6)
        chat.append({"role": "assistant", "content": expected[-1]})
    piped(monkeypatch, "one\ntwo\n")
    status, out, err = command("chat", "--adapter", adapter, "--system", "Be brief.", "--max-new-tokens", 6)
    assert status == 0, err
    assert out == "".join(answer + "\n" for answer in expected)


@pytest.mark.slow
def test_evaluate_writes_the_share_of_right_answers(command, small, adapter, tmp_path):
    prompts = readable(adapter, 4)
    rows = [{"prompt": p, "response": a} for p, a in zip(prompts, answers_of(adapter, prompts), strict=True)]
    rows[2]["response"] += " wrong"
    path = jsonl(tmp_path / "data.jsonl", *rows, "not json")
    scores = tmp_path / "new" / "scores.json"
    arguments = ("evaluate", "--adapter", adapter, "--data", path, "--output", scores, "--max-new-tokens", 6)
    status, out, err = command(*arguments, "--skip-bad-lines", "--no-mixed-precision")
    assert status == 0, err
    written = json.loads(scores.read_text())
    assert (written["exact_match"], written["count"]) == (0.75, 4)
    assert "exact match 75.0 % of 4" in out
    assert f"skipped: 1 in {path}" in err  # left out, but not in silence


def test_evaluate_writes_every_line_with_its_answer(command, small, adapter, tmp_path):
    prompts = readable(adapter, 3)
    given = answers_of(adapter, prompts)
    rows = [{"prompt": p, "response": a} for p, a in zip(prompts, given, strict=True)]
    rows[1]["response"] += " wrong"
    path, answers = jsonl(tmp_path / "data.jsonl", *rows), tmp_path / "new" / "answers.jsonl"
    arguments = ("evaluate", "--adapter", adapter, "--data", path, "--answers", answers, "--max-new-tokens", 6)
    status, _, err = command(*arguments, "--no-mixed-precision")
    assert status == 0, err
    written = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    rights = [True, False, True]
    more = [{"answer": answer, "right": right} for answer, right in zip(given, rights, strict=True)]
    cut = [{"cut": True} if len(answer.replace("<unk>", "?")) == 6 else {} for answer in given]  # a token is a sign
    assert any(cut) and written == [row | of | was for row, of, was in zip(rows, more, cut, strict=True)]


def test_evaluate_writes_a_chat_with_all_it_was_asked(command, small, adapter, tmp_path):
    turns = [("system", "Be kind."), ("user", "hi"), ("assistant", "yes"), ("user", "x"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    path, answers = jsonl(tmp_path / "chats.jsonl", {"messages": messages}), tmp_path / "answers.jsonl"
    arguments = ("evaluate", "--adapter", adapter, "--data", path, "--answers", answers, "--max-new-tokens", 2)
    status, _, err = command(*arguments, "--metric", "exact")
    assert status == 0, err
    (row,) = map(json.loads, answers.read_text().splitlines())
    assert (row["prompt"], row["response"]) == ("x", "no")
    assert row["messages"] == [{"role": "user", "content": "Be kind.\n\nhi"}, *messages[2:4]]


def test_a_classification_is_said_and_drawn(command, small, monkeypatch, tmp_path):
    """The metric follows the lines; the picture stands beside the scores, or where it is asked for."""
    rows = [{"prompt": str(n), "response": ["yes", "no [b]"][n % 2]} for n in range(8)]
    path, scores = jsonl(tmp_path / "data.jsonl", *rows), tmp_path / "new" / "scores.json"

    def evaluate(model, examples, metric, **named):
        answers = ["yes"] * 6 + ["perhaps", "no [b]"]
        return score(answers, [example.response for example in examples], metric, [True] + [False] * 7)

    monkeypatch.setattr("gemma_lora.generation.evaluation.evaluate", evaluate)
    status, out, err = command("evaluate", "--data", path, "--output", scores)
    assert status == 0, err
    assert "Metric: classification" in err and "--metric" in err
    for words in ("accuracy 50.0 % of 8 (12.5 to 87.5)", "macro F1 ", "  no [b]: precision 100.0 %, recall 25.0 %"):
        assert words in out
    assert "(no class): lines 0, answered 1" in out and "cut off before they were done: 1 of 8" in out
    written = json.loads(scores.read_text())
    assert written["confusion"]["counts"] == [[3, 3], [0, 1], [1, 0]] or written["confusion"]["rows"][0] != "yes"
    assert (tmp_path / "new" / "scores_confusion.png").read_bytes()[:4] == b"\x89PNG"
    status, _, err = command("evaluate", "--data", path, "--picture", "here.svg", "--metric", "classification")
    assert status == 0 and "Metric" not in err and b"<svg" in (tmp_path / "here.svg").read_bytes()


@pytest.mark.slow
def test_the_loss_is_said_in_nats_and_written_for_every_line(command, small, adapter, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", {"prompt": "a", "response": "bcd"}, {"prompt": "b", "response": "x"})
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    places = ("--answers", answers, "--output", scores)
    status, out, err = command("evaluate", "--adapter", adapter, "--data", path, "--metric", "loss", *places)
    assert status == 0, err
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    value = json.loads(scores.read_text())["scores"]["loss"]["value"]
    assert value == pytest.approx((4 * rows[0]["loss"] + 2 * rows[1]["loss"]) / 6)  # with the tokens that end them
    assert f"loss {value:.3f} of 2 (" in out and "answer" not in rows[0]


@pytest.mark.parametrize(
    ("option", "asked"), [("", None), ("--mixed-precision", True), ("--no-mixed-precision", False)]
)
def test_evaluate_rounds_where_that_is_faster_or_as_asked(command, small, monkeypatch, tmp_path, option, asked):
    seen = []

    def evaluate(model, examples, mixed_precision, **named):
        seen.append(mixed_precision)
        return Scores(exact_match=1.0, fields={}, valid_json=1.0, count=len(examples), answers=["two"])

    monkeypatch.setattr("gemma_lora.generation.evaluation.evaluate", evaluate)
    path = jsonl(tmp_path / "data.jsonl", {"prompt": "one", "response": "two"})
    status, _, err = command("evaluate", "--data", path, *option.split())
    assert (status, seen) == (0, [asked]), err  # None: what is faster, as everywhere


def test_finetune_passes_every_option_on(command, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(job, "finetune", lambda settings, console, **named: seen.append(settings))
    options = {"data": "d.jsonl", "run_dir": "r", "model": "m.gguf", "rank": 3, "alpha": 5.0, "dropout": 0.1}
    options |= {"learning_rate": 0.01, "epochs": 2, "limit": 7, "rows": 5, "row_length": 99, "seed": 4}
    options |= {"quantization": "nf4"}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags = ["--rslora", "--dora", "--skip-bad-lines", "--double-quant"]
    status, _, err = command("finetune", *words, "--targets", "query, down", *flags)
    assert status == 0, err
    expected = options | {"targets": ("query", "down"), "rslora": True, "dora": True}
    expected |= {"skip_bad_lines": True, "double_quant": True}
    assert {name: getattr(seen[0], name) for name in expected} == expected


def test_finetunes_defaults_are_the_jobs(command, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "finetune", lambda settings, console, **named: seen.append(settings))
    assert command("finetune")[0] == 0
    assert seen == [job.Settings()]


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.metadata.get("option", True)])
def test_every_setting_is_an_option_of_finetune(command, monkeypatch, name):
    """Its field alone makes it one: type, default, bounds and help stand there."""
    seen = []
    monkeypatch.setattr(job, "finetune", lambda settings, console, **named: seen.append(settings))
    given = OTHER.get(name, "7")
    words = [f"--no-{name}" if given is False else f"--{name}", *([given] if isinstance(given, str) else [])]
    more = ["--quantization", "nf4"] if name == "double_quant" else []
    status, _, err = command("finetune", words[0].replace("_", "-"), *words[1:], *more)
    assert status == 0, err
    assert getattr(seen[0], name) != getattr(Settings(), name)
    assert str(getattr(seen[0], name)) in (str(given), f"{given}.0", str((given,)))
    _, out, _ = command("finetune", "--help")
    assert FIELDS[name].metadata["help"].split(".")[0][:20] in out


#: Another value than the default, as the command line takes it; "7" where none is given.
OTHER = {
    "quantization": "int8",
    "targets": "query",
    "dropout": "0.25",
    "warmup": "0.5",
    "evaluate_base": False,
    "keep_best": False,
    "replay": "0.5",
}
OTHER |= {name: True for name in ("double_quant", "rslora", "dora", "remat", "mixed_precision")}
OTHER |= {name: True for name in ("filter_gradient", "skip_bad_lines")}
OTHER["metric"] = "loss"


def test_a_new_field_is_a_new_option(monkeypatch):
    """With its type, bounds, default and help, and with no other edit."""

    @dataclasses.dataclass(frozen=True)
    class More(Settings):
        beam: int = dataclasses.field(default=3, metadata={"help": "Answers kept.", "min": 1})

    for module in (options, settings_module):
        monkeypatch.setattr(module, "FIELDS", {field.name: field for field in dataclasses.fields(More)})
        monkeypatch.setattr(module, "Settings", More)
    seen = []
    command = options.takes("beam")(lambda **chosen: seen.append(chosen))
    (parameter,) = inspect.signature(command).parameters.values()
    option = parameter.annotation.__metadata__[0]
    assert (parameter.default, parameter.annotation.__origin__, option.help, option.min) == (3, int, "Answers kept.", 1)
    command(beam=4)
    assert seen == [{"beam": 4}]
    with pytest.raises(GemmaLoraError, match="--beam must be an integer of at least 1"):
        command(beam=0)


@pytest.mark.parametrize("data", ["typo.jsonl", "good.jsonl"])
def test_overwrite_costs_no_run_before_data_and_model_are_there(command, monkeypatch, tmp_path, data):
    """`test_job` holds what it does once they are."""

    def no_model(source, **named):
        raise GemmaLoraError("the model was asked for")

    monkeypatch.setattr("gemma_lora.job.stages.load_gemma", no_model)
    finished_run(tmp_path / "r")
    jsonl(tmp_path / "good.jsonl", ROW, ROW | {"prompt": "c"})
    before = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    status, _, err = command("finetune", "--data", data, "--run-dir", "r", "--overwrite")
    assert status == 2 and ("typo.jsonl: not found" in err or "the model was asked for" in err)
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


# --- plan --------------------------------------------------------------------------------------------------


def test_plan_says_what_fits_and_how_to_run_it(command):
    status, text, error = command("plan", "--model", "gemma3_1b", "--memory", "16GB")
    assert (status, error) == (0, "")
    assert "gemma-lora finetune --model gemma3_1b --rank 16 --rows 4 --row-length 384" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    full, lora_row = rows["full"], rows["lora"]
    assert "–" in full and "–" not in lora_row  # 16 bytes a weight are 16 GB already


def test_plan_takes_remat_where_only_that_fits_and_says_so_where_nothing_does(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, text, _ = command("plan", "--model", "gemma3_270m", "--memory", "2.9GB")
    assert status == 0 and "finetune --rank 16" in text and "--remat" in text
    more = ("--targets", "query,value", "--dtype", "float32")
    status, text, _ = command("plan", "--model", "gemma3_1b", "--memory", "16GB", *more)
    assert status == 0 and "--targets query,value" in text
    more = ("--dtype", "bfloat16", "--accelerator")
    _, text, _ = command("plan", "--model", "gemma3_4b_text", "--memory", "24GB", *more)
    assert 'load_gemma("gemma3_4b_text", dtype="bfloat16")' in text and "gemma-lora finetune" not in text
    status, text, _ = command("plan", "--model", "gemma3_27b_text", "--memory", "8GB")
    assert status == 0 and "Not even QLoRA" in text and "fits 8 GB" in text
    assert "447.54" in text and "…" not in text  # no number is cut off


def test_plan_packs_the_base_where_only_that_fits_and_counts_doras_magnitudes(command):
    _, text, _ = command("plan", "--model", "gemma3_270m", "--memory", "2.4GB", "--dora")
    assert "QLoRA fits 2.4 GB" in text and "--dora --quantization nf4 --double-quant" in text
    assert "--remat" not in text
    _, plain, _ = command("plan", "--model", "gemma3_270m", "--memory", "2.4GB")
    assert "--dora" not in plain and plain.splitlines()[3:] != text.splitlines()[3:]
    more = ("--dtype", "bfloat16", "--accelerator")
    _, text, _ = command("plan", "--model", "gemma3_4b_text", "--memory", "6GB", *more)
    assert 'quantization="nf4", double_quant=True' in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--model", "gemma9", "--memory", "8GB"), "gemma3_270m"),
        (("--model", "gemma3_1b", "--memory", "lots"), "16GB or 8GiB"),
        (("--model", "gemma3_1b", "--memory", "8GB", "--targets", "queries"), "targets"),
    ],
)
def test_plan_refuses_what_it_does_not_know(command, arguments, said):
    status, text, error = command("plan", *arguments)
    assert status == 2 and said in error and not text
