"""Which lines a training reads and which a loss is computed on, wherever they come from."""

import json

import pytest

from gemma_lora.training.datasets import as_dataset, examples_of

ROWS = [{"prompt": f"say {number}", "response": str(number)} for number in range(12)]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval"])
def test_a_validation_split_is_never_trained_on_whatever_it_is_called(tmp_path, name):
    for split, rows in (("train", ROWS[:8]), (name, ROWS[8:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (tmp_path, {"train": ROWS[:8], name: ROWS[8:]}):
        dataset = as_dataset(source, all_lines=True)
        assert (len(dataset.train), len(dataset.validation)) == (8, 4)
        assert [line.response for line in examples_of(source)] == ["8", "9", "10", "11"]


def test_lines_without_a_validation_split_are_all_there(capsys):
    assert len(as_dataset(ROWS, all_lines=True).train) == len(examples_of(ROWS)) == 12
    assert capsys.readouterr().out == ""
