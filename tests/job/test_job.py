"""The whole job on a tiny Gemma: its folder says what was done, and what it says is true."""

import dataclasses
import inspect
import io
import json
import types

import keras
import pytest
from rich.console import Console

from gemma_lora import job as job_package
from gemma_lora.base import settings as settings_module
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.hardware import has_fast_bfloat16
from gemma_lora.data.templates import Template
from gemma_lora.exchange.peft import load_adapter
from gemma_lora.generation.engine import generate
from gemma_lora.job import finetuning as job
from gemma_lora.job import folder, stages
from gemma_lora.training.replay import default_share
from gemma_lora.training.tuner import FineTuner
from tests.conftest import CharacterTokenizer, tiny_gemma

TEMPLATE = {"prompt": "{prompt}:", "response": "{response}<eos>", "stop": ["<eos>"]}


def small_model(source=None, **named):
    model = tiny_gemma(3)
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    embeddings = model.backbone.token_embedding.embeddings
    # One length for all: then every character is as easy to learn as any other.
    embeddings.assign(3 * keras.ops.normalize(embeddings, axis=1))
    return model


def rows(count, start=0):
    return [{"prompt": f"{n}", "response": json.dumps({"c": "ab"[n % 8 == 7]})} for n in range(start, start + count)]


def jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def run(patch, settings, **named):
    patch.setattr(stages, "load_gemma", small_model)
    patch.setattr(stages, "english_text", lambda: "a river bends and bends again")
    console = Console(file=io.StringIO(), width=200)
    return job.finetune(settings, console, **named), console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over a dataset folder with two tests: settings, metrics, what was shown. Most answers are {"c": "a"}."""
    folder = tmp_path_factory.mktemp("job")
    data = folder / "colours"
    data.mkdir()
    for name, count in {"train": 20, "validation": 4, "test": 5, "test_unseen": 3}.items():
        jsonl(data / f"{name}.jsonl", rows(count, start=count))
    (data / "template.json").write_text(json.dumps(TEMPLATE))
    settings = job.Settings(
        data=str(data),
        run_dir=str(folder / "run"),
        rank=8,
        learning_rate=2e-2,
        epochs=20,
        rows=2,
        row_length=48,
        shots=2,
        max_new_tokens=12,
    )
    with pytest.MonkeyPatch.context() as patch:
        metrics, shown = run(patch, settings)
    return types.SimpleNamespace(settings=settings, metrics=metrics, shown=shown, dir=folder / "run")


def test_metrics_have_the_documented_shape(finished):
    written = json.loads((finished.dir / "metrics.json").read_text())
    assert written == json.loads(json.dumps(finished.metrics))
    for when in ("before", "after"):
        assert list(written[when]) == ["test", "test_unseen"]
        for name, count in {"test": 5, "test_unseen": 3}.items():
            scores = written[when][name]
            assert 0 <= scores["exact_match"] <= 1 and scores["count"] == count
            assert list(scores["fields"]) == ["c"]
    assert 0 < written["training_seconds"] < written["seconds"]
    assert isinstance(written["peak_memory_bytes"], int) and written["peak_memory_bytes"] > 1e8
    assert all(written["english_perplexity"][when] >= 1 for when in ("before", "after"))
    assert "Q4_K_M" in written["model_note"]  # said wherever a figure of the built-in model is shown


def test_settings_hold_every_setting(finished):
    written = json.loads((finished.dir / "settings.json").read_text())
    expected = dataclasses.asdict(finished.settings)  # as asked for: the same on every machine
    assert {name: written[name] for name in expected} == json.loads(json.dumps(expected))
    chosen = {"mixed_precision": has_fast_bfloat16(), "filter_gradient": True, "metric": "json"}
    chosen["replay"] = default_share(finished.settings.epochs)
    assert written["chosen"] == chosen
    assert {"keras", "keras-hub", "jax", "gemma_lora"} <= set(written["versions"])


def test_other_data_in_a_run_that_began_is_named(tmp_path):
    settings = job.Settings(run_dir=str(tmp_path))
    folder.claim(settings, "a", {"epochs": 3})
    (tmp_path / "training.jsonl").touch()
    assert folder.claim(settings, "a", {"epochs": 2}) is None
    assert json.loads((tmp_path / "settings.json").read_text())["chosen"] == {"epochs": 3}
    with pytest.raises(GemmaLoraError, match="data_sha256 was 'a', is 'b'"):
        folder.claim(settings, "b")


def test_a_run_from_before_there_was_a_setting_goes_on(tmp_path):
    folder.claim(job.Settings(run_dir=str(tmp_path)), "a")
    (tmp_path / "training.jsonl").touch()
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    del stored["batch_size"], stored["chosen"]
    path.write_text(json.dumps(stored))
    assert folder.finished_metrics(job.Settings(run_dir=str(tmp_path)), "a") is None
    with pytest.raises(GemmaLoraError, match="batch_size was 64, is 8"):
        folder.finished_metrics(job.Settings(run_dir=str(tmp_path), batch_size=8), "a")


def test_answers_are_one_line_an_example_and_agree_with_the_metrics(finished):
    answers = [json.loads(line) for line in (finished.dir / "answers.jsonl").read_text().splitlines()]
    assert [row["split"] for row in answers] == ["test"] * 5 + ["test_unseen"] * 3
    assert [row["prompt"] for row in answers] == [r["prompt"] for r in [*rows(5, 5), *rows(3, 3)]]
    for when in ("before", "after"):
        for name, scores in finished.metrics[when].items():
            mine = [row for row in answers if row["split"] == name]
            right = [row[when].replace(" ", "") == row["response"].replace(" ", "") for row in mine]
            assert scores["exact_match"] == pytest.approx(sum(right) / len(right))
    # What was learnt shows: else the lines above would compare nothing with nothing.
    assert finished.metrics["before"]["test"]["exact_match"] == 0 < finished.metrics["after"]["test"]["exact_match"] < 1


def test_the_adapter_loads_back_and_gives_the_same_answers(finished):
    model = load_adapter(small_model(), finished.dir / "adapter")
    assert model.gemma_lora_template.to_dict() == TEMPLATE
    answers = [json.loads(line) for line in (finished.dir / "answers.jsonl").read_text().splitlines()]
    again = generate(model, [row["prompt"] for row in answers[:5]], max_new_tokens=12)
    assert again == [row["after"] for row in answers[:5]]
    assert again != [row["before"] for row in answers[:5]]


def test_the_loss_is_logged_drawn_and_falls(finished):
    log = [json.loads(line) for line in (finished.dir / "training.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(row["tokens_per_second"] > 0 and row["memory_bytes"] > 0 for row in log)
    png = (finished.dir / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND"


def test_the_best_epoch_is_kept(finished):
    training = finished.metrics["training"]
    losses = training["validation_loss"]
    assert training["epochs"] == len(losses) == len(training["training_loss"]) > 1
    assert training["best_epoch"] == 1 + losses.index(min(losses))
    assert training["stopped_early"] == (training["epochs"] < finished.settings.epochs)
    assert training["kept_epoch"] == training["best_epoch"] and training["planned_epochs"] == finished.settings.epochs
    shown = " ".join(finished.shown.split())
    assert f"Kept: epoch {training['best_epoch']}, whose validation loss was lowest." in shown
    assert f"Replay against forgetting: {100 * finished.metrics['replay']:g} % of" in shown
    tuner = FineTuner(load_adapter(small_model(), finished.dir / "adapter"), rows=2, row_length=48)
    assert tuner.evaluate(finished.settings.data, verbose=0) == pytest.approx(min(losses), rel=1e-3)


def test_the_report_shows_splits_fields_and_five_answers(finished):
    for text in ("test_unseen", "exact match", "perplexity", "side by side", "peak memory", str(finished.dir)):
        assert text in finished.shown
    assert all(row["prompt"] in finished.shown and row["response"] in finished.shown for row in rows(5, 5))
    files = {path.name for path in finished.dir.iterdir()}
    assert {"adapter", "answers.jsonl", "loss.png", "metrics.json", "settings.json", "training.jsonl"} <= files
    assert not [name for name in files if name.endswith(".tmp")]


@pytest.mark.slow
def test_a_single_file_is_scored_on_its_validation_lines(tmp_path, monkeypatch):
    """Names look like markup, three lines are bad, the base is not scored: nothing of it may stop the job."""
    (tmp_path / "[").mkdir()
    records = [r | {"response": json.dumps({"[/]": "[b]"})} for r in rows(30)]
    too_long = [{"prompt": letter * 99, "response": "b"} for letter in "xy"]
    data = jsonl(tmp_path / "[" / "] [bold].jsonl", [*too_long, *records, "not json"])
    (tmp_path / "[dim].gguf").touch()
    settings = job.Settings(
        data=str(data),
        run_dir=str(tmp_path / "run [/red]"),
        model=str(tmp_path / "[dim].gguf"),
        skip_bad_lines=True,
        evaluate_base=False,
        limit=10,
        rank=2,
        rslora=True,
        dora=True,
        row_length=96,
        max_new_tokens=4,
    )
    metrics, shown = run(monkeypatch, settings)
    assert list(metrics["after"]) == ["validation"] and metrics["before"] == {}
    assert 1 <= metrics["after"]["validation"]["count"] < 15
    assert metrics["model_note"] is None
    for text in (str(data), "[dim].gguf", "[/]", "run [/red]/"):
        assert text in shown.replace("\n", "")
    adapter = json.loads((tmp_path / "run [/red]" / "adapter" / "adapter_config.json").read_text())
    assert adapter["use_rslora"] is adapter["use_dora"] is True
    assert shown.count(" in " + str(data)) == 2 and "2 in " + str(data) in shown  # not JSON, too long


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": "{tmp}/none.jsonl"}, "none.jsonl: not found"),
        ({"data": "{tmp}/long.jsonl", "row_length": 32}, "long.jsonl:2: the prompt leaves no room"),
        ({"run_dir": "{tmp}/long.jsonl/run"}, "long.jsonl/run.*--run-dir"),
    ],
)
def test_what_cannot_work_is_said_before_the_slow_work_begins(tmp_path, monkeypatch, change, message):
    jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a" * 99, "response": "b"}] * 2)
    monkeypatch.setattr(stages, "perplexity", lambda *arguments: pytest.fail("the slow work began"))
    change = {name: v.format(tmp=tmp_path) if isinstance(v, str) else v for name, v in change.items()}
    settings = job.Settings(**{"data": str(tmp_path / "long.jsonl"), "run_dir": str(tmp_path / "run")} | change)
    settings = dataclasses.replace(settings, evaluate_base=False)
    with pytest.raises(GemmaLoraError, match=message):
        run(monkeypatch, settings)
    assert not (tmp_path / "run").exists()


def no_model(source, **named):
    raise GemmaLoraError(f"{source}: the model was asked for")


def test_a_finished_run_is_shown_again_and_not_made_again(finished, monkeypatch):
    monkeypatch.setattr(stages, "load_gemma", no_model)
    console = Console(file=io.StringIO(), width=200)
    assert job.finetune(finished.settings, console) == json.loads((finished.dir / "metrics.json").read_text())
    assert all(row["prompt"] in console.file.getvalue() for row in rows(5, 5))


def test_a_run_with_other_settings_is_kept(finished, monkeypatch):
    monkeypatch.setattr(stages, "load_gemma", no_model)
    before = (finished.dir / "metrics.json").read_bytes()
    with pytest.raises(GemmaLoraError, match="rank was 8, is 2.*--run-dir.*--overwrite"):
        job.finetune(dataclasses.replace(finished.settings, rank=2), Console(file=io.StringIO()))
    assert (finished.dir / "metrics.json").read_bytes() == before


def test_a_command_that_failed_at_once_can_be_mended_and_run_again(tmp_path, monkeypatch):
    """What never began to work holds no folder: neither a wrong path nor a wrong model."""
    monkeypatch.setattr(stages, "load_gemma", no_model)
    settings = job.Settings(data=str(tmp_path / "none.jsonl"), run_dir=str(tmp_path / "run"))
    with pytest.raises(GemmaLoraError, match="not found"):
        job.finetune(settings, Console(file=io.StringIO()))
    settings = dataclasses.replace(settings, data=str(jsonl(tmp_path / "there.jsonl", rows(4))))
    for model in ("wrong", "right"):
        with pytest.raises(GemmaLoraError, match=f"{model}: the model was asked for"):
            job.finetune(dataclasses.replace(settings, model=model), Console(file=io.StringIO()))
        assert not (tmp_path / "run").exists()


class Enough(Exception):
    """Raised where a test has seen what it came for."""


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Starts a job on some lines and stops it before anything is scored: gives its settings and what was shown."""

    def start(count, instruction_tuned=False, overwrite=False, **named):
        def load(source=None, **how):
            model = small_model()
            model.gemma_lora_instruction_tuned = instruction_tuned
            return model

        def before(model, dataset, tests, settings, console):
            seen.append((settings, dataset.template))
            raise Enough

        seen: list = []
        monkeypatch.setattr(stages, "load_gemma", load)
        monkeypatch.setattr(stages, "answers_before", before)
        data = jsonl(tmp_path / "lines.jsonl", rows(count))
        settings = job.Settings(data=str(data), run_dir=str(tmp_path / "run"), **named)
        console = Console(file=io.StringIO(), width=300)
        with pytest.raises(Enough):
            job.finetune(settings, console, overwrite=overwrite)
        ((settings, template),) = seen
        return settings, template, console.file.getvalue()

    return start


