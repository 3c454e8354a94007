"""What is said where a training does not fit its devices: memory, rows, Keras's default float."""

import types

import keras
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.base.devices import Device
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.gemma import memory
from gemma_lora.training import devices

T4 = Device("gpu", "Tesla T4", 1, capability=7.5, memory_bytes=40_000_000)
SETTINGS = {"rows": 8, "row_length": 64, "accumulate": 1, "remat": False, "mixed_precision": False}


@pytest.fixture
def adapted(gemma):
    gl.apply_lora(gemma, rank=2)
    return gemma


def test_the_advice_is_the_memory_plans(adapted):
    text = devices.advice(adapted, SETTINGS, T4)
    configuration = memory.configuration_of(adapted.backbone)
    asked = {"method": "lora", "rank": 2, "row_length": 64, "accelerator": True}
    now = memory.plan(configuration, rows=8, **asked).total
    assert f"8 × 64 tokens takes {now / 1e9:.1f} GB of 0.0 GB" in text and "Tesla T4" in text
    for change in ("rows=4, accumulate=2", "remat=True", 'quantization="nf4"', "row_length=32"):
        assert change in text
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" in text
    assert "PREALLOCATE" not in devices.advice(adapted, SETTINGS, Device("cpu", "cpu", 1))


def test_the_rows_of_the_advice_fit_where_some_do(adapted):
    configuration = memory.configuration_of(adapted.backbone)
    asked = {"method": "lora", "rank": 2, "row_length": 64, "accelerator": True}
    room = memory.plan(configuration, rows=3, **asked).total
    small = Device("gpu", "small", 1, memory_bytes=room)
    assert "rows=3, accumulate=3" in devices.advice(adapted, SETTINGS, small)


def test_a_change_that_is_made_already_is_not_advised(gemma):
    gl.quantize_base(gemma, "nf4")
    gl.apply_lora(gemma, rank=2)
    text = devices.advice(gemma, SETTINGS | {"rows": 1, "remat": True}, T4)
    assert "rows=" not in text and "remat" not in text and "nf4" not in text and "row_length=32" in text


@pytest.mark.parametrize("words", ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes.", "other"])
def test_only_an_error_of_memory_is_answered(adapted, words):
    with pytest.raises(GemmaLoraError if "MEM" in words.upper() else RuntimeError) as caught:
        with devices.answering_out_of_memory(adapted, SETTINGS):
            raise RuntimeError(words)
    assert ("By the plan" in str(caught.value)) == ("memory" in words)


def test_fit_answers_it(adapted, monkeypatch):
    tuner = gl.FineTuner(adapted, rows=2, row_length=8)

    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("gemma_lora.training.fitting.fit_arrays", exhausted)
    tokens = np.ones((2, 8), "int32")
    with pytest.raises(GemmaLoraError, match="By the plan a step of 2 × 8 tokens"):
        tuner.fit({"token_ids": tokens, "padding_mask": tokens}, tokens, epochs=1)


def test_rows_that_cannot_be_divided_are_refused_with_a_number_that_can(monkeypatch):
    mesh = types.SimpleNamespace(axis_names=["batch", "model"], shape=(4, 2))
    fake = type("DataParallel", (), {"device_mesh": mesh, "batch_dim_name": "batch"})()
    monkeypatch.setattr(keras.distribution, "distribution", lambda: fake)
    devices.check_rows(8)
    for rows, said in ((1, "its 1 row cannot.*such as 4"), (6, "its 6 rows cannot.*such as 8")):
        with pytest.raises(GemmaLoraError, match=f"DataParallel divides a batch among 4 devices, and {said}"):
            devices.check_rows(rows)
    devices.check_arrays({"token_ids": np.ones((16, 3))}, 8)
    for count, batch_size in ((16, 6), (2, 32), (18, 8)):  # 6 rows; 2; two batches of 8 and one of 2
        with pytest.raises(GemmaLoraError, match="such as"):
            devices.check_arrays({"token_ids": np.ones((count, 3))}, batch_size)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: None)
    devices.check_rows(1)


def test_keras_own_distribution_has_the_names_that_are_read():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], [keras.distribution.list_devices()[0]])
    found = keras.distribution.DataParallel(device_mesh=mesh, auto_shard_dataset=False)
    assert found.batch_dim_name in found.device_mesh.axis_names and tuple(found.device_mesh.shape) == (1,)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_losses_are_not_added_up_in_sixteen_bits(adapted, kind):
    tuner = gl.FineTuner(adapted, rows=1, row_length=8)
    keras.config.set_floatx(kind)
    try:
        for start in (lambda: gl.FineTuner(adapted), tuner.check_trainable):
            with pytest.raises(GemmaLoraError, match=f"floatx.. is '{kind}'.*set_floatx"):
                start()
    finally:
        keras.config.set_floatx("float32")
