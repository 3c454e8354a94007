"""The package's order: a module imports only from modules above it, and some rules every module keeps."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_lora

PACKAGE = Path(gemma_lora.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
#: design.md's table from top to bottom. Modules that it does not name stand where their imports put them.
LAYERS = {
    "numbers": ["files", "calibration", "quantization", "ternary", "nf4", "low_rank", "memory", "checkpoint"],
    "layers": [
        "backend",
        "linear",
        "mixed_precision",
        "packed",
        "remat",
        "dora",
        "lora",
        "ptq",
        "adapters",
        "bitnet",
        "byte_model",
        "transformer",
        "blocks",
        "loss",
        "health",
    ],
    "models": ["lazy_tensorflow", "templates", "formats", "gguf", "peft", "qlora", "gemma", "data", "packing"],
    "work": ["hardware", "traps", "sharding", "generation", "training", "evaluation", "export"],
    "front": ["job", "pipeline", "cli"],
}
ORDER = [name for layer in LAYERS.values() for name in layer]
#: Arrays in, pictures or verdicts out: they need the numbers only, and anything from the front may use them.
BESIDE = ["plots", "checks"]
#: What design.md promises to work on plain arrays and plain Keras models, without KerasHub in memory.
ALONE = ["quantization", "ternary", "nf4", "low_rank", "lora", "loss", "memory"]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> set[str]:
    """The package's own modules that a module imports, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gemma_lora.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add(f"relative import of {node.module}")
        elif isinstance(node, ast.ImportFrom) and node.module == "gemma_lora":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("gemma_lora."):
            found.add(node.module.split(".")[1])
    return found


def allowed(name: str) -> set[str]:
    if name in BESIDE:
        return {*LAYERS["numbers"], name}
    above = set(ORDER[: ORDER.index(name)])
    return above | set(BESIDE) if name in LAYERS["front"] else above


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_modules_above_it(path):
    name = name_of(path)
    if name == "__init__":
        assert not imported(ast.parse(path.read_text()))  # its names are imported when they are first used
        return
    assert name in ORDER + BESIDE, f"{name}.py has no place in the order: add it to LAYERS, and to design.md"
    assert imported(ast.parse(path.read_text())) <= allowed(name)


@pytest.mark.parametrize(
    "source, found",
    [
        ("import gemma_lora.job.finetuning", {"job"}),
        ("from gemma_lora import job, cli", {"job", "cli"}),
        ("from gemma_lora.job.finetuning import finetune", {"job"}),
        ("def f():\n    if True:\n        from gemma_lora.job.finetuning import finetune", {"job"}),
        ("import keras, json\nfrom os import path", set()),
    ],
)
def test_every_form_of_import_is_seen(source, found):
    assert imported(ast.parse(source)) == found
    assert not found & allowed("lora")


def test_every_exported_name_exists_and_is_listed():
    assert set(gemma_lora.__all__) <= set(dir(gemma_lora))
    for name in gemma_lora.__all__:
        assert getattr(gemma_lora, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gemma_lora.no_such_name


# --- rules every module keeps ------------------------------------------------------------------------------


def test_no_assert_and_no_module_of_leftovers():
    for path in MODULES:
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path.name}, line {asserts}: raise ValueError or GemmaLoraError instead"
        assert path.stem not in ("utils", "helpers", "util", "misc", "common")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} needs a docstring"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bare = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert not bare


def calls_require_jax(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "require_jax"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_keras_is_imported_after_its_backend_is_chosen(path):
    """Else the first name somebody uses decides: Keras alone would take TensorFlow."""
    for node in ast.parse(path.read_text()).body:
        if calls_require_jax(node):
            return
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "keras" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "keras"
            if node.module == "gemma_lora" and any(alias.name == "lora" for alias in node.names):
                return  # lora.py chooses it


# --- usable alone ------------------------------------------------------------------------------------------

WITHOUT_KERASHUB = """
import importlib, sys
sys.modules["keras_hub"] = sys.modules["tensorflow"] = None  # importing them now fails
import gemma_lora
assert gemma_lora.exact_match(["a"], ["a"]) == 1  # the first name used; it imports Keras, which must take JAX
for name in {names}:
    importlib.import_module("gemma_lora." + name)
import jax.numpy as jnp, keras
assert keras.backend.backend() == "jax"
from gemma_lora.lora import LoRADense
from gemma_lora.layers.loss import chunked_cross_entropy
dense = keras.layers.Dense(4)
dense.build((None, 3))
layer = LoRADense(dense, rank=2)
assert layer(jnp.ones((5, 3))).shape == (5, 4)
loss = chunked_cross_entropy(jnp.ones((3, 4)), jnp.eye(4), jnp.zeros(3, "int32"), jnp.ones(3))
assert abs(float(loss) - 1.3863) < 1e-3
"""


def test_the_numbers_and_layers_need_no_kerashub():
    present = [name for name in ALONE if (PACKAGE / f"{name}.py").is_file()]
    assert {"lora", "loss"} <= set(present)
    script = WITHOUT_KERASHUB.format(names=present)
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
