"""The package's order: folders are floors, each imports only from itself and the floors above it; and what every module
keeps besides. The order is of folders: a new module needs no line here."""

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gemma_lora
from gemma_lora import moved

PACKAGE = Path(gemma_lora.__file__).parent
#: docs/design.md's floors from top to bottom: folders, and at the end a module of the package's own.
ORDER = [
    "base",
    "quantization",
    "layers",
    "data",
    "lora",
    "gemma",
    "exchange",
    "training",
    "generation",
    "scaling",
    "job",
    "commands",
    "cli",
]
#: In the order, though nothing is there yet.
PLANNED = {"scaling"}
#: They use any floor and each other. Nobody uses them but those named here.
BESIDE = {"plots": {"job", "cli"}, "checks": set(), "course": set()}
#: The package's own modules that stand on no floor. They import `base` only: importing the package loads nothing else.
FRONT = ["", "moved"]
#: Where Keras may be imported at a module's top; everybody else takes it from the first.
KERAS = {"base.keras_on_jax", "base.backend"}
HEAVY = ("keras", "keras_hub", "keras_nlp", "tensorflow", "tensorflow_text")
LEFTOVERS = {"utils", "util", "helpers", "helper", "misc", "common"}
#: What design.md promises to work on plain arrays and plain Keras models, without KerasHub in memory.
ALONE = ["quantization", "ternary", "nf4", "low_rank", "lora", "loss", "memory"]


# --- reading imports ---------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """`lora.layer` for `lora/layer.py`, `lora` for `lora/__init__.py`, the empty name for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which never runs."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


