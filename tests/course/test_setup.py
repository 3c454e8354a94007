"""The lessons' first cell: what it does in a checkout, beside a wheel, on an accelerator and where there is nothing."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.base import devices
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.course import setup

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/owner/name"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("setup_cell", ROOT / "notebooks/setup_cell.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def precision():
    """The precision of products, put back afterwards."""
    before = jax.config.jax_default_matmul_precision
    yield lambda: jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", before)


def source(cell):
    return "".join(cell["source"])


def small_lesson():
    header = {"cell_type": "markdown", "source": ["# 1\n", "\n", "**Run it elsewhere.** Somehow."], "metadata": {}}
    first = 'import os\n\nos.environ["KERAS_BACKEND"] = "jax"  # so\n\nimport json\nfrom pathlib import Path\n\n'
    first += 'ROOT = Path.cwd() if Path("data").exists() else Path.cwd().parent'
    more = "print(json.dumps(1))"
    shown = [{"output_type": "execute_result", "data": {}, "metadata": {}, "execution_count": 2}]
    cells = [{"cell_type": "code", "source": [text], "metadata": {}, "outputs": []} for text in (first, more)]
    cells[1]["outputs"] = shown
    return {"cells": [header, *cells], "metadata": {"kernelspec": {}}, "nbformat": 4, "nbformat_minor": 5}


# --- one cell in every lesson ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_begins_with_it_and_is_as_the_script_writes_it(script, path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert source(code[0]) == script.cell_source()
    assert not any("KERAS_BACKEND" in source(cell) or "ROOT = " in source(cell) for cell in code[1:])
    assert script.written(script.with_setup(notebook, path.stem, "")) == text, "run: python notebooks/setup_cell.py"


@pytest.mark.parametrize("course", ["", ADDRESS])
def test_it_is_short_and_python(script, course):
    text = script.cell_source(course)
    compile(text, "cell", "exec")
    assert len(text.splitlines()) <= script.MOST_LINES == 12
    assert max(map(len, text.splitlines())) <= 120


def test_a_lesson_gets_it_once_and_loses_what_it_makes_needless(script):
    notebook = script.with_setup(small_lesson(), "08_gemma_lora", "printed\n")
    header, first, imports, last = notebook["cells"]
    assert source(first) == script.cell_source() and first["outputs"][0]["text"] == ["printed\n"]
    assert source(imports) == "import json" and "Somehow" not in source(header)
    assert [cell["execution_count"] for cell in (first, imports, last)] == [1, 2, 3]
    assert last["outputs"][0]["execution_count"] == 3
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["kernelspec"] == {}
    again = script.with_setup(json.loads(json.dumps(notebook)), "08_gemma_lora", "other\n")
    assert again == notebook
    first["source"] = ["old = 1"]
    assert source(script.with_setup(notebook, "08_gemma_lora", "")["cells"][1]) == script.cell_source()


def test_what_a_lesson_still_uses_stays(script):
    notebook = small_lesson()
    notebook["cells"][2]["source"] = ["print(os.getpid(), Path('x'))"]
    imports = source(script.with_setup(notebook, "03_rank", "")["cells"][2])
    assert imports == "import os\nimport json\nfrom pathlib import Path"
    assert "accelerator" not in notebook["metadata"]


def test_badges_come_with_an_address(script):
    assert "colab" not in script.elsewhere("03_rank", "").lower().replace("on colab", "")
    text = script.elsewhere("03_rank", ADDRESS)
    assert "https://colab.research.google.com/github/owner/name/blob/main/notebooks/03_rank.ipynb" in text
    assert f"https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/main/notebooks/03_rank.ipynb" in text
    assert ADDRESS in script.cell_source(ADDRESS) and "git" not in script.cell_source("")


# --- what the cell does ------------------------------------------------------------------------------------


def run_cell(text, folder, monkeypatch, installed):
    """Runs the cell in a folder; returns the commands it gave and its variables."""
    commands = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(subprocess, "run", lambda command, **more: commands.append(command))
    monkeypatch.setattr(os, "system", commands.append)
    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(begin=lambda: "root"))
    variables = {}
    exec(compile(text, "cell", "exec"), variables)
    return commands, variables


def test_where_the_package_is_there_nothing_is_installed(script, tmp_path, monkeypatch):
    commands, variables = run_cell(script.cell_source(), tmp_path, monkeypatch, installed=True)
    assert commands == [] and variables["ROOT"] == "root"


def test_a_wheel_beside_the_notebook_is_installed_with_what_lessons_need(script, tmp_path, monkeypatch):
    (tmp_path / "gemma_lora-0.1.0-py3-none-any.whl").touch()
    ((command,), _) = run_cell(script.cell_source(), tmp_path, monkeypatch, installed=False)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-3:] == ["-f", ".", "gemma_lora-0.1.0-py3-none-any.whl[weights,lessons]"]


def test_a_checkout_is_installed_from_its_folder(script, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    for course in ("", ADDRESS):
        commands, _ = run_cell(script.cell_source(course), tmp_path / "notebooks", monkeypatch, installed=False)
        assert commands[-1][-1] == "..[weights,lessons]"


def test_an_address_is_cloned_and_without_anything_the_cell_says_what_to_do(script, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="make portable.*Kaggle"):
        run_cell(script.cell_source(), tmp_path, monkeypatch, installed=False)
    (tmp_path / "course").mkdir()
    (tmp_path / "course/pyproject.toml").touch()  # as git would have left it
    clone, install = run_cell(script.cell_source(ADDRESS), tmp_path, monkeypatch, installed=False)[0]
    assert clone == f"git clone -q --depth=1 {ADDRESS} course"
    assert install[-1] == "course[weights,lessons]"


# --- backend, precision, device, folder --------------------------------------------------------------------


def test_on_a_cpu_nothing_is_set_and_the_course_is_found(capsys, precision, monkeypatch):
    monkeypatch.setattr(devices, "accelerator_here", lambda: None)
    before = precision()
    assert setup.begin(ROOT / "notebooks") == ROOT
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"JAX {jax.__version__} on the CPU") and "GB of memory" in printed[0]
    assert "float32" in printed[1] and "mixed precision" in printed[2] and precision() == before


def test_on_an_accelerator_products_are_set_to_full_precision(capsys, precision, monkeypatch):
    fake = devices.Device("gpu", "Tesla T4", 2, capability=7.5, memory_bytes=11_800_000_000)
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    monkeypatch.setattr(devices, "device", lambda: fake)
    setup.begin(ROOT)
    assert precision() == "highest"
    printed = capsys.readouterr().out
    assert "on Tesla T4, the first of 2, 11.8 GB of its memory" in printed
    assert "no mixed precision, since Tesla T4 (compute capability 7.5) has no bfloat16 units" in printed


def test_an_accelerator_that_jax_does_not_use_stops_the_lesson(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "cpu")
    monkeypatch.setattr(devices, "accelerator_here", lambda: "a GPU (nvidia-smi)")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(GemmaLoraError, match=r"has a GPU.*computes on the CPU.*jax\[cuda12\]==.*restart"):
        setup.begin(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as asked for
    setup.begin(ROOT)


def test_an_older_keras_that_runs_already_asks_for_a_restart(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(__version__="3.13.2"))
    with pytest.raises(GemmaLoraError, match=r"Keras 3\.13\.2 was imported before.*Restart"):
        setup.begin(ROOT)


def test_the_courses_folder_is_found_or_asked_for(tmp_path, monkeypatch):
    portable = tmp_path / "input/my-course"
    for folder in (tmp_path / "a/course", portable):
        (folder / "data/expenses").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    assert setup.course_folder(tmp_path / "a") == tmp_path / "a/course"
    with pytest.raises(GemmaLoraError, match="make portable"):
        setup.course_folder(tmp_path / "b")
    monkeypatch.setattr(setup, "_ATTACHED", tmp_path / "input")
    assert setup.course_folder(tmp_path / "b") == portable


# --- why the precision is set ------------------------------------------------------------------------------


def products(jaxpr):
    """Every dot_general of a program, those in its inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def rounded(x, bits):
    """float32 numbers with so many significant bits: 11 as TF32 has, 8 as bfloat16."""
    mantissa, exponent = np.frexp(np.asarray(x))
    return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent).astype("float32")


