"""Nothing in Keras, KerasHub or TensorFlow is changed from outside while the package runs.

How a layer computes is what the layer is. A method, class or attribute that is put in its place from elsewhere can be
overwritten by the next one who does so, and no reader of the layer sees it. So the package's syntax trees are read.
What must stay is in `ALLOWED`, one file for one reason.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma_lora

PACKAGE = Path(gemma_lora.__file__).parent

#: (file, kind) -> why it must be so. The kinds are those of `KINDS`.
ALLOWED = {
    ("base/lazy_tensorflow.py", "module"): "KerasHub imports TensorFlow wherever it finds it; a stand-in waits there",
    ("layers/surgery.py", "tracker"): "Keras locks a built layer's list of sub-layers; to swap one, it is opened",
    ("layers/surgery.py", "computed"): "the swapped layer is set as the attribute that held the old one",
    ("layers/surgery.py", "private"): "in a functional model the graph's nodes name the layer too",
    ("training/states.py", "computed"): "a callback gets back the counters it had when the checkpoint was written",
    ("gemma/unfilled.py", "state"): "Keras fills variables that wait as soon as a scope ends; a file fills these",
}

KINDS = {
    "method": "a method is replaced (`layer.call = …`)",
    "class": "an object's class is swapped (`x.__class__ = …`)",
    "bound": "a function is bound to an object (`types.MethodType`)",
    "dictionary": "an object's dictionary is written (`vars(x).pop(…)`, `x.__dict__[…] = …`)",
    "deletion": "an object's attribute is deleted (`del x.y`)",
    "module": "a library's module is written (`keras.x = …`, `sys.modules[…] = …`)",
    "tracker": "Keras's lock of a built layer is touched (`x._tracker`)",
    "private": "a private attribute of another object is set (`x._kernel = …`)",
    "state": "Keras's global state is written (`set_global_attribute(…)`)",
    "computed": "an attribute with a computed name is set on another object (`setattr(x, name, …)`)",
}
LIBRARIES = ("keras", "keras_hub", "tensorflow", "tensorflow_text")
METHODS = ("call", "__call__")
WRITES = ("pop", "popitem", "update", "setdefault", "clear", "__setitem__", "__delitem__")


def patches(source: str) -> list[tuple[int, str]]:
    """`(line, kind)` of everything in a module's source that changes another object from outside."""
    tree = ast.parse(source)
    libraries = _library_names(tree)
    return sorted({(_line(node), kind) for node in ast.walk(tree) for kind in _kinds(node, libraries)})


def _line(node: ast.AST) -> int:
    """A `with` item and a comprehension have no line; what they assign to has one."""
    written = node.optional_vars if isinstance(node, ast.withitem) else getattr(node, "target", None)
    return getattr(node, "lineno", None) or getattr(written, "lineno", 0)


def _kinds(node: ast.AST, libraries: set[str]) -> Iterator[str]:
    for target in _written(node):
        yield from _of_target(target, libraries)
    for target in node.targets if isinstance(node, ast.Delete) else []:
        yield from _of_deleted(target)
    if isinstance(node, ast.Call):
        yield from _of_call(node, libraries)
    if isinstance(node, ast.Attribute) and node.attr == "_tracker" and not _is_self(node.value):
        yield "tracker"
    if isinstance(node, ast.Attribute) and node.attr == "MethodType":
        yield "bound"
    if isinstance(node, ast.ImportFrom) and node.module == "types" and "MethodType" in [a.name for a in node.names]:
        yield "bound"


def _written(node: ast.AST) -> list[ast.expr]:
    """The single targets that a statement assigns to, those inside tuples too."""
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor | ast.comprehension):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    else:
        return []
    flat: list[ast.expr] = []
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        else:
            flat.append(target.value if isinstance(target, ast.Starred) else target)
    return flat


def _of_target(target: ast.expr, libraries: set[str]) -> Iterator[str]:
    if isinstance(target, ast.Attribute):
        yield from _of_name(target.value, target.attr)
        if _first_name(target) in libraries:
            yield "module"
    elif isinstance(target, ast.Subscript):
        if _is_dictionary(target.value):
            yield "dictionary"
        if _is_sys_modules(target.value):
            yield "module"


def _of_name(owner: ast.expr, attribute: str) -> Iterator[str]:
    """For an attribute that is set, by a statement or by `setattr`."""
    if attribute == "__class__":
        yield "class"
    elif attribute in METHODS or (attribute.startswith("_compute") and not _is_self(owner)):
        yield "method"
    elif attribute.startswith("_") and not attribute.endswith("__") and not _is_self(owner):
        yield "private"


def _of_deleted(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Attribute) and not _is_self(target.value):
        yield "deletion"
    elif isinstance(target, ast.Subscript):
        if _is_dictionary(target.value):
            yield "dictionary"
        if _is_sys_modules(target.value):
            yield "module"


