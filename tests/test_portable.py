"""`make portable`: what lies in the folder is what the lessons read. Running them there is `make portable-test`."""

import importlib.util
import re
from pathlib import Path

import pytest

from gemma_lora.course import setup

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("portable", ROOT / "notebooks/portable.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target = tmp_path_factory.mktemp("anywhere") / "portable"
    module.copy(target)
    return target


def read(path):
    """What a lesson reads from the course's folder."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r'ROOT / \\"([^"\\]+)\\"', text))


def test_every_lesson_is_there_with_what_it_reads(portable):
    assert {path.name for path in portable.glob("*.ipynb")} == {path.name for path in LESSONS}
    named = {name for path in LESSONS for name in read(path)}
    assert {"data/queues", "data/expenses", "benchmarks/results/encodings.json"} <= named
    assert {name for name in named if not (portable / name).exists()} == set()


def test_a_lesson_there_finds_the_folder(portable):
    assert setup.course_folder(portable) == portable


def test_it_is_small_and_holds_no_leftovers(portable):
    files = [path for path in portable.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert not [path for path in files if path.suffix == ".pyc" or ".ipynb_checkpoints" in path.parts]
