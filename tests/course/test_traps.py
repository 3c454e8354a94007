"""The traps are there on the pinned versions, and each is seen to be mended where the library is made to do right.

`make latest` leaves this file out: on newer releases a mended trap is news, not a failure.
"""

import io
import types

import keras
import numpy as np
import pytest
from rich.console import Console

from gemma_lora.course import traps
from gemma_lora.gemma.forward import hidden_states


@pytest.mark.slow
@pytest.mark.parametrize("name", list(traps.TRAPS))
def test_the_trap_is_still_there(name):
    assert traps.TRAPS[name].still_there() is True


def test_every_trap_says_where_and_what():
    assert len(traps.TRAPS) >= 15
    for name, trap in traps.TRAPS.items():
        assert trap.name == name and trap.where and trap.what and trap.still_there.__doc__


# --- a mended library is seen ------------------------------------------------------------------------------


def test_mended_lora_freezes_the_rest(monkeypatch):
    enable = keras.layers.Dense.enable_lora
    model = traps.tiny_network()

    def enable_and_freeze(self, *args, **named):
        for layer in model.layers:
            layer.trainable = layer is self
        self.bias.trainable = False
        enable(self, *args, **named)

    monkeypatch.setattr(keras.layers.Dense, "enable_lora", enable_and_freeze)
    monkeypatch.setattr(traps, "tiny_network", lambda *args: model)
    assert not traps.the_rest_is_trained()


def test_a_mended_loss_divides_by_the_weights(monkeypatch):
    loss = keras.losses.SparseCategoricalCrossentropy
    monkeypatch.setattr(
        keras.losses,
        "SparseCategoricalCrossentropy",
        lambda **named: loss(**named, reduction="mean_with_sample_weight"),
    )
    assert not traps.the_mean_counts_padding()


def test_a_mended_initializer_draws_anew(monkeypatch):
    seeds = keras.random.SeedGenerator(1)
    he = keras.initializers.HeUniform
    monkeypatch.setattr(keras.initializers, "HeUniform", lambda: he(seed=seeds))
    assert not traps.one_initializer_twice()


def test_a_mended_backbone_keeps_examples_apart(monkeypatch):
    small = traps.tiny_gemma

    def mended():
        model = small()

        def backbone(x):
            return hidden_states(model, x["token_ids"], x["padding_mask"])

        return types.SimpleNamespace(backbone=backbone)

    monkeypatch.setattr(traps, "tiny_gemma", mended)
    assert not traps.packed_rows_leak()


def test_a_mended_adam_moves_in_bfloat16(monkeypatch):
    adam = keras.optimizers.Adam
    monkeypatch.setattr(keras.optimizers, "Adam", lambda rate: adam(rate, beta_2=0.99))  # 0.99 is not 1 in bfloat16
    assert not traps.adam_stands_still_in_bfloat16()


def test_a_refusal_counts_as_mended(monkeypatch):
    def refuses(*args, **named):
        raise ValueError("no layer is named vlaue")

    import keras_hub

    monkeypatch.setattr(keras_hub.models.Gemma3Backbone, "enable_lora", refuses)
    assert not traps.a_misspelt_target()


# --- the table ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_traps(monkeypatch):
    """One that is mended and one whose library is gone."""

    def gone():
        raise AttributeError("module 'keras' has no attribute 'quantizers'\nmore")

    few = {
        "one": traps.Trap("one", "keras.one", "does one thing", lambda: False),
        "two": traps.Trap("two", "keras.two", "does another", gone),
        "three": traps.Trap("three", "keras.three", "does a third", lambda: True),
    }
    monkeypatch.setattr(traps, "TRAPS", few)
    return few


def test_the_table_tells_what_is_mended_and_what_cannot_be_tried(two_traps, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=written, width=200))
    assert traps.main([]) == 0
    text = written.getvalue()
    assert f"keras {keras.__version__}" in text
    assert "mended" in text and "still there" in text
    assert (
        "cannot be tried: AttributeError: module 'keras' has no attribute 'quantizers'" in text and "more" not in text
    )


def test_news_is_asked_for(two_traps):
    assert traps.main(["--news"]) == 0
    del two_traps["one"], two_traps["two"]
    assert traps.main(["--news"]) == 1


def test_small_things_are_the_same_each_time():
    one, other = (traps.tiny_gemma().get_weights() for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    tokenizer = traps.tiny_tokenizer()
    assert tokenizer.vocabulary_size() <= 96
    assert tokenizer.detokenize(tokenizer("The sum: 2+2= ")) == "The sum: 2+2= "
