"""Probabilities of labels, and losses of answers, against KerasHub's own model token by token."""

import types

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template
from gemma_lora.gemma.forward import forward
from gemma_lora.generation import classify as module
from gemma_lora.generation import likelihood
from gemma_lora.generation.evaluation import evaluate, reference_losses
from gemma_lora.generation.likelihood import answer_losses
from tests.conftest import CharacterTokenizer, tiny_gemma

TEMPLATE = Template("{prompt}=", "{response}<eos>")
LABELS = ["in", "in t", "i", "out"]  # some begin others
PROMPTS = ["abc", "where is my parcel", "x", "12 May 2024, late"]


def with_tokenizer(model):
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    embeddings = model.backbone.token_embedding.embeddings
    embeddings.assign(0.4 * embeddings)  # so that one character more is not hopeless
    return model


@pytest.fixture
def model(any_gemma):
    return with_tokenizer(any_gemma)


def log_probability(model, before, answer):
    """ln p(answer | before), one row, all logits, in float64."""
    ids = np.zeros((1, 48), np.int32)  # one shape: Keras compiles each operation once
    ids[0, : len(before) + len(answer)] = [*before, *answer]
    hidden = np.asarray(model.backbone({"token_ids": ids, "padding_mask": ids > 0})[0], np.float64)
    embedding = model.backbone.token_embedding
    logits = hidden @ np.asarray(embedding.embeddings, np.float64).T
    if cap := getattr(embedding, "logit_soft_cap", None):
        logits = cap * np.tanh(logits / cap)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = range(len(before) - 1, len(before) + len(answer) - 1)
    return sum(logits[place, token] for place, token in zip(places, answer, strict=True))


def ids_of(text):
    return CharacterTokenizer().tokenize(text)


def by_hand(model, texts, labels, stop="<eos>"):
    tokenizer = CharacterTokenizer()
    end = [tokenizer.token_to_id(stop)]
    logits = [
        [log_probability(model, [tokenizer.token_to_id("<bos>"), *ids_of(t)], ids_of(label) + end) for label in labels]
        for t in texts
    ]
    shares = np.exp(np.array(logits) - np.max(logits, axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


@pytest.mark.slow
def test_probabilities_are_those_of_the_model_token_by_token(model):
    found = gl.classify(model, PROMPTS, LABELS, TEMPLATE)
    assert found.shape == (4, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    expected = by_hand(model, [f"{prompt}=" for prompt in PROMPTS], LABELS)
    np.testing.assert_allclose(found, expected, rtol=5e-3)  # also where a label is two characters longer


@pytest.fixture
def small():
    return with_tokenizer(tiny_gemma(3))


@pytest.mark.slow
def test_neither_packing_nor_order_nor_groups_of_labels_change_a_probability(small, monkeypatch):
    found = gl.classify(small, PROMPTS, LABELS, TEMPLATE)
    back = gl.classify(small, PROMPTS[::-1], LABELS[::-1], TEMPLATE)
    np.testing.assert_allclose(back[::-1, ::-1], found, rtol=1e-3)
    np.testing.assert_allclose(gl.classify(small, PROMPTS[1], LABELS, TEMPLATE), found[1:2], rtol=1e-3)
    monkeypatch.setattr(module, "_LABEL_TOKENS", 5)
    np.testing.assert_allclose(gl.classify(small, PROMPTS, LABELS, TEMPLATE), found, rtol=1e-3)


@pytest.mark.slow
def test_the_stop_is_scored_where_the_template_has_none(small):
    bare = Template("{prompt}=", "{response}")
    np.testing.assert_allclose(
        gl.classify(small, PROMPTS, LABELS, bare), gl.classify(small, PROMPTS, LABELS, TEMPLATE), atol=1e-6
    )


@pytest.mark.slow
def test_a_chat_is_asked_with_its_history(small):
    turns = (("user", "hi"), ("model", "yes"), ("user", "and now"), ("model", "out"))
    chat = [{"role": role, "content": text} for role, text in turns[:-1]]
    (found,) = gl.classify(small, [chat], LABELS, TEMPLATE)
    (same,) = gl.classify(small, Example("and now", "out", turns=turns), LABELS, TEMPLATE)
    (alone,) = gl.classify(small, ["and now"], LABELS, TEMPLATE)
    np.testing.assert_allclose(found, same, atol=1e-6)
    assert np.abs(np.log(found / alone)).max() > 0.05


@pytest.mark.slow
def test_it_is_compiled_once(small, monkeypatch):
    traced = []
    monkeypatch.setattr(likelihood, "forward", lambda *args: traced.append(1) or forward(*args))
    prompts = [f"{'ab' * (n % 7)} number {n}" for n in range(70)]
    likelihood._branch_scores.clear_cache()
    rows = gl.classify(small, prompts, LABELS, TEMPLATE)
    assert rows.shape == (70, 4) and len(traced) == 1


@pytest.mark.parametrize("labels", [[], ["one"], "yes", ["a", ""], ["a", " "], ["a", 1], ["a", "b", "a"]])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(ValueError, match="`labels` must"):
        gl.classify(None, ["x"], labels)


# --- the loss of answers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_of_a_chat_is_that_of_its_last_answer(small):
    chat = Example("c", "yes", turns=(("user", "a"), ("model", "b"), ("user", "c"), ("model", "yes")))
    lines = [Example("abc", "de"), chat, Example("x", "yzwv" * 5)]
    found = reference_losses(small, lines, TEMPLATE)
    tokenizer = small.preprocessor.tokenizer
    bos, eos = ([tokenizer.token_to_id(name)] for name in ("<bos>", "<eos>"))
    prompts = [bos + ids_of("abc="), bos + ids_of("a=b") + eos + ids_of("\nc="), bos + ids_of("x=")]
    for line, prompt, example in zip(found, prompts, lines, strict=True):
        assert line.tokens == len(example.response) + 1
        assert line.loss == pytest.approx(-log_probability(small, prompt, ids_of(example.response) + eos), abs=1e-3)
    scores = evaluate(small, lines, TEMPLATE, metric="loss")
    assert scores.value == pytest.approx(sum(line.loss for line in found) / sum(line.tokens for line in found))
    assert scores.answers == [] and scores.count == 3


@pytest.mark.slow
def test_without_chats_the_loss_is_teacher_forcings(small):
    prompts = ["abc", "12 May", "x"]
    own = gl.generate(small, prompts, Template("{prompt}=", "{response}"), max_new_tokens=6)
    lines = [Example(p, a if n else "zz") for n, (p, a) in enumerate(zip(prompts, own, strict=True))]
    plain = Template("{prompt}=", "{response}")
    expected, found = gl.teacher_forced(small, lines, plain), evaluate(small, lines, plain, metric="loss")
    assert found.value == pytest.approx(expected.loss, abs=1e-5)
    assert found.exact_match == expected.exact_match == pytest.approx(2 / 3)


def test_no_prompts_are_no_work():
    assert answer_losses(None, [], []) == []
