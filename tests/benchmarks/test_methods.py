"""benchmarks/methods.py, learning_curve.py and scaling.py: each run trains what its name says."""

import dataclasses
import json
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.data.templates import Template
from gemma_lora.lora import houlsby as adapters
from gemma_lora.lora import qlora

PLAIN = Template(prompt="{prompt}=", response="{response}")
LINES = [{"prompt": f"a{i}", "response": f"b{i % 7}"} for i in range(60)]


@pytest.fixture
def methods(benchmark_script):
    return benchmark_script("methods")


@pytest.fixture
def loading(monkeypatch, gemma, tokenizer):
    """`load_gemma` gives a tiny Gemma, packed if that is asked for; GGUF blocks come from a file only."""

    def load(quantization=None, double_quant=False):
        gemma.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
        return gemma if quantization is None else qlora.quantize_base(gemma, quantization, double_quant) or gemma

    monkeypatch.setattr(gl, "load_gemma", load)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["full", "lora_qv_4", "dora_all", "rslora_all", "houlsby", "int8_keras", "nf4_dq", "int4"]
)
def test_a_method_trains_what_its_name_says(methods, loading, method):
    model = methods.prepared(method, seed=0)
    named = [variable.path.rsplit("/", 1)[-1] for variable in model.trainable_variables]
    settings = methods.METHODS[method]
    layers = lora.lora_layers(model)
    if method == "full":
        assert len(named) == len(model.backbone.weights)
    elif method == "houlsby":
        assert len(adapters.adapter_layers(model)) == 4 and not layers
    elif method == "int8_keras":
        assert set(named) == {"lora_kernel_a", "lora_kernel_b"} and len(named) == 2 * 14
        assert any(variable.dtype == "int8" for variable in model.variables)
    else:
        assert len(layers) == 2 * (7 if settings["lora"]["targets"] == "all-linear" else 2)
        assert {layer.rank for layer in layers} == {settings["lora"]["rank"]}
        assert {(layer.dora, layer.rslora) for layer in layers} == {(method == "dora_all", method == "rslora_all")}
        assert len(qlora.packed_layers(model)) == (14 if "quantization" in settings else 0)
    before = [np.asarray(variable.value) for variable in model.variables]
    result = methods.trained(model, gl.load_dataset(LINES, template=PLAIN), 1e-3, seed=0, limit=60)
    assert len(result["losses"]) > 0 and np.all(np.isfinite(result["losses"]))
    assert result["trained_parameters"] == sum(variable.value.size for variable in model.trainable_variables)
    moved = {v.path for old, v in zip(before, model.variables, strict=True) if np.any(old != jnp.asarray(v.value))}
    assert moved <= {v.path for v in model.trainable_variables} and moved


@pytest.mark.slow
def test_a_run_is_scored_on_the_way_with_the_weights_of_that_step(methods, loading, monkeypatch):
    from gemma_lora.generation import evaluation

    model = methods.prepared("lora_all", seed=0)
    dataset = dataclasses.replace(gl.load_dataset(LINES, template=PLAIN), validation=gl.load_dataset(LINES).train[:9])
    seen = []

    def teacher_forced(model, examples, template, row_length):
        seen.append(sum(float(abs(layer.lora_b.value).sum()) for layer in lora.lora_layers(model)))
        return evaluation.TeacherForced(0.0, len(seen) / 10, len(examples))

    monkeypatch.setattr(evaluation, "teacher_forced", teacher_forced)
    monkeypatch.setattr(methods, "ROW_LENGTH", 32)
    result = methods.trained(model, dataset, 1e-2, seed=0, limit=60, on_the_way=(20, 40))
    assert result["validation_on_the_way"] == {"20": 0.1, "40": 0.2}
    assert 0 < seen[0] != seen[1]
    final = sum(float(abs(layer.lora_b.value).sum()) for layer in lora.lora_layers(model))
    assert final not in seen


def test_several_runs_at_once_give_their_results_in_order(benchmark_script):
    one_process = benchmark_script("one_process")
    assert one_process.at_once(3, lambda a, b: a * b, [(1, 2), (3, 4), (5, 6), (7, 8)]) == [2, 12, 30, 56]


def test_a_run_without_a_result_is_told_and_costs_the_others_nothing(benchmark_script, monkeypatch):
    one_process = benchmark_script("one_process")
    monkeypatch.setattr(one_process, "measure", lambda script, n, quiet: None if n == "1" else {"n": n})
    kept = {}
    runs = [(f"run{n}", [str(n)]) for n in range(3)]
    assert not one_process.measure_all("a.py", runs, kept.__setitem__, jobs=2)
    assert kept == {"run0": {"n": "0"}, "run2": {"n": "2"}}
    assert one_process.measure_all("a.py", runs[::2], kept.__setitem__)


IN_TURNS = """
import sys, time
sys.path.insert(0, {folder!r})
import one_process
log, (name, pieces) = open({log!r}, "a"), sys.argv[1:]
def note(what):
    log.write(f"{{what}} {{name}}\\n")
    log.flush()
for piece in range(int(pieces)):
    note("starts")
    time.sleep(0.05)
    note("stops")
    one_process.pass_turn()
if name == "c":
    raise SystemExit("no result from c")
one_process.report({{"name": name}})
"""


