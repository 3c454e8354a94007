"""byte_model.py: the split by paragraphs, the model's causality, its loss against numpy, and that training trains."""

import sys

import keras
import numpy as np
import pytest

from gemma_lora.course.byte_model import (
    HELD_OUT,
    _rotated,
    bits_per_byte,
    byte_transformer,
    read_topics,
    train,
    write_on,
)
from gemma_lora.course.transformer import rotary_embedding
from gemma_lora.layers.bitnet import BitLinear, NormLinear


@pytest.fixture(scope="module")
def texts():
    return read_topics()


def small(kind=NormLinear, **changed):
    return byte_transformer(kind, **({"width": 16, "blocks": 2, "heads": 2, "context": 16} | changed))


def paragraphs(text):
    return [" ".join(p.split()) for p in bytes(text).decode().split("\n\n")]


# --- the text ----------------------------------------------------------------------------------------------


def test_no_paragraph_stands_twice(texts):
    every = [p for part in texts.values() for p in paragraphs(part)]
    assert len(every) == len(set(every)) and all(every)


def test_without_the_care_held_out_paragraphs_would_be_in_the_training_text():
    from pydoc_data.topics import topics

    def of(names):
        return {" ".join(p.split()) for name in names for p in topics[name].split("\n\n")} - {""}

    held = of(HELD_OUT["validation"] + HELD_OUT["test"])
    assert held & of(topics.keys() - set(HELD_OUT["validation"] + HELD_OUT["test"]))


def test_the_parts_are_the_topics(texts):
    assert list(texts) == ["train", "validation", "test"] and all(t.dtype == np.uint8 for t in texts.values())
    assert all(15_000 < len(texts[part]) < len(texts["train"]) / 5 for part in ("validation", "test"))
    assert bytes(texts["test"]).decode().startswith("Mapping Types")


# --- the model ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NormLinear, BitLinear])
def test_a_byte_is_predicted_from_earlier_ones_only(kind):
    model, rng = small(kind), np.random.default_rng(0)
    text = rng.integers(0, 256, (1, 16)).astype("int32")
    changed = text.copy()
    changed[0, 9:] = rng.integers(0, 256, 7)
    one, other = np.asarray(model(text)), np.asarray(model(changed))
    assert one.shape == (1, 16, 256)
    assert np.allclose(one[:, :9], other[:, :9], atol=1e-5) and not np.allclose(one[:, 9:], other[:, 9:], atol=1e-3)


def test_both_kinds_start_from_the_same_weights_and_another_seed_from_others():
    twin, bitnet, other = small(), small(BitLinear), small(seed=1)
    pairs = list(zip(twin.get_weights(), bitnet.get_weights(), other.get_weights(), strict=True))
    assert all(np.array_equal(a, b) for a, b, _ in pairs)
    kernels = [(a, c) for a, _, c in pairs if a.ndim == 2]
    assert len(kernels) == 9 and not any(np.array_equal(a, c) for a, c in kernels)
    assert len({a.tobytes() for a, _ in kernels}) == 9  # no two layers alike


def test_the_order_of_bytes_matters():
    model = small(blocks=1)
    text = np.arange(16, dtype="int32")[None]
    swapped = text.copy()
    swapped[0, [2, 9]] = text[0, [9, 2]]  # without positions the last byte would see the same set of bytes
    assert not np.allclose(model(text)[0, -1], model(swapped)[0, -1], atol=1e-4)


def test_positions_are_rotary():
    x = np.random.default_rng(0).normal(size=(2, 9, 3, 8)).astype("float32")
    wanted = [rotary_embedding(text) for text in x]
    assert np.allclose(_rotated(x), wanted, atol=1e-5)


def test_the_layers_are_those_asked_for():
    model = small(BitLinear, blocks=3)
    shapes = [layer.kernel.shape for layer in model.layers if isinstance(layer, BitLinear)]
    assert shapes == [(16, 48), (16, 16), (16, 64), (64, 16)] * 3


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`heads` must divide `width`.*width=12, heads=4"):
        byte_transformer(NormLinear, width=12)


# --- training and measuring --------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_lowers_the_loss_and_two_runs_agree(texts):
    seen, runs = [], []
    for _ in range(2):
        model = small(BitLinear)
        losses = train(model, texts["train"], 40, 1e-2, batch=8, seed=3, after_step=lambda *done: seen.append(done))
        runs.append(losses)
    assert seen == [*enumerate(runs[0], start=1), *enumerate(runs[1], start=1)]
    assert losses[0] > 7.5 and losses[-5:].mean() < 5.5
    assert np.allclose(*runs, atol=1e-4)


@pytest.mark.slow
def test_the_first_step_is_a_step_of_adam(texts):
    """Adam's first step moves each weight by the learning rate, with the gradient's sign."""
    model = small()
    before = [w.copy() for w in model.get_weights()]
    train(model, texts["train"], 1, 1e-3)
    moved = np.concatenate([(b - a).ravel() for a, b in zip(before, model.get_weights(), strict=True)])
    assert np.isclose(np.abs(moved).max(), 1e-3, rtol=1e-2)


@pytest.mark.slow
def test_bits_per_byte_is_the_mean_over_windows_side_by_side():
    model, text = small(), np.random.default_rng(1).integers(0, 256, 16 * 5 + 9).astype("uint8")
    total = 0.0
    for start in range(0, 80, 16):
        logits = np.asarray(model(text[None, start : start + 16].astype("int32")), float)[0]
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        chances = odds / odds.sum(-1, keepdims=True)
        total -= np.log2(chances[np.arange(16), text[start + 1 : start + 17]]).sum()
    assert np.isclose(bits_per_byte(model, text, batch=2), total / 80, rtol=1e-5)


def test_a_text_shorter_than_a_window_is_named():
    with pytest.raises(ValueError, match="`text` must be longer than a window of 16 bytes.*16 bytes"):
        train(small(), np.zeros(16, "uint8"), 1, 1e-3)
    with pytest.raises(ValueError, match="`text` must be longer than a window of 16 bytes.*16 bytes"):
        bits_per_byte(small(), np.zeros(16, "uint8"))


def test_a_model_sure_of_itself_writes_what_it_is_sure_of():
    class Next(keras.layers.Layer):
        def call(self, x):
            return 100 * keras.ops.one_hot((x + 1) % 256, 256)

    model = keras.Sequential([keras.Input((4,), dtype="int32"), Next()])
    assert write_on(model, "abc", 6) == "abcdefghi"


@pytest.mark.slow
def test_nothing_here_imports_tensorflow():
    import os
    import subprocess

    script = (
        "import sys; sys.modules['tensorflow'] = None\n"  # importing it would fail
        "from gemma_lora.layers.bitnet import BitLinear, freeze_model\nfrom gemma_lora import byte_model as b\n"
        "text = b.read_topics()['train'][:500]\n"
        "m = b.byte_transformer(BitLinear, width=8, blocks=1, heads=2, context=8)\n"
        "b.train(m, text, 1, 1e-3); b.bits_per_byte(freeze_model(m), text); b.write_on(m, 'a', 1)"
    )
    env = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