def test_fewer_lines_make_more_epochs_and_the_run_says_so(prepared, tmp_path):
    settings, _, shown = prepared(40)
    assert settings.epochs == 6 and "6 epochs, for there are" in shown and "--epochs" in shown
    written = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert written["epochs"] is None and written["chosen"]["epochs"] == 6
    settings, _, shown = prepared(40, epochs=2)
    assert settings.epochs == 2 and "--epochs" not in shown


def test_the_template_follows_the_weights_and_the_run_says_so(prepared):
    _, template, shown = prepared(40)
    assert template == Template.base() and "Template: '{prompt}\\n{response}<eos>' (the base model's" in shown
    _, template, shown = prepared(40, instruction_tuned=True, row_length=500)
    assert template == Template.gemma_chat() and "weights are instruction-tuned" in shown


def test_overwrite_begins_anew_and_leaves_what_is_not_the_runs(prepared, tmp_path):
    folder_ = tmp_path / "run"
    (folder_ / "adapter").mkdir(parents=True)
    mine = ["notes.txt", "adapter/notes.txt"]
    for name in (*mine, *folder.RUN_FILES, "adapter/adapter_config.json"):
        (folder_ / name).write_text("{}")
    prepared(40, rank=3, overwrite=True)
    left = sorted(str(path.relative_to(folder_)) for path in folder_.rglob("*") if path.is_file())
    assert left == sorted([*mine, "settings.json"])
    assert json.loads((folder_ / "settings.json").read_text())["rank"] == 3


