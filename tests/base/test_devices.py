"""Devices as JAX describes them, with made-up ones in their place; accelerators that JAX does not use."""

import subprocess
import sys
import types

import jax
import pytest

from gemma_lora.base import devices, hardware
from gemma_lora.base.files import GemmaLoraError


def gpu(capability="7.5", peak=3_000, kind="Tesla T4"):
    stats = {"bytes_limit": 11_000, "peak_bytes_in_use": peak}
    return types.SimpleNamespace(device_kind=kind, compute_capability=capability, memory_stats=lambda: stats)


@pytest.fixture
def pretend(monkeypatch):
    """Puts devices in the place of JAX's."""

    def put(kind, *found):
        monkeypatch.setattr(jax, "default_backend", lambda: kind)
        monkeypatch.setattr(jax, "local_devices", lambda: list(found))

    return put


@pytest.mark.parametrize(
    ("capability", "number", "units"),
    [("6.0", 6.0, False), ("7.5", 7.5, False), ("8.0", 8.0, True), ("9.0", 9.0, True), ("10.0", 10.0, True)]
    + [("gfx90a", None, True), (None, None, True)],
)
def test_a_gpu_without_bfloat16_units_gets_float32(pretend, capability, number, units):
    pretend("gpu", gpu(capability))
    assert devices.device().capability == number and hardware.has_fast_bfloat16() is units
    choice = hardware.choose(None)
    assert choice.mixed_precision is units
    assert units or f"compute capability {capability}" in choice.reason


def test_memory_and_peak_are_the_devices_and_the_fullest_counts(pretend):
    pretend("gpu", gpu(peak=3_000), gpu(peak=5_000))
    found = devices.device()
    assert (found.count, found.memory_bytes, found.peak_bytes) == (2, 11_000, 5_000)
    assert hardware.peak_memory_bytes() == 5_000 < hardware.process_peak_bytes()
    assert hardware.machine()["device_memory_bytes"] == 11_000 and hardware.machine()["device_count"] == 2


def test_a_device_that_keeps_no_count_leaves_the_processs_peak(pretend):
    def no_count():
        raise NotImplementedError

    pretend("tpu", types.SimpleNamespace(device_kind="TPU v5 lite", memory_stats=no_count))
    found = devices.device()
    assert (found.memory_bytes, found.peak_bytes, found.has_bfloat16_units) == (None, None, True)
    assert hardware.peak_memory_bytes() == hardware.process_peak_bytes() > 0


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (RuntimeError("Unable to initialize backend 'cuda': no such thing\nmore"), "no such thing"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_platform_that_is_not_here_is_one_error(monkeypatch, raised, said):
    def none():
        raise raised

    monkeypatch.setattr(jax, "default_backend", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(GemmaLoraError, match=rf"JAX_PLATFORMS is 'cuda'.*{said}\).*unset JAX_PLATFORMS"):
        devices.platform()


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["tpu", "cuda"])
def test_loading_with_such_a_platform_is_that_error_and_no_traceback_of_kerass(asked):
    script = f"import os; os.environ['JAX_PLATFORMS'] = {asked!r}\nfrom gemma_lora.base.keras_on_jax import keras"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gemma_lora.base.files.GemmaLoraError: JAX_PLATFORMS is"), done.stderr


@pytest.mark.parametrize(
    ("variable", "files", "found"),
    [
        (None, {}, None),
        ("TPU_ACCELERATOR_TYPE", {}, "a TPU (TPU_ACCELERATOR_TYPE)"),
        (None, {"/dev/accel*": ["/dev/accel0"]}, "a TPU (/dev/accel0)"),
        (None, {"/dev/nvidia[0-9]*": ["/dev/nvidia0"]}, "a GPU (nvidia-smi)"),
    ],
)
def test_what_the_machine_has_is_seen(monkeypatch, variable, files, found):
    for name in devices._TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "v5litepod-1")
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: files.get(pattern, []))
    monkeypatch.setattr(devices.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if "GPU" in str(found) else None)
    assert devices.accelerator_here() == found


def test_tensorflow_is_told_to_leave_the_device_alone(pretend, monkeypatch):
    told = []

    def refuse_tpus(chosen, kind):
        told.append((chosen, kind))
        if kind == "TPU":
            raise RuntimeError("cannot be modified after being initialized")

    fake = types.SimpleNamespace(config=types.SimpleNamespace(set_visible_devices=refuse_tpus))
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    devices.keep_tensorflow_off_the_device()  # a CPU: nothing to keep free
    assert told == []
    pretend("gpu", gpu())
    devices.keep_tensorflow_off_the_device()
    assert told == [([], "GPU"), ([], "TPU")]


def test_the_package_needs_no_resource_module():
    """Windows has none."""
    script = "import sys; sys.modules['resource'] = None\nfrom gemma_lora.base import hardware\n"
    script += "print(hardware.process_peak_bytes(), hardware.machine_memory_bytes() > 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "True"], done.stderr