@pytest.mark.slow
def test_what_is_compared_works_in_turns_and_never_two_at_once(benchmark_script, tmp_path, capsys):
    one_process = benchmark_script("one_process")
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(IN_TURNS.format(folder=os.path.dirname(one_process.__file__), log=str(log)))
    runs = [("a", ["a", "3"]), ("b", ["b", "1"]), ("c", ["c", "2"])]
    assert one_process.measure_in_turns(str(script), runs) == {"a": {"name": "a"}, "b": {"name": "b"}}
    assert "c failed" in (told := capsys.readouterr().err) and "no result from c" in told
    order = ["a", "b", "c", "a", "c", "a"]
    assert log.read_text().split("\n")[:-1] == [f"{what} {name}" for name in order for what in ("starts", "stops")]
    log.unlink()
    assert one_process.measure(str(script), "a", "2") == {"name": "a"}  # alone it waits for nobody


def test_named_runs_are_listed_and_made_where_they_are_missing(benchmark_script, monkeypatch, tmp_path, capsys):
    named_runs = benchmark_script("named_runs")
    import one_process

    output = tmp_path / "made.json"
    output.write_text(json.dumps({"runs": {"b": {"loss": 2}}}))
    monkeypatch.setattr(one_process, "measure", lambda script, *arguments, quiet: {"loss": 1, "told": arguments})

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["made.py", "--output", str(output), *arguments])
        return named_runs.main("made.py", "", {"a": 1, "b": 2, "c": 3}, lambda name: {}, lambda result: "kept")

    assert command("--list", "--only", "a", "b") == 0 and capsys.readouterr().out.split() == ["a", "b", "(done)"]
    assert command("--only", "a", "b") == 0 and capsys.readouterr().out == "a kept\n"
    runs = json.loads(output.read_text())["runs"]
    assert list(runs) == ["a", "b"] and runs == {"a": {"loss": 1, "told": ["--one", "a"]}, "b": {"loss": 2}}


def test_a_variant_changes_what_its_name_says(benchmark_script):
    settings = benchmark_script("settings")
    assert settings.changed() == settings.BASE
    assert settings.VARIANTS["rank 64, rate 0.002"]["lora"] == {"rank": 64, "targets": "all-linear"}
    assert settings.VARIANTS["rank 64, rate 0.002"]["tuner"]["learning_rate"] == 2e-3
    assert settings.VARIANTS["600 lines twice"] == settings.BASE | {"lines": 600, "repeat": 2}
    values = [repr(variant) for variant in settings.VARIANTS.values()]
    assert len(set(values)) == len(values)


def test_a_rate_is_chosen_when_all_its_method_has_are_there(methods):
    rates = methods.METHODS["lora_all"]["rates"]
    runs = {
        methods.name_of("rate", "lora_all", rate): {"rate": rate, "validation_loss": loss}
        for rate, loss in zip(rates, (0.3, 0.1, 0.2, 0.4), strict=True)
    }
    assert methods.best_rate(runs, "lora_all") == rates[1]
    runs[methods.name_of("rate", "lora_all", rates[1])] = {"rate": rates[1], "failed": "NaN"}
    assert methods.best_rate(runs, "lora_all") == rates[2]
    assert methods.best_rate(dict(list(runs.items())[:2]), "lora_all") is None
    assert methods.best_rate({name: {"failed": "NaN"} for name in runs}, "lora_all") is None


def test_rates_come_before_what_they_are_chosen_for(methods):
    plan = methods.planned()
    assert len(set(plan)) == len(plan)
    for place, (kind, method, _) in enumerate(plan):
        if kind == "final":
            rates = {value for kind, name, value in plan[:place] if (kind, name) == ("rate", method)}
            assert rates == set(methods.METHODS[method]["rates"])


def test_long_runs_are_mixed_on_cpus_where_that_is_fast(methods, monkeypatch):
    from gemma_lora.base import hardware

    for fast in (True, False):
        monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda fast=fast: fast)
        assert methods.is_mixed("final", "nf4_dq") is fast and methods.is_mixed("same", "nf4_dq") is fast
        assert methods.is_mixed("mixed", "lora_all")
        assert not methods.is_mixed("final", "full") and not methods.is_mixed("final", "int8_keras")
        assert not methods.is_mixed("rate", "nf4_dq") and not methods.is_mixed("time", "nf4_dq")
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda: True)
    assert not methods.is_mixed("final", "nf4_dq")


def test_a_larger_set_of_lines_holds_the_smaller_ones_of_its_seed(benchmark_script):
    curve = benchmark_script("learning_curve")
    small, large, other = (curve.chosen_lines(list(range(100)), n, seed) for n, seed in ((10, 1), (50, 1), (10, 2)))
    assert large[:10] == small != other and len(set(large)) == 50


@pytest.mark.slow
def test_a_smaller_vocabulary_changes_no_hidden_state(benchmark_script, gemma):
    scaling = benchmark_script("scaling")
    small = scaling.with_vocabulary(gemma, 64)
    ids = np.random.default_rng(0).integers(0, 64, (1, 9))
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    np.testing.assert_array_equal(np.asarray(small.backbone(x)), np.asarray(gemma.backbone(x)))
    assert small.backbone.token_embedding.embeddings.shape[0] == 64
    assert scaling.with_vocabulary(gemma, gemma.backbone.vocabulary_size) is gemma