def test_the_dtype_that_was_asked_for_is_loaded(monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "load_gemma", lambda source, **named: asked.append((source, named)))
    settings = job.Settings(model="x", dtype="bfloat16", quantization="nf4", double_quant=True)
    stages.load_model(settings, Console(file=io.StringIO()))
    assert asked == [("x", {"dtype": "bfloat16", "quantization": "nf4", "double_quant": True})]


def test_the_jobs_settings_are_the_projects():
    assert job_package.Settings is job.Settings is settings_module.Settings
    assert job_package.finetune is job.finetune and job_package.versions is job.versions


def test_the_jobs_defaults_are_finetuners_but_for_what_is_faster():
    defaults = {name: p.default for name, p in inspect.signature(FineTuner).parameters.items()}
    settings = dataclasses.asdict(job.Settings())
    shared = set(defaults) & set(settings) - {"run_dir", "model"}
    assert {name for name in shared if defaults[name] != settings[name]} <= {"mixed_precision"}


@pytest.mark.slow
def test_chats_with_a_few_answers_are_a_classification_with_its_picture_and_warnings(tmp_path, monkeypatch):
    def chat(number):
        turns = ["hi", "hello", f"{number}?", ["yes", "no"][number % 2]]
        return {"messages": [{"role": ["user", "assistant"][n % 2], "content": t} for n, t in enumerate(turns)]}

    data = tmp_path / "chats"
    data.mkdir()
    for name, count in {"train": 12, "validation": 4, "test": 6}.items():
        jsonl(data / f"{name}.jsonl", [chat(count + n) for n in range(count)])
    (data / "template.json").write_text(json.dumps(TEMPLATE))
    settings = job.Settings(data=str(data), run_dir=str(tmp_path / "run"), rank=2, epochs=1, row_length=64)
    asked: list = []
    answer = stages.answer

    def watched(model, prompts, *more, **named):
        asked.append((len(prompts), len(named["shots"]), named["separator"], named["max_new_tokens"]))
        return answer(model, prompts, *more, **named)

    monkeypatch.setattr(stages, "answer", watched)
    metrics, shown = run(monkeypatch, settings)
    assert asked == [(6, 4, "\n", 16), (6, 0, None, 16)]
    assert metrics["metric"] == "classification" and "Metric: classification (accuracy)" in shown
    after = metrics["after"]["test"]
    assert set(after["scores"]) == {"accuracy", "macro F1"} == set(metrics["difference"]["test"])
    assert sum(map(sum, after["confusion"]["counts"])) == 6
    assert (tmp_path / "run" / "confusion.png").exists() and "confusion.png" in shown
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["warnings"] == metrics["warnings"]
    for words in ("training step", "validation 4, test 6", "cut off"):  # an untrained model does not stop
        assert any(words in sentence for sentence in stored["warnings"]) and words in shown
    assert stored["lines"] == {"train": 12, "validation": 4}
    first = json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])
    assert [turn["content"] for turn in first["messages"]] == ["hi", "hello", "6?"] and first["after_cut"] is True
    # A run that was stopped takes the base's answers from before.json, and scores them anew.
    model, dataset = small_model(), job.load_dataset(str(data))
    resumed = dataclasses.replace(settings, metric="classification")
    before, _ = stages.answers_before(model, dataset, dataset.tests, resumed, Console(file=io.StringIO()))
    assert json.loads(json.dumps(before["test"].to_dict())) == stored["before"]["test"]
    assert len(asked) == 2
