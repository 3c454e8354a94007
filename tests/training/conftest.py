"""Small trainings: a Gemma of one block, lines of one word, arrays whose weights differ from row to row."""

import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.templates import Template
from gemma_lora.training import FineTuner
from tests.conftest import CharacterTokenizer, tiny_gemma

WORDS = ("red", "green", "blue", "black", "white", "violet")


def small_gemma(rank=2, **named):
    """One block, LoRA with a B that is not zero (so that A moves from the first step on), a tokenizer."""
    model = tiny_gemma(layers=1)
    model.preprocessor = type("Preprocessor", (), {"tokenizer": CharacterTokenizer()})()
    with_lora(model, rank, **named)
    return model


def with_lora(model, rank=2, **named):
    lora.apply_lora(model, rank=rank, targets="all-linear", seed=3, **named)
    for number, layer in enumerate(lora.lora_layers(model)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.1, layer.lora_b.shape))


def small_tuner(model=None, **named):
    settings = {"rows": 1, "row_length": 48, "learning_rate": 1e-3, **named}
    return FineTuner(small_gemma() if model is None else model, **settings)


def weights_of(tuner):
    return [np.asarray(v) for v in tuner.trainable_variables]


def assert_alike(ours, theirs, atol=2e-6):
    for one, other in zip(weights_of(ours), weights_of(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def moved(tuner, start):
    return [bool(np.any(now != then)) for now, then in zip(weights_of(tuner), start, strict=True)]


def arrays(examples=10, length=12, seed=0):
    """`(x, y, sample_weight)` in KerasHub's form; a row of the first half carries four times the second's weight."""
    rng = np.random.default_rng(seed)
    x = {
        "token_ids": rng.integers(5, 300, (examples, length)).astype("int32"),
        "padding_mask": np.ones((examples, length), "int32"),
    }
    limits = np.where(np.arange(examples) < examples // 2, 0.2, 0.8)[:, None]
    weights = (rng.random((examples, length)) > limits).astype("float32")
    return x, rng.integers(5, 300, (examples, length)).astype("int32"), weights


def part(data, start, stop):
    x, y, weights = data
    return {name: array[start:stop] for name, array in x.items()}, y[start:stop], weights[start:stop]


@pytest.fixture
def lines():
    records = [{"prompt": f"say {word} {number}", "response": word} for number in range(3) for word in WORDS]
    return load_dataset(records, template=Template("{prompt}:", "{response}<eos>"))
