"""Scores by hand, and perplexity against the loss written out."""

import numpy as np
import pytest

from gemma_lora import evaluation
from gemma_lora.formats import Example
from gemma_lora.templates import Template

REFERENCE = '{"date": "2024-07-12", "amount": "769.08"}'


@pytest.mark.parametrize(
    "answer, expected",
    [
        (REFERENCE, True),
        ('{"amount":"769.08","date":"2024-07-12"}', True),
        ('{"date": "2024-07-12", "amount": 769.08}', False),  # a number is not the text
        ('{"date": "2024-07-12", "amount": "769.08", "x": 1}', False),
        ('{"date": "2024-07-12"}', False),
        (REFERENCE + " and more", False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_exact_match_wants_every_field(answer, expected):
    assert evaluation.exact_match([answer], [REFERENCE]) == expected


def test_text_answers_are_compared_as_text():
    assert evaluation.exact_match([" yes\n", "no"], ["yes", "yes"]) == 0.5


def test_field_scores_by_hand():
    answers = ['{"date": "2024-07-12", "amount": "1"}', "nonsense", REFERENCE]
    scores = evaluation.field_scores(answers, [REFERENCE] * 3)
    assert scores == {"date": pytest.approx(2 / 3), "amount": pytest.approx(1 / 3)}


def test_unequal_lengths_are_an_error():
    with pytest.raises(ValueError, match="equally many"):
        evaluation.exact_match(["a"], ["a", "b"])


def test_few_shot_shows_the_examples_and_ends_at_the_line():
    template = Template("Q: {prompt}\nA:", " {response}<eos>")
    shown = evaluation.few_shot_template(template, [Example("one", "1"), Example("two", "2")])
    assert shown.prompt == "Q: one\nA: 1\nQ: two\nA: 2\nQ: {prompt}\nA:"
    assert shown.stop == ("<eos>", "\n")


def test_perplexity_is_the_exponential_of_the_mean(gemma, tokenizer):
    class Preprocessor:
        pass

    gemma.preprocessor = Preprocessor()
    gemma.preprocessor.tokenizer = tokenizer
    text = "a river bends and bends again"
    ids = tokenizer.tokenize(text)
    losses = []
    for start in range(0, len(ids), 8):
        window = ids[start : start + 8]
        x = {"token_ids": np.array([[2, *window[:-1]]]), "padding_mask": np.ones((1, len(window)), "int32")}
        logits = np.asarray(gemma.backbone(x))[0] @ np.asarray(gemma.backbone.token_embedding.embeddings).T
        logits = logits.astype("float64")
        losses += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(window)), window])
    assert evaluation.perplexity(gemma, text, window=8) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_english_text_is_there():
    assert 800 < len(evaluation.english_text().split()) < 1500
