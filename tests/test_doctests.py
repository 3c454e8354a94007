"""Every example in a docstring of the package runs and shows what it says."""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import subprocess
import sys

import pytest

import gemma_lora


def has_examples(name: str) -> bool:
    """Whether a docstring of a module has an example; read from its source, so that nothing heavy is imported."""
    spec = importlib.util.find_spec(name)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    with open(spec.origin, encoding="utf-8") as file:
        nodes = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, documented)]
    return any(doctest.DocTestParser().get_examples(ast.get_docstring(node) or "") for node in nodes)


MODULES = [module.name for module in pkgutil.walk_packages(gemma_lora.__path__, "gemma_lora.")]
WITH_EXAMPLES = [name for name in MODULES if has_examples(name)]


def test_the_examples_are_found():
    assert len(WITH_EXAMPLES) >= 25
    assert {"gemma_lora.layers.loss", "gemma_lora.base.lazy"} <= set(WITH_EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of(name):
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    examples = [test for test in found if test.examples]  # each with a copy of the module's names
    assert examples
    runner, said = doctest.DocTestRunner(verbose=False), []
    for test in examples:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.slow
def test_finding_the_examples_imports_no_model():
    heavy = {"keras_hub", "tensorflow", "keras", "jax"}
    script = f"import sys, tests.test_doctests; assert not {heavy} & set(sys.modules), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
