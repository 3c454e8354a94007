"""Packed examples have the hidden states, loss and gradient they have alone."""

import itertools

import jax
import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.data.packing import _fullest, pack
from gemma_lora.gemma.forward import hidden_states
from gemma_lora.layers.loss import chunked_cross_entropy


def examples(count=9, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(5, 300, rng.integers(4, 14)).astype("int32") for _ in range(count)]
    masks = [np.arange(len(t)) >= rng.integers(1, len(t) - 1) for t in tokens]
    return tokens, masks


def test_every_example_stands_in_one_row_whole():
    tokens, masks = examples(40)
    batches = pack(tokens, masks, rows=3, row_length=20, seed=4)
    found = []
    for batch in batches:
        for row in range(3):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                places = np.flatnonzero(batch.segment_ids[row] == segment)
                assert (np.diff(places) == 1).all()
                assert (batch.token_ids[row, places][1:] == batch.targets[row, places][:-1]).all()
                found.append((*batch.token_ids[row, places], batch.targets[row, places[-1]]))
    assert sorted(found) == sorted(map(tuple, tokens))
    assert sum(b.weights.sum() for b in batches) == sum(m[1:].sum() for m in masks)


def test_too_long_an_example_is_an_error():
    with pytest.raises(ValueError, match="row_length"):
        pack([np.arange(9)], [np.ones(9, bool)], rows=2, row_length=7)
    (batch,) = pack([np.arange(9)], [np.ones(9, bool)], rows=1, row_length=8)  # the last token is a target only
    np.testing.assert_array_equal(batch.targets[0], np.arange(1, 9))


def test_rows_are_as_full_as_any_choice_of_examples_makes_them():
    rng = np.random.default_rng(7)
    for _ in range(50):
        lengths, room = rng.integers(1, 20, 8).tolist(), int(rng.integers(20, 60))
        chosen = _fullest(lengths, room)
        fills = [
            sum(lengths[i] for i in (0, *others)) for n in range(8) for others in itertools.combinations(range(1, 8), n)
        ]
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert sum(lengths[i] for i in chosen) == max(fill for fill in fills if fill <= room)


def test_hardly_a_place_is_empty():
    """Lines as long as the expenses': five of them hardly fit into 384 places, and four leave a fifth empty."""
    rng = np.random.default_rng(8)
    lengths = np.clip(rng.normal(77, 8, 500).round(), 55, 110).astype(int)
    batches = pack([np.zeros(n, "int32") for n in lengths], [np.ones(n, bool) for n in lengths], 1, 384, seed=0)
    assert len(batches) <= 1.01 * -(-sum(lengths - 1) // 384)


@pytest.mark.slow
def test_packed_loss_and_gradient_equal_those_alone(any_gemma):
    tokens, masks = examples()
    lora.apply_lora(any_gemma, rank=2, targets="all-linear")
    for number, layer in enumerate(lora.lora_layers(any_gemma)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.2, layer.lora_b.shape))
    variables = any_gemma.trainable_variables
    cap = any_gemma.backbone.token_embedding.logit_soft_cap

    def summed(values, x, targets, weights):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            hidden = hidden_states(any_gemma, x["token_ids"], x["padding_mask"])
            embeddings = any_gemma.backbone.token_embedding.embeddings.value
        return chunked_cross_entropy(hidden, embeddings, targets, weights, 8, cap) * weights.sum()

    run = jax.jit(jax.value_and_grad(summed))
    values = [v.value for v in variables]
    packed, alone = [], []
    for batch in pack(tokens, masks, rows=2, row_length=24, seed=0):
        packed.append(run(values, *batch.as_keras()))
    for ids, mask in zip(tokens, masks, strict=True):
        behind = (0, 14 - len(ids))  # padding, so that one program does for all lengths
        padding_mask = np.pad(np.ones(len(ids) - 1, "int32"), behind)[None]
        x = {"token_ids": np.pad(ids[:-1], behind)[None], "padding_mask": padding_mask}
        weights = np.pad(mask[1:].astype("float32"), behind)[None]
        alone.append(run(values, x, np.pad(ids[1:], behind)[None], weights))
    total = jax.tree.map(lambda *parts: sum(parts), *packed)
    expected = jax.tree.map(lambda *parts: sum(parts), *alone)
    np.testing.assert_allclose(total[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(total[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.slow
def test_gradients_are_those_of_keras_hubs_own_model(any_gemma):
    """Mask, attention, norms, rotations and activation of ours, value and gradient by every weight."""
    ids = np.arange(20).reshape(2, 10) + 5
    padding = np.ones((2, 10), "int32")
    padding[1, 6:] = 0
    backbone = any_gemma.backbone
    variables = backbone.trainable_variables

    def both(hidden_of):
        def hidden(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return hidden_of() * (padding > 0)[..., None]

        values = [v.value for v in variables]
        return hidden(values), *jax.jit(jax.grad(lambda values: (hidden(values) ** 2).sum()))(values)

    ours = both(lambda: hidden_states(any_gemma, ids, padding))
    theirs = both(lambda: backbone({"token_ids": ids, "padding_mask": padding}))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, float(np.abs(other).max())))
