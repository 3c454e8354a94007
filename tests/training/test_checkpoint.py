"""A run that was stopped at any moment goes on and ends with the same bits; what cannot go on says why."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.templates import Template
from gemma_lora.training import checkpoint
from gemma_lora.training.tuner import FineTuner
from tests.conftest import CharacterTokenizer, tiny_gemma

RECORDS = [
    {"prompt": f"say {word} {number}", "response": word} for number in range(6) for word in ("red", "green", "blue")
]
STATE = checkpoint.Checkpoint(
    3, {"rank": 8, "targets": ["query"]}, [{"step": 1}], {"weight.0": np.arange(6.0).reshape(2, 3)}
)


def tuner_in(folder, dropout=0.2, dora=False, **named):
    """A tiny Gemma with dropout, so that the random state matters too; a checkpoint after every step."""
    model = tiny_gemma()
    model.preprocessor = type("Preprocessor", (), {"tokenizer": CharacterTokenizer()})()
    lora.apply_lora(model, rank=2, dropout=dropout, dora=dora)
    settings = {"rows": 1, "row_length": 48, "checkpoint_seconds": 0.0, **named}
    return FineTuner(model, run_dir=folder, **settings)


def train(folder, callbacks=(), epochs=1, **named):
    tuner = tuner_in(folder, **named)
    dataset = load_dataset(RECORDS, template=Template("{prompt}:", "{response}<eos>"))
    tuner.fit(dataset, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return tuner


def weights_of(tuner):
    return [np.asarray(v) for v in tuner.causal_lm.trainable_variables]


class StopAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(tmp_path, whole, capsys):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, [StopAt(2)])
        assert "holds the checkpoint of step 1 of" in capsys.readouterr().out
    tuner = train(tmp_path)
    assert "goes on after step" in capsys.readouterr().out
    for ours, theirs in zip(weights_of(tuner), weights_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(whole.log.rows) + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole.log.rows]


@pytest.mark.slow
def test_a_run_that_stopped_inside_a_step_goes_on_with_the_same_bits(tmp_path):
    """Two batches make a step: the checkpoint of batch 1 holds half of one."""
    right = train(tmp_path / "whole", accumulate=2, epochs=2)
    assert len(right.log.rows) % 2  # so the last step of one of the epochs is of one batch
    for step in (2, 4):  # batches 1 and 3 are the last that are kept, each the first of its step
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", [StopAt(step)], accumulate=2, epochs=2)
    assert checkpoint.load(tmp_path / "stopped").step == 3
    tuner = train(tmp_path / "stopped", accumulate=2, epochs=2)
    for ours, theirs in zip(weights_of(tuner), weights_of(right), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["loss"] for row in tuner.log.rows] == [row["loss"] for row in right.log.rows]
    again = train(tmp_path / "stopped", accumulate=2, epochs=2)  # finished: its last step is in the checkpoint
    for ours, theirs in zip(weights_of(again), weights_of(right), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_doras_magnitude_goes_on_too(tmp_path):
    right = train(tmp_path / "whole", dora=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", [StopAt(3)], dora=True)
    tuner = train(tmp_path / "stopped", dora=True)
    names = [v.name for v in tuner.causal_lm.trainable_variables]
    assert names.count("magnitude") == 2 * 7
    for ours, theirs in zip(weights_of(tuner), weights_of(right), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    start = tuner_in(None, dora=True)
    assert all(np.any(new != old) for new, old in zip(weights_of(tuner), weights_of(start), strict=True))


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.training.test_checkpoint as t
from gemma_lora.training import checkpoint
from gemma_lora.base import files
folder, where, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if where == "between":
    class Die(t.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch + 1 == step:
                die()
    t.train(folder, [Die()])
else:
    import safetensors.numpy as module
    plain, count = module.save_file, [0]
    def half_written(tensors, path, metadata):
        plain(tensors, path, metadata)
        count[0] += 1
        if count[0] == step:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    module.save_file = half_written
    t.train(folder)
"""


def killed(folder, where, step):
    command = [sys.executable, "-c", KILLED, str(folder), where, str(step)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True).returncode


