"""LoRA against Hugging Face PEFT on small random Gemmas: logits, gradients, 20 steps, merged weights."""

from itertools import chain, combinations

import keras
import numpy as np
import pytest
import torch
from peft import PeftModel

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.peft import save_adapter, slots
from gemma_lora.training import FineTuner
from tests.parity.conftest import tiny_transformers, to_keras_hub

SUBSETS = list(chain.from_iterable(combinations(lora.ALL_LINEAR, n) for n in range(1, len(lora.ALL_LINEAR) + 1)))


def with_random_adapter(model, targets, rslora=False, seed=0):
    """The model with LoRA of rank 3 whose A and B are both random."""
    gl.apply_lora(model, rank=3, alpha=5.0, targets=targets, rslora=rslora)
    rng = np.random.default_rng(seed)
    for layer in lora.lora_layers(model):
        layer.lora_a.assign(rng.normal(0, 0.3, layer.lora_a.shape))
        layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
    return model


def our_logits(model, token_ids):
    hidden = model.backbone({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    return np.asarray(model.backbone.token_embedding(hidden, reverse=True))


def their_logits(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor(token_ids.astype("int64"))).logits.numpy()


def assert_close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_bases_are_equal(pair, token_ids):
    theirs, ours = pair
    assert_close(our_logits(ours, token_ids), their_logits(theirs, token_ids))


@pytest.mark.parametrize("rslora", [False, True])
def test_logits_with_an_adapter_and_merged(pair, token_ids, rslora, tmp_path):
    theirs, ours = pair
    base = our_logits(ours, token_ids)
    with_random_adapter(ours, "all-linear", rslora)
    save_adapter(ours, tmp_path)
    expected = their_logits(PeftModel.from_pretrained(theirs, tmp_path), token_ids)
    assert_close(our_logits(ours, token_ids), expected)
    assert np.abs(base - expected).max() > 1e-2 * np.abs(expected).max()  # the adapter does something
    gl.merge_lora(ours)
    assert_close(our_logits(ours, token_ids), expected, 1e-4)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_every_subset_of_targets(generation, token_ids, tmp_path):
    """All 127 subsets: one model of each side, adapters put in and taken out."""
    theirs = tiny_transformers(generation)
    ours = to_keras_hub(theirs, generation)
    for number, targets in enumerate(SUBSETS):
        with_random_adapter(ours, targets, seed=number)
        save_adapter(ours, tmp_path)
        adapted = PeftModel.from_pretrained(theirs, tmp_path)
        assert_close(our_logits(ours, token_ids[:1]), their_logits(adapted, token_ids[:1]), 5e-5)
        theirs = adapted.unload()
        gl.detach_lora(ours)


def their_loss(model, batch):
    """Mean cross-entropy over the tokens of weight 1, in torch's own functions."""
    token_ids, targets, weights = (torch.tensor(np.asarray(x)) for x in batch)
    logits = model(token_ids.long()).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def batches(count):
    rng = np.random.default_rng(9)
    for _ in range(count):
        token_ids = rng.integers(3, 96, (3, 14)).astype("int32")
        weights = (rng.random((3, 14)) > 0.5).astype("float32")
        yield token_ids, np.roll(token_ids, -1, 1), weights


def their_parameters(adapted, ours):
    """`[(torch A, torch B)]` in the order of our LoRA layers."""
    named = dict(adapted.named_parameters())
    modules = [slot.module for slot in slots(ours) if isinstance(slot.layer, lora._LoRALayer)]
    return [[named[f"base_model.model.{m}.lora_{x}.default.weight"] for x in "AB"] for m in modules]


def test_gradients(pair, tmp_path):
    theirs, ours = pair
    with_random_adapter(ours, "all-linear", rslora=True)
    save_adapter(ours, tmp_path)
    adapted = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    batch = next(batches(1))
    their_loss(adapted, batch).backward()
    tuner = FineTuner(ours)
    tuner.compile(keras.optimizers.SGD(1.0))
    layers = [slot.layer for slot in slots(ours)]
    before = [(np.asarray(layer.lora_a), np.asarray(layer.lora_b)) for layer in layers]
    x = {"token_ids": batch[0], "padding_mask": np.ones_like(batch[0])}
    tuner.train_on_batch(x, batch[1], batch[2])
    largest = max(float(p.grad.abs().max()) for p in chain(*their_parameters(adapted, ours)))
    for layer, old, new in zip(layers, before, their_parameters(adapted, ours), strict=True):
        for variable, start, parameter in zip((layer.lora_a, layer.lora_b), old, new, strict=True):
            gradient = start - np.asarray(variable)  # an SGD step of rate 1
            np.testing.assert_allclose(gradient, parameter.grad.numpy().T, atol=5e-5 * largest)
    assert largest > 1e-3


def test_losses_over_twenty_steps(pair, tmp_path):
    theirs, ours = pair
    with_random_adapter(ours, "all-linear")
    save_adapter(ours, tmp_path)
    adapted = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2, eps=1e-7)
    tuner = FineTuner(ours)
    tuner.compile(keras.optimizers.Adam(1e-2, epsilon=1e-7))
    our_losses, their_losses = [], []
    for batch in batches(20):
        optimizer.zero_grad()
        loss = their_loss(adapted, batch)
        loss.backward()
        optimizer.step()
        their_losses.append(float(loss))
        x = {"token_ids": batch[0], "padding_mask": np.ones_like(batch[0])}
        our_losses.append(float(np.ravel(tuner.train_on_batch(x, batch[1], batch[2]))[0]))
        tuner.reset_metrics()
    np.testing.assert_allclose(our_losses, their_losses, rtol=2e-3)
    assert np.std(their_losses) > 1e-2
