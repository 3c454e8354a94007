"""The small tasks in data/ are what their README says, and test lines stand apart."""

import hashlib
from pathlib import Path

import pytest

from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.formats import turns_before_answer

DATA = Path(__file__).parents[2] / "data"
LINES = {"queues": (300, 60), "garden_chat": (150, 30)}
SHARED = {"queues": 0, "garden_chat": 3}  # test prompts that train has too; its README says so


@pytest.mark.parametrize("name", LINES)
def test_the_files_are_those_of_the_checksums(name):
    sums = dict(line.split()[::-1] for line in (DATA / name / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"train.jsonl", "test.jsonl"}
    assert {file: hashlib.sha256((DATA / name / file).read_bytes()).hexdigest() for file in sums} == sums


@pytest.mark.parametrize("name", LINES)
def test_lines_are_as_many_as_the_readme_says_and_tests_are_apart(name):
    dataset = load_dataset(DATA / name, on_notice=lambda notice: None)
    tests = dataset.tests["test"]
    assert (len(dataset.train) + len(dataset.validation), len(tests)) == LINES[name]
    readme = (DATA / name / "README.md").read_text()
    assert all(f"| {count} |" in readme for count in LINES[name])
    seen = {turns_before_answer(line) for line in (*dataset.train, *dataset.validation)}
    assert sum(turns_before_answer(line) in seen for line in tests) == SHARED[name]
