"""A package's public names, imported when they are first used.

So `from gemma_lora.lora import low_rank` does not import Keras, and `import gemma_lora` imports nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_Hooks = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> _Hooks:
    """What a package's `__init__` needs to hand on names of its modules.

    Args:
        package: The package's `__name__`.
        modules: `{module: names}`, modules by their names inside the package, such as `"layer"` or `"gemma.load"`.

    Returns:
        `(__getattr__, __dir__, __all__)`. A module can be asked for like a name.

    Raises:
        ValueError: If a name stands in two modules.

    Example:

    >>> get, names, everything = lazy_names("gemma_lora.base", {"files": ["sha256_of"]})
    >>> get("sha256_of").__module__, everything
    ('gemma_lora.base.files', ['sha256_of'])
    """
    home: dict[str, str] = {}
    for module, names in modules.items():
        for name in names:
            if name in home:
                raise ValueError(f"`modules` names {name!r} twice: in {home[name]} and in {module}")
            home[name] = module

    def get(name: str) -> Any:
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*home, *modules}), sorted(home)
