"""What every lesson's first cell does once the package is there: backend, precision, device, folder."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from gemma_lora.base import devices
from gemma_lora.base.backend import require_jax
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.hardware import choose, keep_freed_memory, machine_memory_bytes

#: What a lesson reads beside the package, from the course's folder.
_DATA = "data/expenses"
#: Where Kaggle puts the data sets that a notebook has attached.
_ATTACHED = Path("/kaggle/input")


def begin(start: str | os.PathLike = ".") -> Path:
    """Chooses Keras's backend and the precision of products, and prints what JAX computes on.

    On a GPU or TPU float32 products are set to full precision. By default such a device rounds their factors to TF32
    or bfloat16, 11 or 8 significant bits instead of 24, and the lessons compare two ways to the same number to the
    sixth digit. Fine-tuning, where speed counts, rounds by a setting of its own (`mixed_precision`), which stays.

    Args:
        start: The notebook's folder.

    Returns:
        The folder that holds the course's `data` and `benchmarks/results`.

    Raises:
        GemmaLoraError: If Keras runs on another backend or in an older version, if there is an accelerator that JAX
            does not use, or if the course's folder is not found.
    """
    _require_fresh_keras()
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "jax"  # whatever the session had chosen
    require_jax()
    keep_freed_memory()  # before JAX starts its threads
    kind = devices.platform()
    devices.require_accelerator_in_use()
    precision = _full_precision(kind)
    devices.keep_tensorflow_off_the_device()
    print(f"{_described(devices.device())}\n{precision}\nFine-tuning: {choose(None)}.")
    return course_folder(start)


def _require_fresh_keras() -> None:
    """Raises where Keras was imported before the package's version of it was installed: a restart mends that."""
    running = getattr(sys.modules.get("keras"), "__version__", None)
    if running is not None and running != importlib.metadata.version("keras"):
        raise GemmaLoraError(
            f"Keras {running} was imported before {importlib.metadata.version('keras')} was installed. Restart the "
            "session (the kernel) and run this cell first; nothing is installed twice."
        )


def _full_precision(kind: str) -> str:
    """Sets the precision of float32 products where the device's default is lower; returns what was done."""
    if kind == "cpu":
        return "Products of float32 numbers are in float32."
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    return "Products of float32 numbers are set to full precision: by default this device rounds their factors."


def _described(device: devices.Device) -> str:
    import jax

    many = f", the first of {device.count}" if device.count > 1 else ""
    if device.kind == "cpu":
        gigabytes = machine_memory_bytes() / 1e9
        return f"JAX {jax.__version__} on the CPU, {os.cpu_count()} cores, {gigabytes:.0f} GB of memory."
    memory = f", {device.memory_bytes / 1e9:.1f} GB of its memory" if device.memory_bytes is not None else ""
    return f"JAX {jax.__version__} on {device.name}{many}{memory}."


def course_folder(start: str | os.PathLike = ".") -> Path:
    """The nearest folder with the course's data: `start`, one above it, `course` beside it, or an attached data set.

    Raises:
        GemmaLoraError: If there is none.
    """
    here = Path(start).resolve()
    attached = sorted(path.parents[1] for path in _ATTACHED.glob(f"*/**/{_DATA}")) if _ATTACHED.is_dir() else []
    for folder in (here, *here.parents, here / "course", *attached):
        if (folder / _DATA).is_dir():
            return folder
    raise GemmaLoraError(
        f"The lessons read `data` and `benchmarks/results`, and neither {here} nor a folder above it holds them. Put "
        "the folders of the course (or of its portable copy, `make portable`) beside the notebook; on Kaggle attach "
        "them as a data set."
    )
