"""Memory arithmetic against KerasHub's counts, the papers' numbers, real layers, and measured peaks."""

import json
from pathlib import Path

import pytest

from gemma_lora import lora
from gemma_lora.gemma import memory
from tests.conftest import tiny_gemma

MEASURED = Path(__file__).parents[2] / "benchmarks/results/peak_memory.json"
GEMMA_270M = memory.CONFIGURATIONS["gemma3_270m"]


@pytest.mark.parametrize("name", [name for name in memory.CONFIGURATIONS if name.startswith("gemma")])
def test_counts_are_those_that_kerashub_states_for_its_presets(name):
    from gemma_lora.gemma.load import import_keras_hub

    hub = import_keras_hub()
    backbone = hub.models.Gemma3Backbone if name.startswith("gemma3") else hub.models.GemmaBackbone
    assert memory.parameters(memory.CONFIGURATIONS[name]) == backbone.presets[name]["metadata"]["params"]


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_backbones_configuration_counts_its_parameters_and_loras(generation):
    model = tiny_gemma(generation, layers=3)
    configuration = memory.configuration_of(model.backbone)
    assert memory.parameters(configuration) == model.backbone.count_params()
    for dora in (False, True):
        lora.apply_lora(model, rank=3, targets=("key", "down"), dora=dora)
        counted = sum(v.value.size for v in model.trainable_variables)
        assert memory.lora_parameters(configuration, 3, ("key", "down"), dora) == counted
        lora.detach_lora(model)


def test_all_linear_layers_are_loras():
    model = tiny_gemma(3)
    configuration = memory.configuration_of(model.backbone)
    assert lora.ALL_LINEAR == tuple(configuration.matrices())
    lora.apply_lora(model, rank=2, targets="all-linear")
    shapes = [layer.matrix_shape() for layer in lora.lora_layers(model)]
    assert sorted(shapes) == sorted([*configuration.matrices().values()] * configuration.layers)
    assert memory.linear_parameters(configuration) == sum(a * b for a, b in shapes)


def test_the_lora_papers_counts_for_gpt_3():
    gpt = memory.CONFIGURATIONS["gpt3_175b"]
    assert round(memory.parameters(gpt) / 1e9) == 175
    # Hu et al. 2021, table 4: 4.7 and 37.7 million, LoRA on query and value.
    assert round(memory.lora_parameters(gpt, 1, ("query", "value")) / 1e6, 1) == 4.7
    assert round(memory.lora_parameters(gpt, 8, ("query", "value")) / 1e6, 1) == 37.7


def test_full_fine_tuning_of_a_number_costs_sixteen_bytes_in_float32():
    plan = memory.plan(GEMMA_270M, "full", accelerator=True)
    each = (plan.weights + plan.gradients + plan.optimizer) / memory.parameters(GEMMA_270M)
    assert each == 16 and plan.trainable == memory.parameters(GEMMA_270M)


def test_nf4_with_double_quantization_is_4_127_bits_a_linear_weight():
    plan = memory.plan(GEMMA_270M, "qlora", rank=1, targets="query")
    linear, embedding = memory.linear_parameters(GEMMA_270M), GEMMA_270M.vocabulary * GEMMA_270M.width
    others = memory.parameters(GEMMA_270M) - linear - embedding
    adapter = memory.lora_parameters(GEMMA_270M, 1, "query")
    bits = 8 * (plan.weights - embedding - 4 * (others + adapter)) / linear
    bits += 8 * (plan.constants - 4 * GEMMA_270M.vocabulary) / linear
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-6)


def test_parts_grow_with_what_they_depend_on():
    def parts(**named):
        return memory.plan(GEMMA_270M, **named).parts()

    base, more_rows = parts(), parts(rows=3)
    assert more_rows["activations"] == 3 * base["activations"] and more_rows["weights"] == base["weights"]
    assert parts(rank=32)["optimizer"] == 2 * base["optimizer"] == 2 * parts(rank=32)["gradients"]
    assert parts(dtype="bfloat16")["activations"] == base["activations"] // 2
    assert parts(remat=True)["activations"] < 0.2 * base["activations"]
    assert parts(full_logits=True)["logits"] == 3 * 4 * 384 * 262_144
    assert parts(accelerator=True)["process"] == 0
    plan = memory.plan(GEMMA_270M)
    assert plan.total == sum(plan.parts().values())


@pytest.mark.parametrize("method", memory.METHODS)
def test_dora_adds_a_magnitude_a_norm_and_an_activation_for_each_output(method):
    plain, dora = (memory.plan(GEMMA_270M, method, targets=("query", "down"), dora=flag) for flag in (False, True))
    outputs = 0 if method == "full" else 18 * (4 * 256 + 640)
    assert dora.trainable - plain.trainable == outputs
    assert dora.weights - plain.weights == dora.optimizer - plain.optimizer == 2 * 4 * outputs
    assert dora.activations - plain.activations == 4 * outputs * 384
    assert dora.total - plain.total == (2 + 2 + 1 + 384) * 4 * outputs


@pytest.mark.parametrize("remat", [False, True])
def test_the_most_rows_fit_and_one_more_does_not(remat):
    rows = memory.most_rows(GEMMA_270M, 6 * 10**9, remat=remat)
    assert memory.plan(GEMMA_270M, rows=rows, remat=remat).total <= 6 * 10**9
    assert memory.plan(GEMMA_270M, rows=rows + 1, remat=remat).total > 6 * 10**9
    assert memory.most_rows(GEMMA_270M, 10**9) == 0


@pytest.mark.parametrize("text, size", [("16GB", 16e9), ("7.5 GiB", 7.5 * 2**30), ("800mb", 8e8), ("16", 16e9)])
def test_sizes_are_read(text, size):
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "0GB", "-1GB", "1 XB", "GB", "1e3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="such as 16GB"):
        memory.parse_bytes(text)


@pytest.mark.parametrize(
    "named, said",
    [
        ({"method": "dora"}, "method='dora'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"quantization": "nf5"}, "quantization='nf5'"),
        ({"rank": 0}, "rank=0"),
        ({"rows": 1.5}, "rows=1.5"),
        ({"targets": "queries"}, "targets='queries'"),
        ({"targets": ()}, "targets"),
    ],
)
def test_bad_arguments(named, said):
    with pytest.raises(ValueError, match=said):
        memory.plan(GEMMA_270M, **named)


RESULTS = json.loads(MEASURED.read_text())["results"] if MEASURED.is_file() else {}


@pytest.mark.parametrize("name", RESULTS)
def test_the_sum_is_within_15_percent_of_the_measured_peak(name):
    result = RESULTS[name]
    computed = memory.plan(GEMMA_270M, **result["setting"]).total
    assert abs(computed / result["peak_bytes"] - 1) < 0.15


def test_peaks_were_measured():
    assert len(RESULTS) >= 6


def test_a_target_named_twice_counts_once():
    configuration = GEMMA_270M
    once = memory.lora_parameters(configuration, 4, ("query", "down"))
    assert memory.lora_parameters(configuration, 4, ("down", "query", "down")) == once
    assert memory.target_names(configuration, ["down", "query", "down"]) == ("query", "down")