def _of_call(node: ast.Call, libraries: set[str]) -> Iterator[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    if name in ("setattr", "__setattr__") and len(node.args) >= 2:
        owner, attribute = node.args[:2]
        if isinstance(attribute, ast.Constant) and isinstance(attribute.value, str):
            yield from _of_name(owner, attribute.value)
        elif not _is_self(owner):
            yield "computed"
        if _first_name(owner) in libraries:
            yield "module"
    elif name == "set_global_attribute":
        yield "state"
    elif name == "delattr" and node.args and not _is_self(node.args[0]):
        yield "deletion"
    elif name in WRITES and isinstance(node.func, ast.Attribute):
        if _is_dictionary(node.func.value):
            yield "dictionary"
        if _is_sys_modules(node.func.value):
            yield "module"


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_dictionary(node: ast.expr) -> bool:
    """`vars(x)` or `x.__dict__`, of any x but self."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "vars" and node.args:
        return not _is_self(node.args[0])
    return isinstance(node, ast.Attribute) and node.attr == "__dict__" and not _is_self(node.value)


def _is_sys_modules(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "modules" and _first_name(node) == "sys"


def _first_name(node: ast.expr) -> str:
    """`a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _library_names(tree: ast.AST) -> set[str]:
    """What a module calls a library, or something that it imported from one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias for alias in node.names if alias.name.split(".")[0] in LIBRARIES]
            names |= {alias.asname or alias.name.split(".")[0] for alias in found}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            from_ours = module == "gemma_lora.base.keras_on_jax"
            if module.split(".")[0] in LIBRARIES or from_ours:
                names |= {alias.asname or alias.name for alias in node.names}
    return names


# --- the package -------------------------------------------------------------------------------------------


def found_in(path: Path) -> list[tuple[int, str]]:
    return patches(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_nothing_is_patched(path):
    file = path.relative_to(PACKAGE).as_posix()
    wrong = [f"{file}:{line}: {KINDS[kind]}" for line, kind in found_in(path) if (file, kind) not in ALLOWED]
    assert not wrong, "\n".join(
        [*wrong, "Let the layer or matrix be what it computes instead; see docs/design.md, “One forward pass”."]
    )


@pytest.mark.parametrize(("file", "kind"), ALLOWED, ids=lambda part: part)
def test_what_is_allowed_is_needed(file, kind):
    path = PACKAGE / file
    kinds = {kind for _, kind in found_in(path)} if path.is_file() else set()
    assert kind in kinds, f"{file} needs no {kind!r}: take it out of ALLOWED"


# --- the rules see what they should ------------------------------------------------------------------------

BAD = [
    ("method", "layer.call = f"),
    ("method", "block.attention.call = f"),
    ("method", "a, layer.call = 1, f"),
    ("method", "layer.call: object = f"),
    ("method", "for layer.call in functions: pass"),
    ("method", "with g() as layer.call: pass"),
    ("method", "x = [0 for layer.call in functions]"),
    ("method", "cls.__call__ = f"),
    ("method", "def g(self):\n    self.call = f"),
    ("method", "block.attention._compute_attention = f"),
    ("method", "setattr(layer, 'call', f)"),
    ("method", "object.__setattr__(layer, 'call', f)"),
    ("class", "embedding.__class__ = Other"),
    ("class", "def g(self):\n    self.__class__ = Other"),
    ("class", "setattr(x, '__class__', Other)"),
    ("bound", "import types\nf = types.MethodType(g, layer)"),
    ("bound", "from types import MethodType"),
    ("dictionary", "vars(layer).pop('call', None)"),
    ("dictionary", "vars(layer)['call'] = f"),
    ("dictionary", "layer.__dict__['call'] = f"),
    ("dictionary", "x = layer.__dict__['call'] = f"),
    ("dictionary", "layer.__dict__.update(call=f)"),
    ("dictionary", "del layer.__dict__['call']"),
    ("deletion", "del layer.call"),
    ("deletion", "del a, embedding._embeddings"),
    ("deletion", "delattr(layer, name)"),
    ("module", "import keras\nkeras.layers.Dense = Mine"),
    ("module", "import keras_hub as hub\nhub.models.x = 1"),
    ("module", "from keras import layers\nlayers.Dense = Mine"),
    ("module", "from gemma_lora.base.keras_on_jax import ops\nops.matmul = mine"),
    ("module", "import keras\nsetattr(keras.ops, 'matmul', mine)"),
    ("module", "import sys\nsys.modules['tensorflow'] = None"),
    ("module", "import sys\nsys.modules.update(x)"),
    ("module", "import sys\ndel sys.modules['tensorflow']"),
    ("state", "global_state.set_global_attribute('name', [])"),
    ("state", "set_global_attribute('name', [])"),
    ("tracker", "parent._tracker.unlock()"),
    ("tracker", "with_lock(layer._tracker)"),
    ("private", "tensor._keras_history = history"),
    ("private", "a, layer._kernel = 1, 2"),
    ("private", "setattr(layer, '_kernel', 1)"),
    ("computed", "setattr(parent, attribute, layer)"),
]


@pytest.mark.parametrize(("kind", "source"), BAD, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(BAD)])
def test_a_patch_is_found(kind, source):
    assert kind in {found for _, found in patches(source)}


def test_every_kind_has_a_control():
    assert {kind for kind, _ in BAD} == set(KINDS) and {kind for _, kind in ALLOWED} <= set(KINDS)


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def call(self, x):\n        return x\n    __call__ = call",
        "def g(self):\n    self.kernel = self._kernel = 1\n    self._compute_scale = 2",
        "def g(self):\n    del self.cache\n    vars(self).pop('x')",
        "def g(self, name):\n    setattr(self, name, 1)\n    self._tracker.lock()",
        "state = vars(model).get('x')\nfor name, value in vars(layer).items():\n    pass",
        "import sys\nloaded = 'keras' in sys.modules\ndel names[0]\nnames['call'] = f",
        "layer.trainable = False\nlayer.bias = None\ny = layer.call(x)\nlayer.call(x).shape",
        "import keras\nx = keras.ops.ones(3)\nkeras.utils.set_random_seed(1)",
    ],
)
def test_what_is_no_patch_is_left_alone(source):
    assert patches(source) == []
