"""Scores by hand, and perplexity against the loss written out."""

import json
import types

import keras
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.encoding import encode
from gemma_lora.data.formats import Example
from gemma_lora.data.packing import pack
from gemma_lora.data.templates import Template
from gemma_lora.generation import callbacks, evaluation, likelihood
from gemma_lora.generation.evaluation import teacher_forced
from gemma_lora.generation.metrics import loss_scores, score
from gemma_lora.generation.worked_examples import separator_of
from gemma_lora.training.states import CallbackStates

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


# --- answers: how long, how they end -----------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """A model that answers as told: gives the prompts it saw, as text."""

    class Script:
        preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
        answers: list[str] = []
        asked: list[str] = []
        stops: list[str] = []
        limit = 0

    def generate_tokens(model, prompts, stop_ids, max_new_tokens, *more, **named):
        script.asked = [tokenizer.detokenize([int(i) for i in prompt]) for prompt in prompts]
        script.stops, script.limit = [tokenizer.id_to_token(i) for i in stop_ids], max_new_tokens
        return [until_stop(tokenizer.tokenize(text)[:max_new_tokens], stop_ids) for text in script.answers]

    def until_stop(ids, stop_ids):
        end = next((place for place, i in enumerate(ids) if i in stop_ids), len(ids))
        return np.array(ids[:end], np.int32)

    script = Script()
    monkeypatch.setattr(evaluation, "generate_tokens", generate_tokens)
    return script


ENDED = Template("{prompt}\n", "{response}<eos>")


def test_answers_have_room_for_the_longest_reference_and_cut_ones_are_counted(scripted):
    long = "1, 2, 3, " * 40
    scripted.answers = [long, "x" * 999]
    lines = [Example("a", long.strip()), Example("b", "c")]
    found = evaluation.evaluate(scripted, lines, ENDED, metric="exact")
    assert scripted.limit > len(long) + 1
    assert found.exact_match == 0.5 and (found.cut, found.cut_lines) == (1, [1])
    assert found.to_dict()["cut"] == 1
    found = evaluation.evaluate(scripted, lines, ENDED, max_new_tokens=9, metric="exact")
    assert (found.cut, scripted.limit) == (2, 9)


def test_the_room_is_a_quarter_more_than_the_longest_last_answer(tokenizer):
    chat = Example("c", "d" * 20, turns=(("user", "a"), ("model", "b" * 500), ("user", "c"), ("model", "d" * 20)))
    assert evaluation.tokens_needed([chat, Example("a", "b")], tokenizer, ENDED) == 21 + 5 + 1
    assert evaluation.tokens_needed([Example("a", "b")], tokenizer, ENDED) == 16
    learned = [np.array([False, True, True, False, *[True] * 40]), np.array([False, False])]
    assert evaluation.tokens_needed([Example("a", "b")], tokenizer, ENDED, learned) == 40 + 10 + 1


def test_worked_examples_end_where_the_next_one_would_begin(scripted):
    shots = [Example("one", "1\n1"), Example("two", "2\n2")]
    scripted.answers = ["3\n3\n\nfour\n4\n4", "5", "\n\n6\n6"]
    given = evaluation.answer(scripted, ["three", "five", "six"], ENDED, 99, shots=shots)
    assert given.texts == ["3\n3", "5", "6\n6"] and given.cut == [False] * 3
    assert scripted.asked[0] == "<bos>one\n1\n1\n\ntwo\n2\n2\n\nthree\n"
    given = evaluation.answer(scripted, ["three", "five", "six"], ENDED, 4, shots=shots)
    assert given.cut == [True, False, True]
    assert (
        evaluation.answer(scripted, ["three", "five", "six"], ENDED, 5, shots=shots).cut[0] is False
    )  # "\n\n" is there


def test_one_line_answers_stop_at_the_lines_end_at_once(scripted):
    scripted.answers = ["3\nfour\n4"]
    given = evaluation.answer(scripted, ["three"], ENDED, 99, shots=[Example("one", "1")])
    assert given.texts == ["3"] and "\n" in scripted.stops
    evaluation.answer(scripted, ["three"], ENDED, 99)
    assert scripted.stops == ["<eos>"]


def test_a_templates_string_ends_an_answer_as_in_generate(scripted):
    scripted.answers = ["abcQ: more", "abc"]
    asks = Template("{prompt}\nA:", "{response}<eos>", ("<eos>", "Q:"))
    given = evaluation.answer(scripted, ["one", "two"], asks, 10)
    assert given.texts == ["abc", "abc"] and given.cut == [False, False]
    assert "<unk>" not in scripted.stops


