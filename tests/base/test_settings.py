"""Every default in one place: what a value may be, and one message wherever it is refused."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_lora.base import settings as module
from gemma_lora.base.settings import DEFAULTS, FIELDS, TARGET_NAMES, Settings, check, target_names

NOT_A_NUMBER = [True, "3", None, [3], 3j]
NOT_AN_INTEGER = [*NOT_A_NUMBER, 3.0, math.nan]
NOT_FINITE = [*NOT_A_NUMBER, math.nan, math.inf, -math.inf, 10**400, np.float32("nan")]
NOT_A_TRUTH = [0, 1, "yes", None, [], np.float32(1)]

#: A setting -> values that it must refuse, and what the message says is expected.
REFUSED = {
    "data": (["", 3, None, b"x"], "text that is not empty"),
    "run_dir": (["", 3, None], "text that is not empty"),
    "validation": (["", 3, b"x"], "text that is not empty, or None"),
    "template": (["", 3, {}], "text that is not empty, or None"),
    "model": (["", 3, None], "text that is not empty"),
    "dtype": (["float16", "", None, 32, "bf"], "one of float32, bfloat16"),
    "quantization": (["int3", "", 4, True, ["nf4"]], "one of nf4, int8, int4, gguf, or None"),
    "rank": ([0, -1, *NOT_AN_INTEGER], "an integer of at least 1"),
    "alpha": ([0, -1.0, *(v for v in NOT_FINITE if v is not None)], "a finite number above 0, or None"),
    "dropout": ([1, 1.0, -0.1, *NOT_FINITE], "a finite number of at least 0 and below 1"),
    "replay": ([1, 1.0, -0.1, *(v for v in NOT_FINITE if v is not None)], "of at least 0 and below 1, or None"),
    "learning_rate": ([0, -1e-4, *NOT_FINITE], "a finite number above 0"),
    "warmup": ([-0.1, 1.1, *NOT_FINITE], "a finite number of at least 0 and below 1"),
    "epochs": ([0, -1, *(v for v in NOT_AN_INTEGER if v is not None)], "an integer of at least 1, or None"),
    "limit": ([0, -5, True, 1.0], "an integer of at least 1, or None"),
    "rows": ([0, -1, *NOT_AN_INTEGER], "an integer of at least 1"),
    "row_length": ([1, 0, -384, *NOT_AN_INTEGER], "an integer of at least 2"),
    "chunk_size": ([0, -1, True, 2.0], "an integer of at least 1, or None"),
    "accumulate": ([0, -1, *NOT_AN_INTEGER], "an integer of at least 1"),
    "checkpoint_seconds": ([-1, *NOT_FINITE], "a finite number of at least 0"),
    "seed": ([-1, 2**31, *NOT_AN_INTEGER], "an integer of at least 0 and of at most 2147483647"),
    "shots": ([-1, *NOT_AN_INTEGER], "an integer of at least 0"),
    "keep_best": (NOT_A_TRUTH, "True or False"),
    "patience": ([0, *NOT_AN_INTEGER], "an integer of at least 1"),
    "validation_lines": ([0, *NOT_AN_INTEGER], "an integer of at least 1"),
    "base_lines": ([0, *NOT_AN_INTEGER], "an integer of at least 1"),
    "max_new_tokens": ([0, -1, True, 1.5], "an integer of at least 1, or None"),
    "metric": (["chrf", "", 1, True], "one of exact, json, classification, text, loss, or None"),
    "batch_size": ([0, -1, *NOT_AN_INTEGER], "an integer of at least 1"),
    "mixed_precision": ([v for v in NOT_A_TRUTH if v is not None], "True or False, or None"),
    "filter_gradient": ([v for v in NOT_A_TRUTH if v is not None], "True or False, or None"),
    "targets": (
        [(), "", "knob", "query,knob", ["query", 3], 3, None, [["query"]]],
        "must name layers among query, key",
    ),
    **dict.fromkeys(
        ("double_quant", "rslora", "dora", "remat", "skip_bad_lines", "evaluate_base"), (NOT_A_TRUTH, "True or False")
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_a_setting_cannot_be_is_refused_by_name(name):
    values, expected = REFUSED[name]
    for value in values:
        for refuse in (lambda given: Settings(**given), lambda given: check(**given)):
            with pytest.raises(ValueError) as error:
                refuse({name: value})
            message = str(error.value)
            assert message.startswith(f"`{name}` must ") and expected in message, value
            assert message.endswith(f"Received: {name}={value!r}"), value


def test_every_setting_is_described_and_has_a_default_that_it_takes():
    assert set(REFUSED) == set(FIELDS)
    for name, field in FIELDS.items():
        assert field.metadata["help"].endswith("."), name
        assert check(**{name: field.default}) == {name: field.default}
        assert getattr(DEFAULTS, name) == field.default == getattr(Settings, name)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"rank": np.int64(4)}, 4),
        ({"alpha": 16}, 16.0),
        ({"learning_rate": np.float32(0.5)}, 0.5),
        ({"data": Path("a") / "b"}, os.path.join("a", "b")),
        ({"targets": ["down", "query", "query"]}, ("query", "down")),
        ({"targets": "down, query"}, ("query", "down")),
        ({"targets": "all-linear"}, "all-linear"),
        ({"epochs": None}, None),
        ({"seed": 2**31 - 1}, 2**31 - 1),
        ({"dropout": 0}, 0.0),
    ],
)
def test_values_are_held_in_their_fields_type(given, held):
    ((name, _),) = given.items()
    for found in (check(**given)[name], getattr(Settings(**given), name)):
        assert found == held and type(found) is type(held)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"double_quant": True, "quantization": None}, ["`double_quant`", "nf4", "quantization=None"]),
        ({"double_quant": True, "quantization": "int8"}, ["`double_quant`", "nf4", "quantization='int8'"]),
        ({"remat": True, "dropout": 0.1}, ["`remat`", "`dropout`", "dropout=0.1"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, words):
    for refuse in (Settings, check):
        with pytest.raises(ValueError) as error:
            refuse(**given)
        assert all(word in str(error.value) for word in words)
    assert check(double_quant=True) == {"double_quant": True}  # a caller whose packing is settled otherwise
    assert Settings(double_quant=True, quantization="nf4").double_quant


def test_a_name_that_is_no_setting_is_a_defect_of_the_caller():
    for refuse in (Settings, check):
        with pytest.raises(TypeError, match="rnak"):
            refuse(rnak=4)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULTS.rank = 8
    assert dataclasses.replace(DEFAULTS, rank=8).rank == 8
    with pytest.raises(ValueError, match="`rank`"):
        dataclasses.replace(DEFAULTS, rank=0)


def test_target_names_are_in_the_blocks_order():
    assert target_names("all-linear") == TARGET_NAMES and len(TARGET_NAMES) == 7
    assert target_names("up") == ("up",)
    assert target_names(reversed(TARGET_NAMES)) == TARGET_NAMES


def test_it_imports_the_standard_library_alone():
    script = f"import sys; before = set(sys.modules); import {module.__name__}; print(*set(sys.modules) - before)"
    root = Path(module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    found = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert found == {"gemma_lora"}
