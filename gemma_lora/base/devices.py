"""What JAX computes on: its kind, bfloat16 units, memory and peak; and an accelerator that JAX does not use."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shutil
import sys
from typing import Any

from gemma_lora.base.files import GemmaLoraError

_FIRST_WITH_BFLOAT16 = 8.0  # NVIDIA's compute capability: 7.5 is a T4, 6.0 a P100, 8.0 an A100, 8.9 an L4
#: What says that there is a TPU: Colab's and Kaggle's environment, the devices of a TPU's virtual machine.
_TPU_VARIABLES = ("COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_NAME")
_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that JAX computes on, by default the first of its kind.

    Invariants: `kind` is "cpu", "gpu", "tpu" or what else JAX calls its backend. `capability` is None for what is not
    NVIDIA's. `memory_bytes` and `peak_bytes` are None where JAX does not tell: on a CPU they are the process's.
    """

    kind: str
    name: str
    count: int  # how many of them JAX sees on this host
    capability: float | None = None
    memory_bytes: int | None = None  # what JAX may use of one device
    peak_bytes: int | None = None  # the most it has used of one so far

    @property
    def has_bfloat16_units(self) -> bool:
        """Whether an accelerator multiplies bfloat16 faster than float32; of a CPU `hardware` knows."""
        return self.kind != "cpu" and not (self.capability is not None and self.capability < _FIRST_WITH_BFLOAT16)


def platform() -> str:
    """JAX's backend: "cpu", "gpu" or "tpu". The first call starts it.

    Raises:
        GemmaLoraError: If JAX_PLATFORMS asks for a device that JAX does not find here.
    """
    import jax

    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter from JAX's own assert, for cuda without its plugin
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms  # type: ignore[attr-defined]
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GemmaLoraError(
            f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device here ({first[:160]}). Unset it "
            "(`unset JAX_PLATFORMS`) and JAX takes what there is; or install JAX with that device's plugin."
        ) from error


def device() -> Device:
    """The device that JAX computes on, with its memory as it is now."""
    import jax

    kind = platform()
    devices = jax.local_devices()
    first = devices[0]
    stats = [_stats(one) for one in devices]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return Device(
        kind,
        first.device_kind,
        len(devices),
        _capability(first) if kind == "gpu" else None,
        stats[0].get("bytes_limit"),
        max(peaks, default=None),
    )


def _stats(one: Any) -> dict[str, int]:
    """A device's own count of its memory, in bytes; empty where it keeps none."""
    try:
        return one.memory_stats() or {}
    except Exception:  # a backend without the call; which error it raises is not documented
        return {}


def _capability(one: Any) -> float | None:
    """NVIDIA's compute capability, such as 7.5; None for AMD's names ("gfx90a") and where JAX does not tell."""
    text = str(getattr(one, "compute_capability", "") or "")
    return float(text) if text.replace(".", "", 1).isdigit() else None


def accelerator_here() -> str | None:
    """What of this machine says that it has an accelerator, whether JAX uses it or not; None where nothing does."""
    if shutil.which("nvidia-smi") and (glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*")):
        return "a GPU (nvidia-smi)"
    if found := next((name for name in _TPU_VARIABLES if os.environ.get(name)), None):
        return f"a TPU ({found})"
    if found := next((name for pattern in _TPU_FILES for name in sorted(glob.glob(pattern))), None):
        return f"a TPU ({found})"
    return None


def require_accelerator_in_use() -> None:
    """Raises if this machine has an accelerator and JAX computes on the CPU without having been told to.

    Raises:
        GemmaLoraError: It names what was found and how to make JAX use it.
    """
    import jax

    asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    if platform() != "cpu" or asked.split(",")[0] == "cpu" or (found := accelerator_here()) is None:
        return
    plugin = "cuda12" if found.startswith("a GPU") else "tpu"
    raise GemmaLoraError(
        f"This machine has {found}, but JAX {jax.__version__} computes on the CPU: its plugin is missing or of another "
        f'version. Put the two together again, `pip install "jax[{plugin}]=={jax.__version__}"`, and restart the '
        "session; on Colab or Kaggle a new session with its own JAX does as well. To stay on the CPU on purpose, set "
        "JAX_PLATFORMS=cpu before JAX is imported."
    )


def keep_tensorflow_off_the_device() -> None:
    """Tells TensorFlow, if it is imported, to use no accelerator: it would take a GPU's memory beside JAX."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None or not hasattr(tensorflow, "config") or platform() == "cpu":
        return
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError, ValueError):  # it runs there already
            tensorflow.config.set_visible_devices([], kind)
