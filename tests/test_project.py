"""The files around the package agree with it: version, changelog, Makefile, workflows, the list of benchmarks."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import gemma_lora

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTIONS = {"actions/checkout", "actions/setup-python"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- one version -------------------------------------------------------------------------------------------


def test_the_version_stands_in_the_package_and_nowhere_else():
    project = tomllib.loads(text_of("pyproject.toml"))
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gemma_lora.__version__"}


def test_the_version_can_be_read_without_importing():
    """A literal: what builds the package has none of its dependencies, and must not run it."""
    body = ast.parse(text_of("gemma_lora/__init__.py")).body
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    found = [ast.literal_eval(n.value) for n in assigned if ast.unparse(n.targets[0]) == "__version__"]
    assert found == [gemma_lora.__version__] and re.fullmatch(r"\d+\.\d+\.\d+", found[0])


def test_a_plain_checkout_knows_its_version():
    command = [sys.executable, "-S", "-c", "import gemma_lora; print(gemma_lora.__version__)"]  # no installed packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (gemma_lora.__version__, "")


def test_the_changelog_tells_of_this_version_and_of_what_comes():
    headings = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "") and headings[1][0] == gemma_lora.__version__
    assert all(date for _, date in headings[1:])


# --- make --------------------------------------------------------------------------------------------------


def targets() -> dict[str, str]:
    """Each phony target and its recipe."""
    names = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    recipes = re.findall(r"^([a-z-]+):[^\n=]*\n((?:\t.*\n|\\\n)*)", MAKEFILE, re.MULTILINE)
    assert {name for name, _ in recipes} == set(names)
    return dict(recipes)


def test_every_target_is_listed_with_what_it_does():
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(targets())


@pytest.mark.parametrize("name", sorted(targets().keys() - {"help", "env"}))
def test_every_target_says_what_it_takes_before_it_starts(name):
    first = targets()[name].splitlines()[0]
    assert first.startswith("\t@echo ") and first.endswith('."')


@pytest.mark.parametrize(("version", "taken"), [("3.10", False), ("3.11", True), ("3.13", True), ("3.14", False)])
def test_a_python_that_cannot_install_is_refused_with_the_reason(tmp_path, version, taken):
    """`make` with an interpreter that says it is of some version."""
    python = tmp_path / "python"
    numbers = tuple(map(int, version.split(".")))
    code = f"import sys; sys.version_info = {numbers} + (0,); exec(sys.argv[1])"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{code}" "$2"\n'
        f'[ "$1" = --version ] && echo "Python {version}.0" || echo "called: $*"\n'
    )
    python.chmod(0o755)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    done = subprocess.run(
        ["make", ".venv/.python", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ("called: -m venv .venv" in done.stdout) is taken
    assert ("TensorFlow Text" in done.stdout and version in done.stdout) is not taken


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "benchmarks/README.md"])
def test_pages_name_targets_that_exist(page):
    named = re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE)
    assert set(named) <= set(targets())


def test_quick_leaves_out_by_marker_and_test_leaves_out_nothing():
    assert '-m "not real and not slow"' in targets()["quick"]
    assert " -m " not in targets()["test"].replace("-m pytest", "")


# --- workflows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_known_actions_of_a_pinned_version_and_run_our_commands(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"].split("@") for step in steps if "uses" in step]
    assert {name for name, _ in used} == ACTIONS and all(re.fullmatch(r"v\d+", version) for _, version in used)
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == {"quick": ["make quick"], "weekly": [".ci/run"]}[path.stem]
    assert workflow["permissions"] == {"contents": "read"}


def test_every_push_is_checked_quickly_and_every_week_wholly():
    quick, weekly = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in WORKFLOWS)
    assert set(quick[True]) == {"push", "pull_request"}  # YAML reads `on` as true
    assert set(weekly[True]) == {"schedule", "workflow_dispatch"}
    assert quick["jobs"]["quick"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]


# --- benchmarks --------------------------------------------------------------------------------------------


def test_every_script_and_result_is_in_the_list_of_benchmarks():
    listed = text_of("benchmarks/README.md")
    there = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    there |= {path.name for path in (ROOT / "benchmarks/results").iterdir() if path.is_file()}
    assert {name for name in there if f"`{name}`" not in listed} == set()
    named = set(re.findall(r"`(\w+\.(?:py|json|png))`", listed))
    assert named <= there
