"""benchmarks/rank_sweep.py: its teacher-forced exact match is that of greedy generation; its runs are what they say."""

import importlib.util
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import data, lora
from gemma_lora.templates import Template

SCRIPT = Path(__file__).parents[1] / "benchmarks/rank_sweep.py"
PLAIN = Template(prompt="{prompt}=", response="{response}")  # an answer without the token that ends it


@pytest.fixture
def sweep():
    spec = importlib.util.spec_from_file_location("rank_sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(gemma, tokenizer):
    gemma.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
    return gemma


def test_what_the_model_would_write_itself_matches_and_one_other_character_does_not(sweep, model):
    prompts = ["abc", "12 May", "x", "hello", "zz"]
    answers = gl.generate(model, prompts, PLAIN, max_new_tokens=6)
    own = [data.Example(p, a) for p, a in zip(prompts, answers, strict=True)]
    assert sweep.evaluate(model, own, PLAIN)["exact_match"] == 1
    for place in (0, 3, 5):
        other = [data.Example(e.prompt, e.response[:place] + "?" + e.response[place + 1 :]) for e in own]
        assert all("?" not in answer for answer in answers)
        assert sweep.evaluate(model, other, PLAIN) | {"loss": 0} == {"loss": 0, "exact_match": 0, "count": 5}
    mixed = [*own[:2], *other[2:]]
    assert sweep.evaluate(model, mixed, PLAIN)["exact_match"] == pytest.approx(2 / 5)


def test_the_loss_is_the_mean_over_answer_tokens_of_examples_alone(sweep, model, tokenizer):
    examples = [data.Example("abc", "de"), data.Example("x", "yzwv"), data.Example("12", "3")]
    losses = []
    for example in examples:  # one row an example, all logits, no packing
        ids = [tokenizer.token_to_id("<bos>"), *tokenizer.tokenize(example.prompt + "=" + example.response)]
        x = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
        logits = model.backbone(x)[0] @ model.backbone.token_embedding.embeddings.value.T
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        first = len(ids) - len(example.response)
        losses += [-np.log(probabilities[t - 1, ids[t]]) for t in range(first, len(ids))]
    assert sweep.evaluate(model, examples, PLAIN)["loss"] == pytest.approx(np.mean(losses), abs=2e-4)


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
