"""pyproject.toml's ranges leave alone what Colab and Kaggle have (the lists in tests/platforms); pip itself is asked by
`make platforms`, which needs the network."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LISTS = sorted((ROOT / "tests/platforms").glob("*.txt"))
#: Of what a runtime has, these may be replaced: pure Python, and nothing compiled for the runtime needs them.
UPGRADED = {"keras", "keras-hub"}
#: Needed by no line of ours, or by none in the core, and never to be asked for: see the reason.
NOT_ASKED_FOR = {
    "protobuf": "sentencepiece_model.py writes the tokenizer's file without it",
    "tensorflow": "KerasHub brings TensorFlow Text, whose range a runtime's TensorFlow meets",
    "keras-nlp": "it pins KerasHub to its own version",
    "jaxlib": "jax brings its own",
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = [*project()["dependencies"], *(line for e in extras for line in project()["optional-dependencies"][e])]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def there(path: Path) -> dict[str, str]:
    """A list's packages, those too that `make platforms` does not install."""
    return dict(re.findall(r"([A-Za-z][\w-]*)==([\w.]+)", path.read_text(encoding="utf-8")))


def replaced(asked: dict[str, Requirement], has: dict[str, str]) -> set[str]:
    """What pip would have to replace."""
    return {name for name, version in has.items() if name in asked and version not in asked[name].specifier}


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_a_runtime_keeps_what_it_has(path):
    assert replaced(requirements("lessons"), there(path)) <= UPGRADED


def test_a_range_that_is_too_narrow_is_found():
    has = there(ROOT / "tests/platforms/colab-gpu.txt")
    assert {"jax", "jax-cuda12-plugin", "protobuf", "tensorflow"} <= set(has)
    assert replaced({"jax": Requirement("jax>=0.10"), "numpy": Requirement("numpy>=2")}, has) == {"jax"}


def test_some_packages_are_not_asked_for():
    assert set(requirements()) & set(NOT_ASKED_FOR) == set()


def test_nothing_that_the_package_brings_pins_or_narrows_what_stays():
    """One level down, as installed here: what KerasHub, keras, gguf and the others ask for, against each list."""
    for name in requirements("lessons"):
        if name in ("jax", "keras-nlp"):  # a runtime's own; an alias
            continue
        lines = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        asked = {canonicalize_name(r.name): r for r in lines if not r.marker or r.marker.evaluate({"extra": ""})}
        for path in LISTS:
            assert replaced(asked, there(path)) <= UPGRADED, (name, path.stem)


def test_our_own_environment_is_within_the_ranges():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    asked = requirements("lessons", "notebooks", "dev", "data", "weights")
    outside = {n: r for n, r in asked.items() if n != "gemma-lora" and pins.get(n, "") not in r.specifier}
    assert outside == {}


def test_the_newest_pythons_are_tried_first(monkeypatch, tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("platforms_run", ROOT / "tests/platforms/run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    for name in ("python3.12", "python3.13"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.python_for("# x\n# python: 3.13 3.12\njax==1").endswith("python3.13")
    (tmp_path / "python3.13").unlink()
    assert run.python_for("# python: 3.13 3.12").endswith("python3.12")
    assert run.python_for("jax==1") == run.sys.executable
