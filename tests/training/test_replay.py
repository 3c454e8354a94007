"""Replay: so many tokens of the base's own text as were asked for, other ones in each epoch, and less forgetting."""

import keras
import numpy as np
import pytest

from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.encoding import Encoded
from gemma_lora.gemma.forward import hidden_states
from gemma_lora.generation.base_text import _stored, base_text
from gemma_lora.lora.apply import apply_lora
from gemma_lora.training import FineTuner
from gemma_lora.training.replay import default_share, with_replay
from tests.conftest import CharacterTokenizer, tiny_gemma

LINES = Encoded([np.arange(10), np.arange(20)], [np.arange(10) > 6, np.arange(20) > 12])
TEXTS = [np.full(8, number) for number in range(5)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_the_share_is_of_all_tokens_and_the_lines_stay_as_they_are(share):
    mixed = with_replay(LINES, TEXTS, share)
    assert all(one is other for one, other in zip(mixed.tokens, LINES.tokens, strict=False))
    added = mixed.tokens[2:]
    replayed = sum(map(len, added))
    assert abs(replayed - share / (1 - share) * 30) <= 4 or len(added) == 1
    assert all(mask.tolist() == [False] + [True] * 7 for mask in mixed.loss_mask[2:])
    assert bool(added) == (share > 0)


def test_each_epoch_goes_on_in_the_texts_and_begins_again_at_their_end():
    firsts = [[int(text[0]) for text in with_replay(LINES, TEXTS, 0.5, epoch).tokens[2:]] for epoch in range(3)]
    assert firsts == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


def test_long_texts_are_cut_to_a_row():
    assert {len(text) for text in with_replay(LINES, TEXTS, 0.5, most=6).tokens[2:]} == {6}


@pytest.mark.parametrize(
    ("texts", "share", "message"), [(TEXTS, 1.0, "below 1"), (TEXTS, -0.1, "at least 0"), ([], 0.1, "at least one")]
)
def test_what_cannot_be_mixed_is_refused(texts, share, message):
    with pytest.raises(ValueError, match=message):
        with_replay(LINES, texts, share)


def test_one_pass_has_none_by_default():
    assert [default_share(epochs) for epochs in (1, 2, 6)] == [0.0, 0.1, 0.1]


def test_the_stored_texts_are_tokens_of_gemma_without_control_tokens():
    texts = _stored()
    assert len(texts) > 90 and len({tuple(text) for text in texts}) == len(texts)
    assert all(text[0] == 2 and min(text[1:]) > 5 and max(text) < 262_144 for text in texts)


@pytest.fixture(scope="module")
def lines():
    words = ("red", "green", "blue", "black")
    return load_dataset([{"prompt": f"say {word}", "response": word} for word in words], on_notice=lambda notice: None)


def with_tokenizer(model):
    model.preprocessor = type("Preprocessor", (), {"tokenizer": CharacterTokenizer()})()
    return model


@pytest.mark.slow
def test_base_text_is_drawn_from_the_model_and_depends_on_the_seed_alone():
    model = with_tokenizer(tiny_gemma(layers=1))
    one, again, other = (base_text(model, count=3, length=6, seed=seed) for seed in (1, 1, 2))
    assert all(text[0] == 2 and 2 <= len(text) <= 6 for text in one)
    assert [t.tolist() for t in one] == [t.tolist() for t in again] != [t.tolist() for t in other]


@pytest.mark.slow
def test_a_model_with_replay_stays_nearer_to_what_it_was(lines):
    """The KL divergence from the base, on text of the base's own that was not replayed."""
    distances = {}
    for name in ("without", "with"):
        model = with_tokenizer(tiny_gemma(layers=1))
        texts = base_text(model, count=300, length=16, seed=0)
        held = np.zeros((8, 16), "int32")
        for row, text in zip(held, base_text(model, count=8, length=16, seed=9), strict=False):
            row[: len(text)] = text
        before = _log_probabilities(model, held)
        apply_lora(model, rank=8, seed=0)
        tuner = FineTuner(model, rows=1, row_length=64, learning_rate=0.01, mixed_precision=False)
        replay = {"replay": texts, "replay_share": 0.9} if name == "with" else {}
        history = tuner.fit(lines, epochs=40, verbose=0, validation_data=False, **replay)
        assert len(history.epoch) == 40
        after = _log_probabilities(model, held)
        distances[name] = float(np.mean(np.sum(np.exp(before) * (before - after), axis=-1)))
    assert 0 <= distances["with"] < 0.5 * distances["without"]


@pytest.mark.slow
def test_replay_is_said_before_it_is_trained_on(lines, capsys):
    for share in (0.25, 0.0):
        model = with_tokenizer(tiny_gemma(layers=1))
        apply_lora(model, rank=2, seed=0)
        tuner = FineTuner(model, rows=1, row_length=64, mixed_precision=False)
        tuner.fit(
            lines, epochs=1, validation_data=False, replay=base_text(model, count=4, length=8), replay_share=share
        )
        assert ("Replay: 25 % of the tokens" in capsys.readouterr().out) == bool(share)


def _log_probabilities(model, tokens):
    logits = hidden_states(model, tokens) @ model.backbone.token_embedding.embeddings.value.T
    return np.asarray(keras.ops.log_softmax(logits, axis=-1))