@pytest.mark.slow
def test_sigkill_between_steps_and_while_a_checkpoint_is_written(tmp_path, whole):
    assert killed(tmp_path, "between", 2) == -signal.SIGKILL
    assert checkpoint.load(tmp_path).step >= 1
    assert killed(tmp_path, "writing", 2) == -signal.SIGKILL  # the second write of this process is torn
    assert checkpoint.load(tmp_path) is not None
    tuner = train(tmp_path)
    for ours, theirs in zip(weights_of(tuner), weights_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    first = train(tmp_path)
    again = train(tmp_path)
    assert "is finished" in capsys.readouterr().out
    for ours, theirs in zip(weights_of(again), weights_of(first), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.0005, is 0.0001"),
        ({"dropout": 0.1}, "lora"),
        ({"dora": True}, "dora"),
    ],
)
def test_changed_settings_are_named(tmp_path, change, named):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [StopAt(2)])  # a user's callbacks come first, so the checkpoint is step 1's
    with pytest.raises(GemmaLoraError, match=named):
        train(tmp_path, **change)


@pytest.mark.slow
def test_a_weight_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path):
    class Spoil(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.jax_state_sync()
                variable = self.model.causal_lm.trainable_variables[0]
                variable.assign(np.full(variable.shape, np.nan))

    with pytest.raises(GemmaLoraError, match="not a finite number.* holds the checkpoint of step 1 of"):
        train(tmp_path, [Spoil()])
    assert all(np.isfinite(a).all() for a in checkpoint.load(tmp_path).arrays.values())


@pytest.mark.slow
def test_a_full_disk_says_which_checkpoint_there_is(tmp_path, monkeypatch):
    save, count = checkpoint.save, []

    def full(folder, state):
        count.append(1)
        if len(count) == 3:  # the first is of the start
            raise OSError(28, "No space left on device", str(folder))
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(GemmaLoraError, match="No space left on device.* holds the checkpoint of step 1 of"):
        train(tmp_path)
    assert checkpoint.load(tmp_path).step == 1


@pytest.mark.slow
def test_stopped_before_the_first_step_in_the_same_session(tmp_path, capsys, whole):
    """The tuner's own optimizer and weights have moved; the run begins where it began."""
    tuner = tuner_in(tmp_path, checkpoint_seconds=1e9)
    dataset = load_dataset(RECORDS, template=Template("{prompt}:", "{response}<eos>"))
    with pytest.raises(KeyboardInterrupt):
        tuner.fit(dataset, verbose=0, callbacks=[StopAt(3)])
    assert "holds the checkpoint of step 0 of" in capsys.readouterr().out and checkpoint.load(tmp_path).step == 0
    tuner.fit(dataset, verbose=0)
    assert int(tuner.optimizer.iterations) == len(tuner.log.rows) == len(whole.log.rows)
    for ours, theirs in zip(weights_of(tuner), weights_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_round_trip_and_no_checkpoint(tmp_path):
    assert checkpoint.load(tmp_path) is None
    checkpoint.save(tmp_path, STATE)
    found = checkpoint.load(tmp_path)
    assert (found.step, found.settings, found.log) == (STATE.step, STATE.settings, STATE.log)
    np.testing.assert_array_equal(found.arrays["weight.0"], STATE.arrays["weight.0"])


def test_a_full_disk_is_a_message_and_the_last_checkpoint_stands(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(GemmaLoraError, match="No space left.*goes on from the last checkpoint"):
        checkpoint.save(tmp_path, dataclasses.replace(STATE, step=9))
    monkeypatch.undo()
    assert checkpoint.load(tmp_path).step == 3
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]


@pytest.mark.parametrize("content", [b"", b"\x10" * 100, None])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    if content is None:  # safetensors, but not ours
        from safetensors.numpy import save_file

        save_file({"a": np.ones(2)}, tmp_path / checkpoint.FILE)
    else:
        (tmp_path / checkpoint.FILE).write_bytes(content)
    with pytest.raises(GemmaLoraError, match=f"{checkpoint.FILE}: not a checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"step": -1}, "step -1"),
        ({"settings": ["rank"]}, "settings are no object"),
        ({"log": {"step": 1}}, "the log is no list of rows"),
        ({"log": [1]}, "the log is no list of rows"),
        ({"arrays": STATE.arrays | {"optimizer.0": np.array([1.0, np.nan])}}, "optimizer.0 holds numbers that are not"),
    ],
)
def test_a_checkpoint_that_says_nothing_sensible_is_refused(tmp_path, change, said):
    checkpoint.save(tmp_path, dataclasses.replace(STATE, **change))
    with pytest.raises(GemmaLoraError, match=f"not a checkpoint of this version .{said}"):
        checkpoint.load(tmp_path)


def test_changed_settings_ignores_tuples_and_order():
    assert checkpoint.changed_settings({"a": [1, 2], "b": 1}, {"b": 1, "a": (1, 2)}) == []
    assert checkpoint.changed_settings({"a": 1}, {"b": 2}) == ["a was 1, is None", "b was None, is 2"]
