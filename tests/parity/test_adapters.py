"""LoRA and DoRA against Hugging Face PEFT on small random Gemmas: logits, gradients, 20 steps, merged weights."""

from itertools import chain, combinations

import keras
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.exchange.peft import load_adapter, save_adapter, slots
from gemma_lora.training.tuner import FineTuner
from tests.parity.conftest import tiny_transformers, to_keras_hub

KINDS = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]
SUBSETS = list(chain.from_iterable(combinations(lora.ALL_LINEAR, n) for n in range(1, len(lora.ALL_LINEAR) + 1)))


def with_random_adapter(model, targets, seed=0, **kind):
    """The model with LoRA of rank 3 whose A and B, and DoRA's magnitudes, are all random."""
    gl.apply_lora(model, rank=3, alpha=5.0, targets=targets, **kind)
    rng = np.random.default_rng(seed)
    for layer in lora.lora_layers(model):
        layer.lora_a.assign(rng.normal(0, 0.3, layer.lora_a.shape))
        layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
        if layer.dora:
            layer.magnitude.assign(np.asarray(layer.magnitude) * rng.uniform(0.5, 1.5, layer.magnitude.shape))
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


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_with_an_adapter_and_merged(pair, token_ids, kind, tmp_path):
    theirs, ours = pair
    base = our_logits(ours, token_ids)
    with_random_adapter(ours, "all-linear", **kind)
    save_adapter(ours, tmp_path)
    adapted = PeftModel.from_pretrained(theirs, tmp_path)
    expected = their_logits(adapted, token_ids)
    assert_close(our_logits(ours, token_ids), expected)
    assert np.abs(base - expected).max() > 1e-2 * np.abs(expected).max()  # the adapter does something
    gl.merge_lora(ours)
    assert_close(our_logits(ours, token_ids), expected, 1e-4)
    merged = dict(adapted.merge_and_unload().named_parameters())
    for slot in slots(ours):
        assert_close(np.asarray(slot.layer.whole_matrix()).T, merged[f"{slot.module}.weight"].detach().numpy())
    gl.unmerge_lora(ours)
    assert_close(our_logits(ours, token_ids), expected, 1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_that_peft_wrote(pair, token_ids, dora, tmp_path):
    """PEFT's names and configuration, with PEFT's own start of the magnitudes moved."""
    theirs, ours = pair
    modules = sorted({slot.module.rsplit(".", 1)[1] for slot in slots(ours)})
    config = LoraConfig(r=3, lora_alpha=5, target_modules=modules, use_dora=dora, task_type="CAUSAL_LM")
    adapted = get_peft_model(theirs, config)
    if dora:  # where a new adapter starts
        gl.apply_lora(ours, rank=3, targets="all-linear", dora=True)
        for (a, b, magnitude), slot in zip(their_parameters(adapted, ours), slots(ours), strict=True):
            assert not b.any() and a.any()
            np.testing.assert_allclose(slot.layer.magnitude, magnitude.detach().numpy(), rtol=1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert {layer.dora for layer in lora.lora_layers(ours)} == {dora} and len(lora.lora_layers(ours)) == 14
    assert_close(our_logits(ours, token_ids), their_logits(adapted.eval(), token_ids))


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_every_subset_of_targets(generation, token_ids, tmp_path):
    """All 127 subsets, every third with DoRA: one model of each side, adapters put in and taken out."""
    theirs = tiny_transformers(generation)
    ours = to_keras_hub(theirs, generation)
    for number, targets in enumerate(SUBSETS):
        with_random_adapter(ours, targets, seed=number, dora=number % 3 == 0)
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
    """`[(torch A, torch B)]`, with DoRA `[(A, B, magnitude)]`, in the order of our LoRA layers."""
    named = dict(adapted.named_parameters())
    found = []
    for slot in slots(ours):
        if isinstance(slot.layer, lora.LoRALayer):
            what = ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if slot.layer.dora else 2]
            found.append([named[f"base_model.model.{slot.module}.{name}.default.weight"] for name in what])
    return found


def trained_arrays(layer):
    return [layer.lora_a, layer.lora_b, *([layer.magnitude] if layer.dora else [])]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients(pair, kind, tmp_path):
    theirs, ours = pair
    with_random_adapter(ours, "all-linear", **kind)
    save_adapter(ours, tmp_path)
    adapted = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    batch = next(batches(1))
    their_loss(adapted, batch).backward()
    tuner = FineTuner(ours)
    tuner.compile(keras.optimizers.SGD(1.0))
    layers = [slot.layer for slot in slots(ours)]
    before = [[np.asarray(variable) for variable in trained_arrays(layer)] for layer in layers]
    x = {"token_ids": batch[0], "padding_mask": np.ones_like(batch[0])}
    tuner.train_on_batch(x, batch[1], batch[2])
    largest = max(float(p.grad.abs().max()) for p in chain(*their_parameters(adapted, ours)))
    for layer, old, new in zip(layers, before, their_parameters(adapted, ours), strict=True):
        for variable, start, parameter in zip(trained_arrays(layer), old, new, strict=True):
            gradient = start - np.asarray(variable)  # an SGD step of rate 1
            np.testing.assert_allclose(gradient, parameter.grad.numpy().T, atol=5e-5 * largest)
    assert largest > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_losses_over_twenty_steps(pair, dora, tmp_path):
    theirs, ours = pair
    with_random_adapter(ours, "all-linear", dora=dora)
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


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_pefts(training):
    """One layer with the same inputs dropped on both sides."""
    rng = np.random.default_rng(5)
    x, mask = rng.normal(size=(6, 7)).astype("float32"), 2.0 * rng.integers(0, 2, (6, 7)).astype("float32")
    inner = torch.nn.Linear(7, 9)
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, use_dora=True, target_modules=["0"])
    adapted = get_peft_model(torch.nn.Sequential(inner), config).train(training)
    theirs = adapted.base_model.model[0]
    dense = keras.layers.Dense(9)
    dense.build((None, 7))
    dense.kernel.assign(inner.weight.detach().numpy().T)
    dense.bias.assign(inner.bias.detach().numpy())
    ours = lora.LoRADense(dense, rank=3, alpha=5, dropout=0.5, dora=True)

    class Mask(torch.nn.Module):
        def forward(self, inputs):
            return inputs * torch.tensor(mask) if self.training else inputs

    theirs.lora_dropout["default"] = Mask().train(training)
    ours.dropout = lambda inputs, training: inputs * mask if training else inputs
    with torch.no_grad():
        for parameter, variable in zip(
            (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight), (ours.lora_a, ours.lora_b), strict=True
        ):
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
            variable.assign(parameter.numpy().T)
        theirs.lora_magnitude_vector["default"].weight.mul_(1.3)
        ours.magnitude.assign(theirs.lora_magnitude_vector["default"].weight.numpy())
        expected = adapted(torch.tensor(x)).numpy()
    assert_close(ours(x, training=training), expected)
