"""Scores by hand, and perplexity against the loss written out."""

import types

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template
from gemma_lora.generation import evaluation, likelihood
from gemma_lora.generation.evaluation import teacher_forced

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


@pytest.mark.slow
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


# --- teacher-forced ----------------------------------------------------------------------------------------

PLAIN = Template(prompt="{prompt}=", response="{response}")  # an answer without the token that ends it


@pytest.fixture
def model(gemma, tokenizer):
    gemma.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
    return gemma


@pytest.mark.slow
def test_what_the_model_would_write_itself_matches_and_one_other_character_does_not(model):
    prompts = ["abc", "12 May", "x", "hello", "zz"]
    answers = gl.generate(model, prompts, PLAIN, max_new_tokens=6)
    own = [Example(p, a) for p, a in zip(prompts, answers, strict=True)]
    assert teacher_forced(model, own, PLAIN).exact_match == 1
    for place in (0, 3, 5):
        other = [Example(e.prompt, e.response[:place] + "?" + e.response[place + 1 :]) for e in own]
        assert all("?" not in answer for answer in answers)
        scores = teacher_forced(model, other, PLAIN, row_length=20)
        assert (scores.exact_match, scores.count) == (0, 5)
    mixed = [*own[:2], *other[2:]]
    assert teacher_forced(model, mixed, PLAIN).exact_match == pytest.approx(2 / 5)


@pytest.mark.slow
def test_the_loss_is_the_mean_over_answer_tokens_of_examples_alone(model, tokenizer):
    examples = [Example("abc", "de"), Example("x", "yzwv"), Example("12", "3")]
    losses = []
    for example in examples:  # one row an example, all logits, no packing
        ids = [tokenizer.token_to_id("<bos>"), *tokenizer.tokenize(example.prompt + "=" + example.response)]
        x = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
        logits = model.backbone(x)[0] @ model.backbone.token_embedding.embeddings.value.T
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        first = len(ids) - len(example.response)
        losses += [-np.log(probabilities[t - 1, ids[t]]) for t in range(first, len(ids))]
    assert teacher_forced(model, examples, PLAIN).loss == pytest.approx(np.mean(losses), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_rows_scored_together_score_as_alone(model, monkeypatch, rows):
    prompts = ["abc", "12 May", "x", "hello", "zz"]
    answers = gl.generate(model, prompts, PLAIN, max_new_tokens=6)
    given = [answer if n % 2 else "bc" + "d" * n for n, answer in enumerate(answers)]
    examples = [Example(prompt, answer) for prompt, answer in zip(prompts, given, strict=True)]
    scores = {}
    for number in (1, rows):
        monkeypatch.setattr(likelihood, "_ROWS", number)
        scores[number] = teacher_forced(model, examples, PLAIN, row_length=14)  # hardly two in a row
    assert scores[rows].exact_match == scores[1].exact_match == 2 / 5
    assert scores[rows].count == 5 and scores[rows].loss == pytest.approx(scores[1].loss, abs=1e-5)
