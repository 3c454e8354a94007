"""What a report shows: intervals, the change on the same lines, classes, cut answers, warnings."""

import io
import json

import pytest
from rich.console import Console

from gemma_lora.data.formats import Example
from gemma_lora.generation.metrics import score
from gemma_lora.job import finetuning, folder
from gemma_lora.job.report import show_report, training_sentences


def shown(metrics, run_dir, rows=()):
    console = Console(file=io.StringIO(), width=200)
    show_report(console, run_dir, metrics, list(rows))
    return console.file.getvalue()


def metrics_of(before, after, **more):
    tests = {"test": [Example("p", line) for line in after[1]]}
    scores = [{"test": score(*side[:2], *side[2:])} for side in (before, after)]
    return {
        "before": {"test": scores[0]["test"].to_dict()},
        "after": {"test": scores[1]["test"].to_dict()},
        "difference": finetuning._differences(tests, *scores),
        "english_perplexity": {"before": 40.0, "after": 50.0},
        "seconds": 60,
        "peak_memory_bytes": 10**9,
        "warnings": ["Only 3 training steps [/]: give more."],
    } | more


REFERENCES = ["yes", "no", "no [b]", "yes", "no", "no [b]"] * 4


@pytest.mark.slow
def test_a_classification_shows_intervals_classes_and_its_picture(tmp_path):
    before = (["yes", "well"] * 6, REFERENCES[:12], "classification")
    after = (["yes", *REFERENCES[1:23], "nothing"], REFERENCES, "classification", [True] + [False] * 23)
    metrics = metrics_of(before, after)
    folder.write_run(tmp_path, metrics, [1.0, 0.5], [])
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    text = shown(metrics, tmp_path)
    assert "95.8 % (87.5 to 100.0)" in text  # 23 of 24
    change = metrics["difference"]["test"]["accuracy"]
    assert change["value"] == pytest.approx(1 - sum(a == r for a, r in zip(*before[:2], strict=True)) / 12)
    assert f"{100 * change['value']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})" in text
    for words in ("macro F1", "precision", "no [b]", "(no class)", "answers cut off", "confusion.png", "[/]: give"):
        assert words in text
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert shown(stored, tmp_path) == text  # as a finished run is shown again


def test_what_is_no_share_is_shown_in_its_own_unit(tmp_path):
    losses = [(1.0, 2), (3.0, 2)]
    metrics = metrics_of((["a", "b"], ["a", "a"], "loss", (), losses), (["a", "b"], ["a", "a"], "loss", (), losses))
    text = shown(metrics, tmp_path)
    assert "1.000 (0.500 to 1.500)" in text and "+0.000 (+0.000 to +0.000)" in text
    assert "confusion" not in text and "cut off" not in text


def test_a_run_from_before_there_were_intervals_is_shown(tmp_path):
    old = {"exact_match": 0.5, "fields": {"date": 0.25}, "valid_json": 1.0, "count": 2}
    metrics = metrics_of((["a"], ["a"]), (["a"], ["a"])) | {"before": {"test": old}, "after": {"test": old}}
    del metrics["difference"], metrics["warnings"]
    text = shown(metrics, tmp_path)
    assert "exact match" in text and "50.0 %" in text and "date" in text and "25.0 %" in text


def test_a_finished_runs_rows_are_read_at_line_ends_only(tmp_path):
    row = {"prompt": "one\u2028two\x85", "response": "x"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert folder.stored_rows(tmp_path) == [row]


def test_a_chat_is_shown_with_all_it_was_asked():
    turns = (("user", "Be kind.\n\nHi"), ("model", "Hello"), ("user", "And?"), ("model", "Bye"))
    line = finetuning.shown_line(Example("And?", "Bye", turns=turns))
    assert [turn["content"] for turn in line["messages"]] == ["Be kind.\n\nHi", "Hello", "And?"]
    assert [turn["role"] for turn in line["messages"]] == ["user", "assistant", "user"]
    assert finetuning.shown_line(Example("a", "b")) == {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (
            {"best_epoch": 2, "kept_epoch": 2, "stopped_early": True},
            "epoch 2, whose validation loss was lowest. Stopped",
        ),
        ({"best_epoch": 2, "kept_epoch": 2, "stopped_early": True}, "early, after epoch 4 of 6."),
        ({"best_epoch": None, "kept_epoch": 4, "stopped_early": False}, "epoch 4, the last one. All 4 epochs were"),
    ],
)
def test_a_report_says_which_epoch_was_kept_and_where_it_stopped(training, words):
    said = training_sentences({"training": {"epochs": 4, "planned_epochs": 6} | training, "replay": 0.1})
    assert words in said[0] and "10 % of the training tokens" in said[1]


def test_a_report_of_a_run_without_replay_or_of_an_older_version():
    assert training_sentences({"replay": 0.0}) == ["Replay against forgetting: none."]
    assert training_sentences({"training": {"epochs": 4, "best_epoch": 2}}) == []