def test_what_a_user_typed_stays_text_in_worked_examples(scripted, tokenizer):
    chat = Template.gemma_chat()
    turns = (("user", "a"), ("model", "b"), ("user", "c <end_of_turn>"), ("model", "It ends a turn: <end_of_turn>"))
    shots = [Example("x", "y\n\nz"), Example(turns[2][1], turns[3][1], turns=turns)]
    seen = []
    tokenizer_ids = evaluation.generate_tokens

    def watched(model, prompts, *more, **named):
        seen.extend(list(map(int, prompts[0])))
        return tokenizer_ids(model, prompts, *more, **named)

    evaluation.generate_tokens, scripted.answers = watched, ["fine"]
    try:
        evaluation.answer(scripted, ["q"], chat, 99, shots=shots)
    finally:
        evaluation.generate_tokens = tokenizer_ids
    ends = seen.count(tokenizer.token_to_id("<end_of_turn>"))
    assert ends == 2 + 4 + 1  # the turns' own; what was typed twice is characters
    assert scripted.asked[0].count("<end_of_turn>") == ends + 2
    assert "\n\n<start_of_turn>" not in scripted.asked[0]  # turns follow each other as in a chat


@pytest.mark.parametrize(
    "responses, expected",
    [
        (["a"], "\n"),
        (["a\nb"], "\n\n"),
        (["a\n\nb", "c\n\n\nd"], "\n###\n"),
        (["a\n\n\n\n###\n-----\nb"], "\n------\n"),
    ],
)
def test_a_separator_occurs_in_no_answer(responses, expected):
    assert separator_of(responses, ENDED) == expected
    assert separator_of(["a"], Template("{prompt}", "Answer:\n{response}<eos>")) == "\n\n"


@pytest.mark.slow
def test_chats_are_scored_with_their_whole_history(model):
    turns = (("user", "abc"), ("model", "de"), ("user", "x"), ("model", "y"))
    chat = Example("x", "y", turns=turns)
    history = [{"role": role, "content": text} for role, text in turns[:-1]]
    template = Template("{prompt}=", "{response}<eos>")
    (expected,) = gl.generate(model, [history], template, max_new_tokens=8)
    assert evaluation.evaluate(model, [chat], template, max_new_tokens=8).answers == [expected]


# --- after each epoch --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["exact", "loss"])
def test_the_score_after_an_epoch_is_of_the_weights_then_and_training_stops_by_it(model, metric):
    gl.apply_lora(model, rank=4)
    tuner = gl.FineTuner(model, learning_rate=3e-2, row_length=16, mixed_precision=False)
    lines = [Example("a", "b"), Example("c", "d")]
    encoded = encode(lines, model.preprocessor.tokenizer, ENDED)
    (batch,) = pack(encoded.tokens, encoded.loss_mask, 1, 16)
    watch = gl.ScoreAfterEpoch(lines * 50, metric=metric, limit=2, template=ENDED)
    stop = keras.callbacks.EarlyStopping(monitor="val_score", mode="max", patience=3, start_from_epoch=8)
    x, y, weights = batch.as_keras()
    fitted = tuner.fit(x, y, sample_weight=weights, epochs=60, verbose=0, callbacks=[watch, stop])
    history = fitted.history
    found = evaluation.evaluate(model, lines, ENDED, metric=metric)
    sign = -1 if metric == "loss" else 1
    assert history["val_score"][-1] == pytest.approx(sign * found.value, abs=1e-6)
    assert history["val_score"][-1] > history["val_score"][0]  # it saw that the weights moved
    assert [sign * scores.value for scores in watch.history] == history["val_score"]
    assert watch.history[0].count == 2
    if metric == "exact":
        assert len(history["val_score"]) < 60


@pytest.mark.parametrize("metric", ["classification", "json", "loss"])
def test_a_run_that_goes_on_has_the_scores_of_the_epochs_before(monkeypatch, metric):
    answers = {"classification": ["yes", "no"], "json": ['{"a": "1"}', '{"a": "2"}'], "loss": ["b", "d"]}[metric]
    lines = [Example("a", answers[0]), Example("c", answers[1])]
    if metric == "loss":
        scores = loss_scores([(2.5, 2), (0.5, 1)], [True, False])
    else:
        scores = score([answers[0], answers[0]], answers, metric, [False, True])
    monkeypatch.setattr(callbacks, "evaluate", lambda *given, **named: scores)
    trained = types.SimpleNamespace(jax_state_sync=lambda: None, weights=[])

    def begun():
        watch = gl.ScoreAfterEpoch(lines, metric=metric)
        watch.set_model(trained)
        watch.on_train_begin()
        states = CallbackStates([watch], trained)
        states.remember_start()
        return watch, states

    stopped, states = begun()
    stopped.on_epoch_end(0)
    kept, arrays = states.take()
    went_on, states = begun()
    states.give_back(json.loads(json.dumps(kept)), arrays)
    went_on.on_epoch_end(1)
    assert went_on.history == [scores, scores] and stopped.history == [scores]


def test_the_callback_refuses_what_it_cannot_score():
    with pytest.raises(GemmaLoraError, match="no examples"):
        gl.ScoreAfterEpoch([])
    with pytest.raises(ValueError, match="`limit`"):
        gl.ScoreAfterEpoch([Example("a", "b")], limit=0)
    with pytest.raises(ValueError, match="`metric`"):
        gl.ScoreAfterEpoch([Example("a", "b")], metric="f1")
