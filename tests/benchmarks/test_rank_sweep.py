"""benchmarks/rank_sweep.py: its runs are what their names say."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.data.templates import Template

PLAIN = Template(prompt="{prompt}=", response="{response}")  # an answer without the token that ends it


@pytest.fixture
def sweep(benchmark_script):
    return benchmark_script("rank_sweep")


@pytest.fixture
def model(gemma, tokenizer):
    gemma.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
    return gemma


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank-4-qv", "rank-4-all", "rate-full-0.0005"])
def test_a_run_trains_what_its_name_says(sweep, model, name):
    lines = [{"prompt": f"a{i}", "response": f"b{i % 7}"} for i in range(60)]
    before = [np.asarray(v.value) for v in model.backbone.variables]
    result = sweep.train(model, gl.load_dataset(lines, template=PLAIN), sweep.RUNS[name])
    if name == "rate-full-0.0005":
        moved = [np.any(old != jnp.asarray(v)) for old, v in zip(before, model.backbone.variables, strict=True)]
        assert all(moved) and result["trained_parameters"] == sum(old.size for old in before)
        return
    layers = lora.lora_layers(model)
    assert {layer.rank for layer in layers} == {4} and {layer.alpha for layer in layers} == {32}
    assert len(layers) == 2 * (7 if name.endswith("all") else 2)
    assert result["trained_parameters"] == sum(4 * sum(layer.matrix_shape()) for layer in layers)
    assert len(result["losses"]) == result["steps"] > 0
    assert len(sweep.spectra(model)["directions_for_90_percent"]) == len(layers)