@pytest.mark.parametrize("bits", [11, 8])
def test_with_rounded_factors_merged_and_unmerged_differ_in_the_lessons_digits(bits):
    """Lesson 05's assert, x (W + A B) = x W + (x A) B to 1e-5, with factors as a GPU or TPU rounds them."""
    rng = np.random.default_rng(0)
    x, kernel, a, b = (rng.normal(0, 1, shape).astype("float32") for shape in ((8, 64), (64, 48), (64, 4), (4, 48)))

    def difference(product):
        both = product(x, kernel) + product(product(x, a), b)
        return np.abs(product(x, kernel + product(a, b)) - both).max() / np.abs(both).max()

    assert difference(np.matmul) < 1e-5 < difference(lambda p, q: rounded(p, bits) @ rounded(q, bits))


def test_the_setting_reaches_every_float32_product_of_the_forward_pass(gemma, precision):
    """So that none of them is rounded: a product with bfloat16 factors is so by its own choice."""
    from gemma_lora.gemma.forward import hidden_states

    tokens = jnp.ones((1, 6), "int32")
    jax.config.update("jax_default_matmul_precision", "highest")
    traced = jax.make_jaxpr(lambda t: hidden_states(gemma, t))(tokens)
    found = list(products(traced.jaxpr))
    assert len(found) > 10
    for equation in found:
        kinds = {str(variable.aval.dtype) for variable in equation.invars}
        assert kinds == {"bfloat16"} or {str(p) for p in equation.params["precision"]} == {"HIGHEST"}