class Modules:
    """The package's modules by name, and what each imports. `sources` may be made up."""

    def __init__(self, sources: dict[str, str]):
        self.trees = {name: ast.parse(source) for name, source in sources.items()}
        self.handed_on = {name: dict(self._handed_on(name)) for name in self.trees}

    def _handed_on(self, package: str) -> Iterator[tuple[str, str]]:
        """`(name, module)` of what an `__init__` gives through `lazy_names`."""
        if not any(name.startswith(f"{package}.".lstrip(".")) for name in self.trees if name != package):
            return  # a module, no package
        for node in self.trees[package].body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "_MODULES":
                for module, names in ast.literal_eval(node.value).items():
                    yield from ((name, f"{package}.{module}".strip(".")) for name in names)

    def resolve(self, module: str, name: str = "") -> str:
        """The module that `from gemma_lora.<module> import <name>` gives, or gives a name of."""
        if not module and name in moved.MOVED:
            return moved.MOVED[name]
        first, _, rest = module.partition(".")
        module = ".".join(filter(None, [moved.MOVED.get(first, first), rest]))
        below = f"{module}.{name}".strip(".")
        if name and below in self.trees:
            return below
        return self.handed_on.get(module, {}).get(name, module)

    def imports(self, name: str) -> set[str]:
        """The package's own modules that a module imports, inside functions too."""
        found = set()
        for node in without_type_checking(self.trees[name]):
            if isinstance(node, ast.Import):
                ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "gemma_lora"]
                found |= {self.resolve(target.partition(".")[2]) for target in ours}
            elif isinstance(node, ast.ImportFrom) and node.level:
                found.add(f"a relative import of {node.module}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_lora":
                module = node.module.partition(".")[2]
                found |= {self.resolve(module, a.name) for a in node.names if (module, a.name) != ("", "__version__")}
        return found - {name}

    def aliases(self, name: str) -> dict[str, str]:
        """What a module calls the package's modules that it imports."""
        found = {}
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "gemma_lora":
                        found[alias.asname or alias.name] = alias.name
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_lora":
                module = node.module.partition(".")[2]
                for alias in node.names:
                    target = self.resolve(module, alias.name)
                    if target.split(".")[-1] == alias.name or target == moved.MOVED.get(alias.name):
                        found[alias.asname or alias.name] = target
        return found


def floor_of(name: str) -> str:
    return name.split(".")[0]


# --- the rules: each gives what is wrong with one module, in words ------------------------------------------


def misplaced(modules: Modules, name: str) -> list[str]:
    """A folder or module of the package that has no floor."""
    if name in FRONT or floor_of(name) in [*ORDER, *BESIDE]:
        return []
    return [f"{floor_of(name)} has no place: give it one in ORDER or BESIDE, and in docs/design.md"]


def upward(modules: Modules, name: str) -> list[str]:
    """Imports from a floor further down, or of what stands beside."""
    floor = floor_of(name)
    if name in FRONT:
        allowed = {"base", *FRONT}
    elif floor in BESIDE:
        allowed = {*ORDER, *BESIDE}
    elif floor in ORDER:
        allowed = {*ORDER[: ORDER.index(floor) + 1], *(beside for beside, users in BESIDE.items() if floor in users)}
    else:
        return []  # `misplaced` tells of it
    wrong = sorted(target for target in modules.imports(name) if floor_of(target) not in allowed)
    return [f"{name or '__init__'} imports {target or 'the package itself'}" for target in wrong]


def private(modules: Modules, name: str) -> list[str]:
    """Private names of another module that a module uses."""

    def is_private(word: str) -> bool:
        return word.startswith("_") and not word.endswith("__")

    wrong = []
    aliases = modules.aliases(name)
    for node in ast.walk(modules.trees[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_lora":
            wrong += [f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in aliases:
            wrong.append(f"{aliases[ast.unparse(node.value)]}.{node.attr}")
    return [f"{name} uses {word}" for word in wrong]


def leftovers(modules: Modules, name: str) -> list[str]:
    """A module whose name says nothing."""
    return [f"{name}: name the module after its idea"] if LEFTOVERS & set(name.split(".")) else []


def undescribed(modules: Modules, name: str) -> list[str]:
    """Public names without a docstring."""
    tree = modules.trees[name]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bare = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    return [f"{name or '__init__'} itself"] * (not ast.get_docstring(tree)) + [f"{name}.{word}" for word in bare]


def asserts(modules: Modules, name: str) -> list[str]:
    """`assert`, which `python -O` leaves out."""
    lines = [node.lineno for node in ast.walk(modules.trees[name]) if isinstance(node, ast.Assert)]
    return [f"{name}, line {line}: raise ValueError or GemmaLoraError instead" for line in lines]


def early_keras(modules: Modules, name: str) -> list[str]:
    """Keras imported before its backend is chosen, or KerasHub and TensorFlow before a model is loaded.

    Else the first name that somebody uses decides: Keras alone would take TensorFlow.
    """
    wrong = []
    waiting = list(modules.trees[name].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        heads = {word.split(".")[0] for word in found} & set(HEAVY)
        wrong += sorted(heads - ({"keras"} if name in KERAS else set()))
    return [f"{name} imports {word} at its top: take it from base.keras_on_jax, or import it inside" for word in wrong]


RULES: list[Callable[[Modules, str], list[str]]] = [
    misplaced,
    upward,
    private,
    leftovers,
    undescribed,
    asserts,
    early_keras,
]


def cycles(modules: Modules) -> list[str]:
    """Circles of imports, those inside functions counted; each is told once, from where it was entered."""
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name in modules.trees and name not in done:
            for target in sorted(modules.imports(name)):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(modules.trees):
        visit(name, [])
    return found


# --- the package -------------------------------------------------------------------------------------------

PATHS = sorted(PACKAGE.rglob("*.py"))
REAL = Modules({name_of(path): path.read_text(encoding="utf-8") for path in PATHS})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule):
    wrong = [line for name in REAL.trees for line in rule(REAL, name)]
    assert not wrong, f"{rule.__doc__}\n" + "\n".join(wrong)


def test_nothing_imports_in_a_circle():
    assert cycles(REAL) == []


def test_every_floor_exists_and_every_folder_is_a_package():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {floor for floor in [*ORDER, *BESIDE] if floor not in REAL.trees} <= PLANNED
    assert folders <= set(REAL.trees), "a folder without __init__.py is not installed"
    assert folders <= {*ORDER, *BESIDE}, "give the folder a place in ORDER or BESIDE, and in docs/design.md"


# --- the rules see what they should ------------------------------------------------------------------------

LAZY = '_MODULES = {"layer": ["apply_lora"]}'
BAD = [
    (misplaced, {"extras.x": ""}),
    (misplaced, {"extras": ""}),
    (upward, {"layers.x": "from gemma_lora.lora import layer"}),
    (upward, {"layers.x": "from gemma_lora.lora.layer import apply_lora"}),
    (upward, {"layers.x": "import gemma_lora.lora.layer"}),
    (upward, {"layers.x": "def f():\n    if True:\n        from gemma_lora.lora.layer import apply_lora"}),
    (upward, {"layers.x": "from gemma_lora import lora"}),
    (upward, {"layers.x": "from gemma_lora import apply_lora", "": '_MODULES = {"lora.layer": ["apply_lora"]}'}),
    (upward, {"layers.x": "from gemma_lora import gguf"}),  # an old name
    (upward, {"layers.x": "import gemma_lora.gguf"}),
    (upward, {"layers.x": "import gemma_lora"}),
    (upward, {"layers.x": "from ..lora import layer"}),
    (upward, {"job.x": "from gemma_lora.cli import main"}),
    (upward, {"job.x": "from gemma_lora.checks import merge"}),
    (upward, {"training.x": "def f():\n    from gemma_lora.plots import loss_curve"}),
    (upward, {"": "from gemma_lora.lora import layer"}),
    (upward, {"moved": "from gemma_lora.lora import layer"}),
    (private, {"lora.x": "from gemma_lora.lora.layer import _replace"}),
    (private, {"lora.x": "from gemma_lora.lora import layer as lora\nlora._replace(1)"}),
    (private, {"lora.x": "def f():\n    from gemma_lora.lora import layer\n    layer._replace(1)"}),
    (private, {"lora.x": "import gemma_lora.lora.layer\ngemma_lora.lora.layer._replace(1)"}),
    (private, {"lora.x": "import gemma_lora.lora.layer as here\nhere._replace(1)"}),
    (private, {"lora.x": "from gemma_lora import packed\npacked._rows"}),
    (leftovers, {"lora.utils": ""}),
    (leftovers, {"helpers.x": ""}),
    (undescribed, {"lora.x": "def f():\n    return 1"}),
    (undescribed, {"lora.x": '"""It."""\nclass A:\n    b = 1'}),
    (asserts, {"lora.x": "def f(x):\n    assert x"}),
    (early_keras, {"lora.x": "import keras"}),
    (early_keras, {"lora.x": "from keras import ops"}),
    (early_keras, {"lora.x": "import keras.layers as layers"}),
    (early_keras, {"lora.x": "try:\n    import keras_hub\nexcept ImportError:\n    pass"}),
    (early_keras, {"lora.x": "class A:\n    import tensorflow"}),
    (early_keras, {"base.keras_on_jax": "import keras_hub"}),
]


def made_up(sources: dict[str, str]) -> Modules:
    return Modules({"lora": LAZY, "lora.layer": "", "quantization.packed": "", "plots": ""} | sources)


@pytest.mark.parametrize(("rule", "sources"), BAD, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(BAD)])
def test_what_breaks_the_rule_is_found(rule, sources):
    assert rule(made_up(sources), next(iter(sources)))


def test_there_is_a_bad_module_for_every_rule():
    assert {rule for rule, _ in BAD} == set(RULES)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lora.x", "import json, keras_nlp_like\nfrom os import path\nfrom gemma_lora.lora import layer"),
        ("lora.x", "from gemma_lora.base.keras_on_jax import keras, ops\nfrom gemma_lora import __version__"),
        (
            "layers.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import keras\n    import gemma_lora.lora",
        ),
        ("gemma.x", "def _f():\n    import keras_hub\n    from gemma_lora.lora.layer import apply_lora"),
        ("gemma.x", "from gemma_lora.lora import layer\nlayer.base._kernel\nx._tracker\nlayer.__doc__"),
        ("job.x", "from gemma_lora.plots import loss_curve"),
        ("plots.x", "from gemma_lora.training import tuner"),
        ("base.keras_on_jax", "import keras\nfrom keras import ops"),
    ],
)
def test_what_breaks_no_rule_is_left_alone(name, source):
    modules = made_up({name: f'"""It."""\n{source}'})
    assert [line for rule in RULES for line in rule(modules, name)] == []


CIRCLES = [
    {"a": "import gemma_lora.b", "b": "import gemma_lora.a"},
    {
        "a": "from gemma_lora import b",
        "b": "def f():\n    from gemma_lora.c import x",
        "c": "from gemma_lora.a import y",
    },
    {"lora.layer": "from gemma_lora.base import x", "base.x": "def f():\n    from gemma_lora.lora import apply_lora"},
]


@pytest.mark.parametrize("sources", CIRCLES)
def test_a_circle_is_found(sources):
    assert len(cycles(made_up(sources))) == 1


def test_a_circle_for_types_only_is_none():
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gemma_lora.a"
    assert cycles(Modules({"a": "import gemma_lora.b", "b": types})) == []


# --- old names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), moved.MOVED.items())
def test_an_old_module_name_gives_the_module_by_every_form_of_import(old, new):
    module = importlib.import_module(f"gemma_lora.{new}")
    names: dict[str, object] = {}
    exec(f"from gemma_lora import {old} as first\nimport gemma_lora.{old}\nimport gemma_lora.{old} as second", names)
    exec(f"from gemma_lora.{old} import __name__ as third", names)
    assert names["first"] is names["second"] is getattr(names["gemma_lora"], old) is module
    assert names["third"] == module.__name__ == module.__spec__.name == f"gemma_lora.{new}"


#: Public names of the flat package, by the path they were imported from.
OLD_NAMES = json.loads((Path(__file__).parent / "old_names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("old", "names"), OLD_NAMES.items(), ids=list(OLD_NAMES))
def test_what_users_imported_is_still_there(old, names):
    module = importlib.import_module(f"gemma_lora.{old}")
    gone = [name for name in names if not hasattr(module, name)]
    assert not gone, (
        f"`from gemma_lora.{old} import {', '.join(gone)}` worked in version 0.1.0 and fails now. Hand it on from "
        f"{module.__name__}; where it makes no sense any more, take it out of tests/old_names.json and tell of it in "
        "CHANGELOG.md."
    )


def test_an_old_name_runs_as_a_program():
    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout.strip()

    assert run("-m", "gemma_lora.files") == (0, "")
    assert run("-m", "gemma_lora.nowhere") == (1, "")
    code = "import runpy; print(runpy.run_module('gemma_lora.files')['sha256_of'].__code__.co_filename)"
    assert run("-c", code) == (0, str(PACKAGE / "base" / "files.py"))


def test_every_exported_name_exists_and_is_listed():
    assert set(gemma_lora.__all__) <= set(dir(gemma_lora))
    for name in gemma_lora.__all__:
        assert getattr(gemma_lora, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gemma_lora.no_such_name


@pytest.mark.parametrize("folder", [name for name, handed in REAL.handed_on.items() if name and handed])
def test_every_name_that_a_folder_hands_on_exists_and_is_listed(folder):
    package = importlib.import_module(f"gemma_lora.{folder}")
    assert set(package.__all__) == set(REAL.handed_on[folder]) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None


# --- usable alone ------------------------------------------------------------------------------------------

WITHOUT_KERASHUB = """
import importlib, sys
sys.modules["keras_hub"] = sys.modules["tensorflow"] = None  # importing them now fails
import gemma_lora
assert gemma_lora.LoRADense  # the first name used; it imports Keras, which must take JAX
for name in {names}:
    importlib.import_module("gemma_lora." + name)
import jax.numpy as jnp, keras
assert keras.backend.backend() == "jax"
from gemma_lora.lora import LoRADense
from gemma_lora.loss import chunked_cross_entropy
dense = keras.layers.Dense(4)
dense.build((None, 3))
layer = LoRADense(dense, rank=2)
assert layer(jnp.ones((5, 3))).shape == (5, 4)
loss = chunked_cross_entropy(jnp.ones((3, 4)), jnp.eye(4), jnp.zeros(3, "int32"), jnp.ones(3))
assert abs(float(loss) - 1.3863) < 1e-3
"""


@pytest.mark.slow
def test_the_numbers_and_layers_need_no_kerashub():
    script = WITHOUT_KERASHUB.format(names=ALONE)
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
