"""What a training asks of its devices: rows that can be divided among them, and memory; each with a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gemma_lora.base import devices
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.hardware import machine_memory_bytes
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.gemma import memory
from gemma_lora.gemma.weights import backbone_of
from gemma_lora.lora.apply import lora_layers

#: XLA's words for memory that it cannot have, on any device.
_EXHAUSTED = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OOM")


def check_floatx() -> None:
    """Raises where Keras adds up its metrics in fewer than 32 bits: a mean of losses would be off by up to 1.25."""
    kind = keras.config.floatx()
    if kind not in ("float32", "float64"):
        raise GemmaLoraError(
            f"keras.config.floatx() is {kind!r}: Keras adds up the losses that it shows and compares in it, and they "
            'would be wrong. Call `keras.config.set_floatx("float32")`; for a model in bfloat16 '
            'give `load_gemma(dtype="bfloat16")`.'
        )


def check_rows(rows: int) -> None:
    """Raises where Keras's distribution divides a batch among devices and these rows cannot be divided.

    Args:
        rows: Integer, a batch's rows.
    """
    distribution = keras.distribution.distribution()
    mesh = getattr(distribution, "device_mesh", None)
    name = getattr(distribution, "batch_dim_name", None)
    if mesh is None or name not in mesh.axis_names:
        return
    parts = mesh.shape[mesh.axis_names.index(name)]
    if rows % parts:
        raise GemmaLoraError(
            f"{type(distribution).__name__} divides a batch among {parts} devices, and its {rows} "
            f"row{'s' if rows > 1 else ''} cannot be divided. Give `FineTuner(rows=…)` a multiple of {parts} (arrays: "
            f"`batch_size`), such as {parts * -(-rows // parts)}, or take the distribution away with "
            "`keras.distribution.set_distribution(None)`."
        )


def check_arrays(x: Any, batch_size: int) -> None:
    """`check_rows` for the batches that Keras makes of arrays, the last and shorter one too."""
    first: Any = next(iter(keras.tree.flatten(x)), None) if isinstance(x, dict | list | tuple) else x
    count = len(first) if getattr(first, "shape", ()) else 0
    for rows in {min(batch_size, count), count % batch_size} - {0}:
        check_rows(rows)


@contextlib.contextmanager
def answering_out_of_memory(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Within, an out-of-memory error of the device becomes a `GemmaLoraError` that says what to change.

    Args:
        model: A KerasHub Gemma.
        settings: Of `FineTuner`'s settings `rows`, `row_length`, `accumulate`, `remat` and `mixed_precision` are read.
    """
    try:
        yield
    except Exception as error:  # XLA's own class, which has moved between versions of jaxlib
        if isinstance(error, GemmaLoraError) or not any(word in str(error) for word in _EXHAUSTED):
            raise
        raise GemmaLoraError(advice(model, settings, devices.device())) from error


def advice(model: Any, settings: dict[str, Any], device: devices.Device) -> str:
    """What to change where a training step does not fit, computed by the memory plan for a device.

    Returns:
        Sentences: what the step takes by the plan, and each change with what it would take then, the least first.
    """
    backbone = backbone_of(model)
    limit = device.memory_bytes or machine_memory_bytes()
    rows = settings["rows"]
    asked = _asked(model, settings, device)
    configuration = memory.configuration_of(backbone)
    now = memory.plan(configuration, rows=rows, **asked).total
    changes = []
    if rows > 1:
        fitting = min(max(memory.most_rows(configuration, int(limit), **asked), 1), rows // 2)
        fewer = memory.plan(configuration, rows=fitting, **asked).total
        steps = settings["accumulate"] * -(-rows // fitting)
        changes.append((fewer, f"`rows={fitting}, accumulate={steps}`, which trains on as many rows per step"))
    if not asked["remat"]:
        again = memory.plan(configuration, rows=rows, **asked | {"remat": True}).total
        changes.append((again, "`remat=True`, which takes more time"))
    if asked["method"] == "lora":
        packed = asked | {"method": "qlora", "mixed_precision": False, "quantization": "nf4"}
        changes.append((memory.plan(configuration, rows=rows, **packed).total, '`quantization="nf4"` in `load_gemma`'))
    half = asked | {"row_length": max(settings["row_length"] // 2, 1)}
    shorter = f"`row_length={half['row_length']}`, if your lines fit"
    changes.append((memory.plan(configuration, rows=rows, **half).total, shorter))
    listed = "; ".join(f"{change}: {_gigabytes(total)}" for total, change in sorted(changes))
    return (
        f"The memory of {device.name} is not enough. By the plan a step of {rows} × {settings['row_length']} tokens "
        f"takes {_gigabytes(now)} of {_gigabytes(limit)}. What takes less, with what it takes then: {listed}."
        f"{_PREALLOCATION if device.kind == 'gpu' else ''}"
    )


#: Why a GPU may have more memory than JAX says.
_PREALLOCATION = (
    " JAX reserves three quarters of a GPU's memory at its start and works within that; another program on the GPU "
    "leaves it less. XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, set before JAX is imported, reserves more; "
    "XLA_PYTHON_CLIENT_PREALLOCATE=false takes memory only as it is needed."
)


def _asked(model: Any, settings: dict[str, Any], device: devices.Device) -> dict[str, Any]:
    """The arguments of `memory.plan`, without rows, for a training of this model."""
    layers = lora_layers(model)
    packed = [layer for layer in layers if layer.is_packed]
    method = "qlora" if packed else "lora" if layers else "full"
    return {
        "method": method,
        "rank": max((layer.rank for layer in layers), default=1),
        "row_length": settings["row_length"],
        "dtype": str(backbone_of(model).compute_dtype),
        "remat": bool(settings["remat"]),
        "mixed_precision": bool(settings["mixed_precision"]),
        "accelerator": device.kind != "cpu",
    }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
