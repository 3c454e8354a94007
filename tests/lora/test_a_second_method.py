"""A LoRA-like method is one module (`vera.py`): training, remat, mixed precision, packed bases, generation."""

from pathlib import Path

import keras
import numpy as np
import pytest

from gemma_lora.gemma.forward import hidden_states
from gemma_lora.generation.engine import generate_tokens
from gemma_lora.lora import adapt, quantize_base
from gemma_lora.training.tuner import FineTuner
from tests.conftest import tiny_gemma
from tests.lora.vera import VeRA

X = {"token_ids": np.random.default_rng(0).integers(6, 300, (2, 12)), "padding_mask": np.ones((2, 12), "int32")}
Y = np.random.default_rng(1).integers(6, 300, (2, 12))


def test_it_is_short():
    lines = Path(__file__).with_name("vera.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "nf4"])
@pytest.mark.parametrize("named", [{}, {"remat": True}, {"mixed_precision": True}])
def test_it_is_trained_and_answers(scheme, named):
    model = tiny_gemma(3)
    if scheme:
        quantize_base(model, scheme)
    before = np.asarray(hidden_states(model, X["token_ids"]))
    adapt(model, lambda layer, number: VeRA(layer, seed=number), "all-linear")
    np.testing.assert_allclose(hidden_states(model, X["token_ids"]), before, atol=1e-5)  # g is zero
    assert len(model.trainable_variables) == 2 * 7 * 2
    tuner = FineTuner(model, **({"mixed_precision": False} | named))
    tuner.compile(keras.optimizers.Adam(0.05))
    losses = [float(np.ravel(tuner.train_on_batch(X, Y))[0]) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    ours = np.asarray(hidden_states(model, X["token_ids"]))
    np.testing.assert_allclose(ours, model.backbone(X), atol=2e-5)
    assert np.abs(ours - before).max() > 1e-3
    (answer,) = generate_tokens(model, [X["token_ids"][0, :5]], [1], 4)
    logits = ours[0, 4] @ np.asarray(model.backbone.token_embedding.embeddings).T
    assert not len(answer) or answer[0] == logits.argmax()
