"""Scores against scikit-learn, sacrebleu and sums by hand; intervals against what they promise."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.generation import chrf, metrics
from gemma_lora.generation.bootstrap import Estimate, PerLine, differences, estimates, ratio, share
from gemma_lora.generation.classes import NO_CLASS, confusion
from gemma_lora.generation.matching import field_scores, is_match, json_equal, parse_object
from gemma_lora.generation.metrics import Scores, choose_metric, compare, score


def test_nothing_of_it_imports_jax():
    script = "import sys, gemma_lora.generation.metrics; assert not {'jax', 'keras'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("true", "1", False),
        ("false", "0", False),
        ("true", "true", True),
        ("1", "1.0", True),
        ("1", '"1"', False),
        ("null", "false", False),
        ("[1, true]", "[1, 1]", False),
        ("[1]", "[1, 1]", False),
        ('{"b": {"c": [true]}}', '{"b": {"c": [1]}}', False),
        ('{"b": {"c": [2, 1]}}', '{"b": {"c": [2.0, 1e0]}}', True),
        ('{"b": 1}', '{"c": 1}', False),
        ("[]", "{}", False),
        ('""', "null", False),
        ("12345678901234567890", "12345678901234567891", False),
    ],
)
def test_json_values_are_equal_if_type_and_value_are(one, other, expected):
    for left, right in ((one, other), (other, one)):
        assert json_equal(json.loads(left), json.loads(right)) is expected
        assert is_match(f'{{"a": {left}}}', f'{{"a": {right}}}') is expected
        assert field_scores([f'{{"a": {left}}}'], [f'{{"a": {right}}}']) == {"a": float(expected)}


@pytest.mark.parametrize("answer", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 1}}'])
def test_what_is_no_json_is_no_match(answer):
    assert parse_object(answer) is None
    for reference in ('{"a": 1}', '{"a": {"b": 1}}'):
        assert not is_match(answer, reference)
        assert score([answer], [reference]).valid_json == 0


def test_an_object_nested_too_deeply_to_compare_is_compared_as_text():
    deep = '{"a":' * 900 + "1" + "}" * 900
    assert is_match(deep, deep) and not is_match(deep.replace("1", "2"), deep)


# --- which metric ------------------------------------------------------------------------------------------

SENTENCE = "The library opens at nine in the morning and closes at six, but never on public holidays."


@pytest.mark.parametrize(
    "references, expected",
    [
        (['{"a": 1}', '{"b": true}'], "json"),
        (['{"a": 1}', "none", '{"a": 1}', "none"], "classification"),  # not all are objects
        (["billing", "shipping"] * 3, "classification"),
        (["a"] * 30 + ["b"] * 29 + ["once"], "classification"),
        (["a", "a", "b", "b", "once"], "exact"),
        (["a"] * 9, "exact"),  # one class is none
        ([str(n) for n in range(60)] * 2, "exact"),  # too many classes
        (["12", "13", "15"], "exact"),
        ([SENTENCE, SENTENCE + " Ask."] * 3, "text"),
        (["two\nlines", "other\nlines"] * 3, "exact"),
        ([SENTENCE + str(n) for n in range(5)], "text"),
    ],
)
def test_the_metric_follows_the_references(references, expected):
    assert choose_metric(references) == expected


def test_a_metric_that_does_not_fit_is_refused_with_another():
    with pytest.raises(GemmaLoraError, match="'no object'.*Choose 'exact'"):
        score(["x"], ["no object"], "json")
    with pytest.raises(GemmaLoraError, match="201 different right answers"):
        score(["x"] * 201, [str(n) for n in range(201)], "classification")
    with pytest.raises(ValueError, match="`metric` must be one of exact, json"):
        score(["x"], ["x"], "rouge")
    with pytest.raises(ValueError, match="`losses` must be given"):
        score(["x"], ["x"], "loss")


# --- classification ----------------------------------------------------------------------------------------


def random_classes(seed=0, lines=90):
    rng = np.random.default_rng(seed)
    references = rng.choice(["red", "green", "blue", "grey"], lines, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    wrong = rng.choice(["red", "green", "blue", "purple", "", "red green"], lines).tolist()
    answers = [r if keep else w for r, w, keep in zip(references, wrong, rng.random(lines) < 0.6, strict=True)]
    return answers, references


def test_classes_are_scored_as_scikit_learn_scores_them():
    sklearn = pytest.importorskip("sklearn.metrics")
    answers, references = random_classes()
    found = score([f" {a}\n" for a in answers], references, "classification")
    labels = sorted(set(references))
    given = [answer if answer in labels else NO_CLASS for answer in answers]
    expected = sklearn.precision_recall_fscore_support(references, given, labels=labels, zero_division=0)
    for name, *values in zip(labels, *expected, strict=True):
        mine = [found.classes[name][of] for of in ("precision", "recall", "f1", "count")]
        assert mine == pytest.approx(values)
    macro = sklearn.f1_score(references, given, labels=labels, average="macro", zero_division=0)
    assert found.scores["macro F1"].value == pytest.approx(macro)
    assert found.value == found.scores["accuracy"].value == pytest.approx(sklearn.accuracy_score(references, given))
    table = found.confusion
    assert table.rows == [*table.columns, NO_CLASS]
    matrix = sklearn.confusion_matrix(references, given, labels=table.rows)  # its rows are the right ones
    assert np.array_equal(np.array(table.counts), matrix.T[:, :-1])


def test_an_answer_that_is_no_class_has_a_row_of_its_own():
    table = confusion(["cat", "a cat", "", "dog"], ["cat", "cat", "dog", "cat"])
    assert (table.columns, table.counts) == (["cat", "dog"], [[1, 0], [1, 0], [1, 1]])
    assert sum(map(sum, table.counts)) == 4
    assert table.per_class()[NO_CLASS] == {"count": 0, "answered": 2}
    taken = confusion(["x", NO_CLASS], [NO_CLASS, NO_CLASS])  # a class of that very name
    assert (taken.rows, taken.counts) == ([NO_CLASS, f"({NO_CLASS})"], [[1], [1]])


# --- chrF --------------------------------------------------------------------------------------------------


def random_texts(seed=0, lines=40):
    rng = np.random.default_rng(seed)
    words = "the shop opens at nine on Monday and Δelivers é 20 km !".split()
    texts = [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(2 * lines)]
    return texts[:lines], [text or "no" for text in texts[lines:]]


@pytest.mark.parametrize("seed", range(3))
def test_chrf_is_sacrebleus(seed):
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = random_texts(seed)
    found = score(answers, references, "text")
    assert found.value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert found.scores["chrF"].low < found.value < found.scores["chrF"].high
    one = score(answers[:1], references[:1], "text").value
    assert one == pytest.approx(sacrebleu.sentence_chrf(answers[0], references[:1]).score)


@pytest.mark.parametrize("answer, reference", [("", "abc"), ("xyz", "abc"), ("a", "a"), ("abcdefgh", "a")])
def test_chrf_of_lines_at_the_edge(answer, reference):
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.corpus_chrf([answer], [[reference]]).score
    assert score([answer], [reference], "text").value == pytest.approx(expected)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chrf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GemmaLoraError, match="pip install sacrebleu.*exact, json, classification or loss"):
        metrics.metric_of(None, [SENTENCE + str(n) for n in range(5)])
    assert metrics.metric_of("exact", [SENTENCE]) == "exact"


# --- intervals ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_intervals_hold_the_true_score_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        found = estimates({"a": share(rng.random(80) < 0.7)})["a"]
        assert found.low <= found.value <= found.high
        held += found.low <= 0.7 <= found.high
    assert 52 <= held  # 57 are expected; fewer than 52 of 60 happen once in 100 times


def test_an_interval_is_as_wide_as_the_normal_approximation_and_the_same_every_time():
    right = np.arange(400) % 4 > 0
    found = estimates({"a": share(right)})["a"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found.value == 0.75
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    assert estimates({"a": share(right)}) == {"a": found}
    assert estimates({}) == {}


def test_a_mean_of_tokens_is_resampled_by_lines():
    rows = np.array([[2.0, 1], [30.0, 10], [1.0, 4]])
    found = estimates({"loss": PerLine(rows, ratio)})["loss"]
    assert found.value == pytest.approx(33 / 15)
    assert found.low >= 1 / 4 and found.high <= 3


def test_the_difference_is_paired():
    """Lines that are as hard before as after: the difference is known far better than either score."""
    rng = np.random.default_rng(1)
    hard = rng.random(100) < 0.5
    before, after = share(~hard), share(~hard | (np.arange(100) < 5))
    found = differences({"a": before, "x": before}, {"a": after, "y": after})
    assert list(found) == ["a"] and found["a"].value == pytest.approx(after.statistics[:, 0].mean() - (~hard).mean())
    apart = [estimates({"a": part})["a"] for part in (before, after)]
    assert found["a"].high - found["a"].low < 0.5 * min(one.high - one.low for one in apart)
    same = differences({"a": before}, {"a": before})["a"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same lines"):
        differences({"a": before}, {"a": share([True])})


def test_before_and_after_are_compared_on_the_lines_both_have():
    references = ["yes", "no"] * 20
    before = score(["yes"] * 10, references[:10], "classification")
    after = score(references[:30] + ["?"] * 10, references, "classification")
    found = compare(before, after, references)
    assert found["accuracy"] == Estimate(0.5, found["accuracy"].low, found["accuracy"].high)
    assert 0 < found["accuracy"].low < 0.5 < found["accuracy"].high < 1
    assert found["macro F1"].value == pytest.approx(1 - 1 / 3)


def test_the_loss_is_compared_line_by_line():
    references = ["abc", "de"]
    before, after = (
        score(["x", "y"], references, "loss", losses=losses) for losses in ([(6, 3), (4, 2)], [(3, 3), (2, 2)])
    )
    assert before.value == 2 and after.value == 1
    assert compare(before, after, references)["loss"] == Estimate(-1, -1, -1)


# --- the whole ---------------------------------------------------------------------------------------------


def test_json_has_a_score_for_each_field():
    references = ['{"a": 1, "b": true}', '{"a": 2}']
    found = score(['{"a": 1, "b": 1}', "nonsense"], references)
    assert found.metric == "json" and found.valid_json == 0.5 and found.fields == {"a": 0.5, "b": 0.0}
    values = {name: one.value for name, one in found.scores.items()}
    assert values == {"exact match": 0, "valid JSON": 0.5, "field a": 0.5, "field b": 0}


@pytest.mark.parametrize("metric", ["exact", "classification", "loss"])
def test_what_is_kept_is_json_and_has_no_lines(metric):
    found = score(["a", "b"], ["a", "c"], metric, cut=[False, True], losses=[(1.0, 2), (3.0, 1)])
    assert (found.cut, found.cut_lines) == (1, [1])
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert kept["cut"] == 1 and kept["metric"] == metric and set(kept["scores"])
    assert not {"answers", "cut_lines", "losses"} & set(kept)
    assert json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert found.value == found.scores[metrics.MAIN[metric]].value


def test_scores_without_the_new_fields_are_still_made():
    assert Scores(exact_match=1.0, fields={}, valid_json=None, count=1, answers=["x"]).cut == 0
