"""benchmarks/encodings.py: its sizes are the arrays' and its losses those of `evaluation.perplexity`."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest

from gemma_lora.generation import evaluation
from gemma_lora.lora import qlora

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/encodings.json"


@pytest.fixture
def encodings(benchmark_script):
    return benchmark_script("encodings")


@pytest.fixture
def model(gemma, tokenizer):
    gemma.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
    return gemma


def test_sizes_count_every_variable_once_packed_or_not(encodings, model):
    plain = encodings.sizes(model)
    assert plain["linear_bits"] == plain["embedding_bits"] == 32
    assert plain["total_bytes"] == sum(variable.value.nbytes for variable in model.variables)
    qlora.quantize_base(model, "int8")
    packed = encodings.sizes(model)
    assert packed["linear_weights"] == plain["linear_weights"] and packed["other_bytes"] == plain["other_bytes"]
    assert packed["total_bytes"] == sum(variable.value.nbytes for variable in model.variables)
    assert 8 < packed["linear_bits"] < 12 and 8 < packed["embedding_bits"] < 12


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_block_losses_are_the_perplexitys(encodings, model, scheme):
    if scheme:
        qlora.quantize_base(model, scheme)
    text = "a text of some length, and a last window that is short"
    losses, tokens = encodings.block_losses(model, text, window=16, block=6)
    assert sum(tokens) == len(text) and max(tokens) == 6
    mean = float(np.average(losses, weights=tokens))
    assert math.isclose(math.exp(mean), evaluation.perplexity(model, text, window=16), rel_tol=1e-3)


def test_a_difference_is_paired_and_weighs_by_tokens(encodings):
    mean, error = encodings.difference([2.0, 3.0, 5.0], [1.0, 2.0, 4.0], [2, 2, 2])
    assert mean == 1 and error == 0  # the blocks differ much, their differences do not
    mean, _ = encodings.difference([2.0, 5.0], [1.0, 1.0], [3, 1])
    assert mean == (3 * 1 + 1 * 4) / 4


def test_the_stored_results_are_whole_and_consistent(encodings):
    record = json.loads(RESULTS.read_text())
    results = record["results"]
    assert list(results) == list(encodings.ENCODINGS) == list(record["settings"]["encodings"])
    for run in results.values():
        mean = float(np.average(run["block_losses"], weights=run["block_tokens"]))
        assert math.isclose(math.exp(mean), run["perplexity"], rel_tol=1e-3)
        assert run["total_bytes"] == run["linear_bytes"] + run["embedding_bytes"] + run["other_bytes"]
    assert results["nf4_double"]["linear_bits"] <= 4.13 < results["nf4"]["linear_bits"]
    assert record["note"] and record["machine"]["cores"] and record["versions"]["keras"]
