"""Each warning is given where a run's figures call for it, and not where they do not."""

import pytest

from gemma_lora.job.warnings import find_warnings


def estimate(low, high):
    return {"value": (low + high) / 2, "low": low, "high": high}


def epochs(validation, training=(1.0, 0.1), **more):
    """What `stages.train` says of a training without `--keep-best`."""
    return {"validation_loss": list(validation), "training_loss": list(training), "best_epoch": None} | more


def good():
    """The metrics of a run that nothing speaks against."""
    return {
        "before": {"test": {"count": 64, "metric": "exact"}},
        "after": {"test": {"count": 200, "metric": "exact", "cut": 0}},
        "difference": {"test": {"exact match": estimate(0.1, 0.3)}},
        "english_perplexity": {"before": 40.0, "after": 80.0},
        "lines": {"train": 2000, "validation": 20},
        "lines_left_out": 0,
        "training_loss": {"first_half": 1.0, "second_half": 0.01},
        "training_steps": 40,
        "training": epochs([0.5, 0.4, 0.401]),
    }


def test_a_good_run_has_no_warning():
    assert find_warnings(good()) == []


def test_a_run_of_an_earlier_version_is_passed_over():
    old = {"before": {}, "after": {"test": {"exact_match": 1.0, "fields": {}, "count": 200}}, "training_steps": 400}
    assert find_warnings(old | {"english_perplexity": {"before": 40.0, "after": 50.0}}) == find_warnings({}) == []


def after(**more):
    return {"after": {"test": good()["after"]["test"] | more}}


WORSE = {"before": 40.0, "after": 80.1}
LOSS = {"after": {"test": {"count": 200, "metric": "loss", "cut": 0}}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"training_steps": 39}, ["Only 39 training steps", "--epochs"]),
        ({"training_steps": 1}, ["Only 1 training step:"]),
        ({"lines": {"validation": 19}}, ["Few lines", "validation 19", "at least 20"]),
        (after(count=19), ["Few lines", "test 19"]),
        ({"lines_left_out": 1}, ["1 line was left out", "--row-length"]),
        ({"lines_left_out": 7}, ["7 lines were left out"]),
        (after(cut=3), ["cut off", "3 in test", "--max-new-tokens", "stop"]),
        ({"training_loss": {"first_half": 1.0, "second_half": 0.0099}}, ["0.0099", "overfits", "fewer --epochs"]),
        (
            {"english_perplexity": {"before": 40.0, "after": 80.1}},
            ["from 40.0 to 80.1", "--learning-rate", "--replay 0.1"],
        ),
        ({"english_perplexity": {"before": 40.0, "after": 80.1}, "replay": 0.1}, ["a larger --replay"]),
        ({"training": epochs([0.5, 0.4, 0.41])}, ["rose from 0.400 to 0.410", "after epoch 2 of 3", "--keep-best"]),
        (
            {"difference": {"test": {"exact match": estimate(0.0, 0.2)}}},
            ["test: the fine-tuned model may be no better", "+0.0 points and +20.0 points", "answers.jsonl"],
        ),
        ({"difference": {"test": {"exact match": estimate(-0.3, -0.1)}}}, ["is worse than"]),
        (LOSS | {"difference": {"test": {"loss": estimate(-0.5, 0.1)}}}, ["may be no better", "-0.50 and +0.10"]),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(change, words):
    (sentence,) = find_warnings(good() | change)
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    "change",
    [
        {"training": epochs([0.5, 0.6], training=[0.5, 0.6])},  # neither falls
        {"training": epochs([0.4])},
        {"training": epochs([0.4, 0.6], best_epoch=1)},  # that epoch was kept
        {"training": epochs([0.4, 0.3], stopped_early=True), "training_steps": 20},
        LOSS | {"difference": {"test": {"loss": estimate(-0.5, -0.1)}}},  # a lower loss is better
        {"difference": {"test": {"valid JSON": estimate(-0.3, -0.1)}}},  # not the main score
        {"difference": {}, "before": {}},
        {"training_loss": {}},
    ],
)
def test_what_looks_like_it_and_is_not_is_passed_over(change):
    assert find_warnings(good() | change) == []
