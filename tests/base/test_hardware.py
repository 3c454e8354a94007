"""`Program`: a jitted function by another way, compiled once for each kind of arguments."""

import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.base import hardware


def test_a_program_gives_what_jit_gives_and_compiles_once_a_shape(monkeypatch):
    released = []
    monkeypatch.setattr(hardware, "release_memory", lambda: released.append(1))

    def function(state, data):
        return {"sum": state["a"] * data.sum()}, data + 1

    program, jitted = hardware.Program(function, donate=(0,)), jax.jit(function)
    for size in (3, 4, 3, 4):
        data = np.arange(size, dtype="float32")
        ours, theirs = program({"a": jnp.ones(2)}, data), jitted({"a": jnp.ones(2)}, data)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert len(released) == 2


def test_a_program_takes_the_place_of_donated_arrays_only():
    program = hardware.Program(lambda a, b: (a + b, b * 1), donate=(0,))
    a, b = jnp.ones(1000), jnp.ones(1000)
    program(a, b)
    assert a.is_deleted() and not b.is_deleted()


def test_options_are_for_cpus_only(monkeypatch):
    hardware.compiler_options.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert hardware.compiler_options() == {}
    hardware.compiler_options.cache_clear()


FAULTS = """
import ctypes, resource, sys, threading
from gemma_lora.base import hardware
libc = ctypes.CDLL("libc.so.6")
libc.aligned_alloc.restype = ctypes.c_void_p
if sys.argv[1] == "keep":
    hardware.keep_freed_memory()
def work():
    for _ in range(30):
        place = libc.aligned_alloc(64, ctypes.c_size_t(64_000_000))  # as XLA asks
        libc.memset(ctypes.c_void_p(place), 1, ctypes.c_size_t(64_000_000))
        libc.free(ctypes.c_void_p(place))
worker = threading.Thread(target=work)
worker.start()
worker.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_asking_the_system():
    """30 times 64 MB, one after another, in a thread: 1.9 GB of fresh pages, or what the heap takes to settle."""
    asked = {}
    for mode in ("plain", "keep"):
        done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        asked[mode] = float(done.stdout)
    assert asked["plain"] - asked["keep"] > 1000  # MB


def test_peak_memory_is_at_least_what_is_held_now():
    hardware.release_memory()
    assert 0 < hardware.memory_bytes() <= hardware.peak_memory_bytes()


@pytest.mark.parametrize(
    "line, fast",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sse", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16x", False),
        ("model name\t: avx512_bf16", False),
    ],
)
def test_fast_bfloat16_is_read_from_the_processors_flags(monkeypatch, tmp_path, line, fast):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr("builtins.open", lambda path, *a, original=open, **k: original(tmp_path / "cpuinfo", *a, **k))
    assert hardware.has_fast_bfloat16() is fast


def test_an_accelerator_is_fast_in_bfloat16(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert hardware.has_fast_bfloat16()
