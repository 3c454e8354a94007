"""A bad argument is a ValueError that names it, before anything changes."""

import math

import numpy as np
import pytest

from gemma_lora.training import FineTuner
from tests.training.conftest import arrays, moved, small_gemma, small_tuner, weights_of


@pytest.fixture(scope="module")
def model():
    return small_gemma()


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, value) for name in ("accumulate", "rows", "row_length", "chunk_size") for value in (0, -1, 1.5, True)),
        ("accumulate", None),
        ("seed", -1),
        ("seed", 0.5),
        *(("learning_rate", value) for value in (0, -1e-3, math.nan, math.inf, "5e-4", None)),
        *(("warmup", value) for value in (-0.1, 1, 1.5, math.nan)),
        *(("checkpoint_seconds", value) for value in (-1, math.nan)),
    ],
)
def test_a_bad_setting_is_named(model, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        FineTuner(model, mixed_precision=True, **{name: value})


def test_values_of_numpy_and_the_borders_are_taken(model):
    FineTuner(model, accumulate=np.int64(1), seed=np.int32(0), warmup=0, checkpoint_seconds=0, learning_rate=1)


@pytest.mark.parametrize(
    "name, value", [*(("epochs", value) for value in (0, -1, 1.0)), ("limit", 0), ("limit", -3), ("limit", 2.0)]
)
def test_a_bad_argument_of_fit_is_named(model, lines, name, value):
    tuner = small_tuner(model)
    start = weights_of(tuner)
    with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
        tuner.fit(lines, **{name: value})
    if name == "epochs":
        with pytest.raises(ValueError, match="`epochs` must be an integer"):
            tuner.fit(*arrays(2)[:2], epochs=value)
    assert not tuner.compiled and not any(moved(tuner, start))


@pytest.mark.parametrize("batches", [0, -1, 2.0])
def test_a_bad_number_of_batches_is_named(model, batches):
    with pytest.raises(ValueError, match="`batches`"):
        small_tuner(model).compile_for(batches)


def test_what_fit_would_not_use_is_refused(model, lines):
    tuner = small_tuner(model)
    with pytest.raises(ValueError, match=r"`batch_size` does not go.*FineTuner\(rows=…, row_length=…\).*batch_size=4"):
        tuner.fit(lines, batch_size=4)
    with pytest.raises(ValueError, match="limit"):
        tuner.fit(*arrays(2)[:2], limit=1)
