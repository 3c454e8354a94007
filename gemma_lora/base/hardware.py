"""What this machine is, how much memory the process has used, and XLA's cache of compiled programs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

from gemma_lora.base import devices

_ONE_KIB = 1024


def peak_memory_bytes() -> int:
    """The most memory used so far, in bytes: of the GPU or TPU that JAX computes on, else of this process."""
    if "jax" in sys.modules and (peak := devices.device().peak_bytes) is not None:
        return peak
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """The process's peak resident memory so far, in bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _ONE_KIB  # macOS counts bytes, Linux KiB


def memory_bytes() -> int:
    """The process's resident memory now, in bytes (the peak where the system does not tell)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return process_peak_bytes()


def machine_memory_bytes() -> int:
    """The machine's memory in bytes; 0 where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def machine() -> dict[str, str | int]:
    """A description of this machine for reports: processor, cores, memory, Python, devices and their memory."""
    import jax

    found = devices.device()
    described: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "fast_bfloat16": has_fast_bfloat16(),
        "memory_bytes": machine_memory_bytes(),
        "python": platform.python_version(),
        "devices": ", ".join(sorted({device.device_kind for device in jax.devices()})),
        "device_count": found.count,
    }
    if found.memory_bytes is not None:
        described["device_memory_bytes"] = found.memory_bytes
    if found.capability is not None:
        described["compute_capability"] = str(found.capability)
    return described


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 numbers are faster here than of float32.

    On a CPU without AVX512-BF16 or AMX a bfloat16 product takes up to twice as long as a float32 one, since the numbers
    are widened first. GPUs have units for it from compute capability 8.0 on: a T4 (7.5) and a P100 (6.0) have none.
    """
    return _bfloat16_units()[0]


def _bfloat16_units() -> tuple[bool, str]:
    """Whether there are units for bfloat16 products, and what says so."""
    found = devices.device()
    if found.kind == "cpu":
        units = sorted({"avx512_bf16", "amx_bf16", "bf16"} & _instructions())
        return bool(units), f"this processor has {units[0]}" if units else "this processor has no bfloat16 products"
    if not found.has_bfloat16_units:
        return False, f"{found.name} (compute capability {found.capability}) has no bfloat16 units"
    return True, f"{found.name} has bfloat16 units"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How products are formed, and why: see `choose`."""

    mixed_precision: bool
    filter_gradient: bool
    reason: str

    def __str__(self) -> str:
        precision = "mixed precision (bfloat16 factors, float32 sums)" if self.mixed_precision else "no mixed precision"
        filtered = "gradient filter on" if self.filter_gradient else "gradient filter off"
        return f"{precision}, since {self.reason}; {filtered}"


def choose(mixed_precision: bool | None, filter_gradient: bool | None = None, dtype: str = "float32") -> Choice:
    """What is faster on this machine, where None leaves the choice: the same for every entrance.

    Args:
        mixed_precision: True or False as asked for, or None.
        filter_gradient: True or False as asked for, or None: on. In a trained state it drops 0.3 % of the gradient's
            length and saves a sixth of the loss's time.
        dtype: What the model computes in. Mixed precision is for float32 models; float16 is never chosen.

    Returns:
        A `Choice`.

    Example:

    >>> choose(False).mixed_precision, choose(True, False).reason
    (False, 'it was asked for')
    """
    filtered = True if filter_gradient is None else filter_gradient
    if dtype != "float32":
        return Choice(False, filtered, f"the model computes in {dtype}")
    if mixed_precision is not None:
        return Choice(mixed_precision, filtered, "it was asked for")
    fast, reason = _bfloat16_units()
    return Choice(fast, filtered, reason)


def _instructions() -> set[str]:
    """The processor's instruction sets by Linux's names (`bf16` is ARM's); empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = [line.split(":", 1)[1] for line in file if line.startswith(("flags", "Features"))]
        return set(flags[0].split()) if flags else set()
    except OSError:
        return set()


def use_compilation_cache() -> None:
    """Keeps XLA's compiled programs in the user's cache folder, so that a second run starts at once."""
    import jax

    from gemma_lora.base.files import cache_dir

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


@functools.cache
def compiler_options() -> dict[str, str]:
    """XLA's options for a training step: on a CPU, order the operations so that little is alive at once.

    XLA's default there is to keep many operations ready to run side by side. On two cores that gained nothing: a step
    of Gemma 3 270M with 4 x 256 tokens took as long either way, and by default holds 1.56 GB in place of 1.21.

    Returns:
        Options for `jax.jit`; empty on other devices, and where this XLA does not know the option.
    """
    import jax

    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
    except Exception:  # another version's XLA; which error it raises is not documented
        return {}
    return options


class Program:
    """A jitted function that gives memory back to the system after compiling, before it runs.

    Compiling a training step leaves some hundred megabytes with the allocator, which would stand beside the step's
    own at its peak.

    Args:
        function: Takes and gives pytrees of arrays.
        donate: Positions of arguments whose arrays the results may take the place of.
    """

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...]):
        import jax

        self._jitted = jax.jit(function, donate_argnums=donate, compiler_options=compiler_options())
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        import jax

        leaves, structure = jax.tree.flatten(arguments)
        kind = (structure, *map(jax.typeof, leaves))
        if kind not in self._compiled:
            self._compiled[kind] = self._jitted.lower(*arguments).compile()
            release_memory()
        return self._compiled[kind](*arguments)


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep what is freed for the next request; does nothing with other C libraries.

    A training step on the CPU asks for all its activations anew, about 1 GB, and by default the system hands that out
    page by page, each filled with zeros: a tenth of a step on two cores. `release_memory` still gives memory back.

    It holds for the whole process and for threads that start later, so call it before JAX is used.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads, the only one that can grow so far
            mallopt(-4, 0)  # M_MMAP_MAX: nothing beside the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give free memory back only from 2 GB on


def release_memory() -> None:
    """Asks glibc's allocator to give its free memory back to the system; does nothing elsewhere."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
