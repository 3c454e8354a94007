"""docs/take_it_with_you.md: every way in its table has a test that exists, and every command one that is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/take_it_with_you.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """The cells of the table under "What is equal"."""
    section = page.split("## What is equal")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def missing_test(cell: str) -> str | None:
    """What is wrong with a row's last cell; None if it names a test of tests/parity."""
    found = re.fullmatch(r"`(\w+\.py)::(test_\w+)`", cell)
    path = ROOT / "tests/parity" / (found[1] if found else "")
    if not found or not path.is_file():
        return f"{cell} names no file of tests/parity"
    functions = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    return None if found[2] in functions else f"{cell} is no test"


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[-1].strip("`"))
def test_every_way_has_a_test(row):
    assert len(row) == 6 and all(row)
    assert missing_test(row[-1]) is None


@pytest.mark.parametrize("cell", ["`test_exports.py::test_no_such`", "`no_file.py::test_x`", "by hand", ""])
def test_a_row_without_a_test_is_found(cell):
    assert missing_test(cell)
    assert len(rows(PAGE)) >= 13


def test_the_formats_and_types_are_those_of_the_settings():
    from gemma_lora.base.settings import EXPORT_FORMATS

    assert set(re.findall(r"--format ([\w-]+)", PAGE)) == set(EXPORT_FORMATS)
    known = {kind for kinds in EXPORT_FORMATS.values() for kind in kinds}
    assert set(re.findall(r"--type (\w+)", PAGE)) <= known
