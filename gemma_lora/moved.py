"""Where a module of the flat package stands today, so that old imports keep working.

`from gemma_lora import nf4`, `import gemma_lora.nf4` and `from gemma_lora.nf4 import quantize` all give the module
that stands in `MOVED`. Names that are folders today (`lora`, `data`, `quantization`, …) hand on what they held.
`tests/test_layering.py` tries each; the names that the old modules had are in `tests/old_names.json`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

#: The old name in `gemma_lora` -> the module today.
MOVED = {
    "adapters": "lora.houlsby",
    "backend": "base.backend",
    "bitnet": "layers.bitnet",
    "byte_model": "course.byte_model",
    "calibration": "quantization.calibration",
    "checkpoint": "training.checkpoint",
    "dora": "lora.dora",
    "evaluation": "generation.evaluation",
    "files": "base.files",
    "formats": "data.formats",
    "gguf": "gemma.gguf",
    "hardware": "base.hardware",
    "health": "training.health",
    "lazy_tensorflow": "base.lazy_tensorflow",
    "linear": "layers.linear",
    "loss": "layers.loss",
    "low_rank": "lora.low_rank",
    "memory": "gemma.memory",
    "mixed_precision": "layers.mixed_precision",
    "nf4": "quantization.nf4",
    "packed": "quantization.packed",
    "packing": "data.packing",
    "peft": "exchange.peft",
    "ptq": "lora.ptq",
    "qlora": "lora.qlora",
    "remat": "layers.remat",
    "templates": "data.templates",
    "ternary": "quantization.ternary",
    "transformer": "course.transformer",
    "traps": "course.traps",
}


class _Loader(importlib.abc.Loader):
    """Gives the module that stands elsewhere, as it is."""

    def __init__(self, name: str):
        self.name = name
        self.own_spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.own_spec = module.__spec__
        return module

    def get_code(self, fullname: str) -> Any:
        """For `python -m` with an old name."""
        spec = importlib.util.find_spec(self.name)
        return None if spec is None else spec.loader.get_code(self.name)  # type: ignore[union-attr]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has put the old name's there


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "gemma_lora" or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(f"gemma_lora.{MOVED[name]}"))


def install() -> None:
    """Lets Python's imports find the old names; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
