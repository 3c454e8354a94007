"""Keras's callbacks do in `FineTuner.fit` what they do in Keras; what they remember is in the checkpoint."""

import csv
import json

import keras
import numpy as np
import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.generation.engine import generate
from gemma_lora.training import KeepBest, WarmupCosine, checkpoint, running
from tests.training.conftest import WORDS, arrays, moved, small_gemma, small_tuner, weights_of

RECORDS = [{"prompt": f"say {word}", "response": word} for word in WORDS]


def callback(**named):
    return keras.callbacks.LambdaCallback(**named)


class Scripted(keras.callbacks.Callback):
    """Puts losses of our choice in place of those on validation lines."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = self.losses[epoch]


class StopIn(keras.callbacks.Callback):
    """Interrupts at a batch of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.now = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == self.at:
            raise KeyboardInterrupt


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


LOSSES = [5.0, 3.0, 4.0, 4.5, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["EarlyStopping", "KeepBest"])
def test_early_stopping_stops_and_gives_back_the_best_epoch_and_a_stopped_run_is_finished(tmp_path, kind, capsys):
    def stopping():
        if kind == "KeepBest":
            return KeepBest(patience=2)
        return keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)

    kept = []
    watch = callback(on_epoch_end=lambda epoch, logs: kept.append(weights_of(whole)))
    whole = small_tuner(run_dir=tmp_path / "whole")
    history = whole.fit(RECORDS, epochs=6, verbose=0, callbacks=[Scripted(LOSSES), stopping(), watch])
    assert history.history["val_loss"] == LOSSES[:4]
    same(weights_of(whole), kept[1])
    assert any(np.any(one != other) for one, other in zip(kept[1], kept[3], strict=True))
    # Interrupted after the best epoch: the best weights and the count come from the checkpoint.
    parts = [Scripted(LOSSES), stopping()]
    with pytest.raises(KeyboardInterrupt):
        small_tuner(run_dir=tmp_path / "cut", checkpoint_seconds=0.0).fit(
            RECORDS, epochs=6, verbose=0, callbacks=[*parts, StopIn(2, 1)]
        )
    cut = small_tuner(run_dir=tmp_path / "cut")
    again = cut.fit(RECORDS, epochs=6, verbose=0, callbacks=[Scripted(LOSSES), stopping()])
    assert again.history == history.history and again.epoch == history.epoch
    same(weights_of(cut), weights_of(whole))
    # A stopped run is finished, and says so.
    capsys.readouterr()
    best = stopping()
    last = cut.fit(RECORDS, epochs=6, verbose=0, callbacks=[Scripted(LOSSES), best])
    assert "the run is finished; a callback stopped it after step" in capsys.readouterr().out
    assert last.history == history.history
    same(weights_of(cut), weights_of(whole))
    assert kind != "KeepBest" or (best.best, best.best_epoch, best.stopped) == (3.0, 2, True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["EarlyStopping", "KeepBest"])
def test_a_run_killed_right_after_early_stopping_trains_no_further(tmp_path, kind):
    def stopping():
        if kind == "KeepBest":
            return KeepBest(patience=2)
        return keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)

    def kill(logs):
        raise KeyboardInterrupt

    whole = small_tuner(run_dir=tmp_path / "whole")
    history = whole.fit(RECORDS, epochs=6, verbose=0, callbacks=[Scripted(LOSSES), stopping()])
    with pytest.raises(KeyboardInterrupt):
        small_tuner(run_dir=tmp_path / "cut").fit(
            RECORDS, epochs=6, verbose=0, callbacks=[callback(on_train_end=kill), Scripted(LOSSES), stopping()]
        )
    found = checkpoint.load(tmp_path / "cut")
    assert found.stopped and not found.finished
    cut = small_tuner(run_dir=tmp_path / "cut")
    again = cut.fit(RECORDS, epochs=6, verbose=0, callbacks=[Scripted(LOSSES), stopping()])
    assert again.history == history.history and len(cut.log.rows) == len(whole.log.rows)
    same(weights_of(cut), weights_of(whole))
    assert checkpoint.load(tmp_path / "cut").finished


@pytest.mark.slow
def test_a_run_stopped_by_a_callback_within_an_epoch_is_finished(tmp_path):
    def stop(batch, logs):
        tuner.stop_training = batch == 1

    tuner = small_tuner(run_dir=tmp_path)
    tuner.fit(RECORDS, epochs=2, verbose=0, callbacks=[callback(on_train_batch_end=stop)])
    assert len(tuner.log.rows) == 2 and checkpoint.load(tmp_path).finished
    done = weights_of(tuner)
    tuner.fit(RECORDS, epochs=2, verbose=0)
    assert len(tuner.log.rows) == 2
    same(weights_of(tuner), done)


@pytest.mark.slow
def test_rates_that_callbacks_set_and_a_run_that_goes_on_with_them(tmp_path):
    """The default optimizer has no schedule then. Interrupted within an epoch, the rate is not lowered twice."""

    def callbacks():
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=1, min_lr=0)
        return [Scripted([1.0, 2.0, 3.0]), halve, plateau]

    whole = small_tuner(run_dir=tmp_path / "whole")
    history = whole.fit(RECORDS, epochs=3, verbose=0, callbacks=callbacks())
    # Halved in every epoch, and a tenth after the second, which was no better.
    assert history.history["learning_rate"] == pytest.approx([5e-4, 2.5e-4, 1.25e-5], rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        small_tuner(run_dir=tmp_path / "cut", checkpoint_seconds=0.0).fit(
            RECORDS, epochs=3, verbose=0, callbacks=[*callbacks(), StopIn(1, 1)]
        )
    cut = small_tuner(run_dir=tmp_path / "cut")
    again = cut.fit(RECORDS, epochs=3, verbose=0, callbacks=callbacks())
    assert again.history == history.history
    same(weights_of(cut), weights_of(whole))


def test_a_schedule_and_a_callback_that_sets_the_rate_are_refused_together():
    tuner = small_tuner()
    tuner.compile(keras.optimizers.Adam(WarmupCosine(1e-3, 10)))
    start = weights_of(tuner)
    for setter in (
        keras.callbacks.ReduceLROnPlateau(),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
    ):
        for data in ((RECORDS,), arrays(2)[:2]):
            with pytest.raises(ValueError, match=f"{type(setter).__name__} sets the learning rate.*a number as"):
                tuner.fit(*data, verbose=0, callbacks=[setter])
    assert not any(moved(tuner, start))


def test_a_whole_model_and_two_backups_are_refused_before_training(tmp_path):
    tuner = small_tuner(run_dir=tmp_path / "run")
    whole = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras")
    with pytest.raises(ValueError, match=r"`save_weights_only=True`.*\.weights\.h5.*best.keras"):
        tuner.fit(RECORDS, verbose=0, callbacks=[whole])
    with pytest.raises(ValueError, match="`run_dir` already keeps what BackupAndRestore would"):
        tuner.fit(RECORDS, verbose=0, callbacks=keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    with pytest.raises(ValueError, match="must hold Keras callbacks. Received: int"):
        tuner.fit(RECORDS, verbose=0, callbacks=[3])
    assert not list(tmp_path.iterdir()) and not tuner.compiled


@pytest.mark.slow
def test_model_checkpoint_and_csv_write_what_there_is(tmp_path):
    tuner, kept = small_tuner(), []
    history = tuner.fit(
        RECORDS,
        epochs=3,
        verbose=0,
        callbacks=[
            Scripted([2.0, 1.0, 3.0]),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "{epoch}.weights.h5", save_weights_only=True, save_best_only=True
            ),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            callback(on_epoch_end=lambda epoch, logs: kept.append(weights_of(tuner))),
        ],
    )
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["1.weights.h5", "2.weights.h5"]
    other = small_tuner(small_gemma())
    other.load_weights(tmp_path / "2.weights.h5")
    same(weights_of(other), kept[1])
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(history.history["loss"])
    assert [float(row["val_loss"]) for row in rows] == [2.0, 1.0, 3.0]


@pytest.mark.slow
def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    board = keras.callbacks.TensorBoard(tmp_path, update_freq=1)
    small_tuner().fit(RECORDS, epochs=2, verbose=0, callbacks=[board])
    assert list((tmp_path / "train").glob("events*")) and list((tmp_path / "validation").glob("events*"))


def test_tensorboard_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch):
    """TensorFlow alone is not enough: its scalars are written by the other package."""
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else True)
    tuner = small_tuner()
    with pytest.raises(GemmaLoraError, match="TensorBoard needs tensorboard, which is not installed.*CSVLogger"):
        tuner.fit(RECORDS, verbose=0, callbacks=[keras.callbacks.TensorBoard(tmp_path)])
    assert not tuner.compiled


@pytest.mark.slow
def test_backup_and_restore_goes_on_from_the_last_epoch(tmp_path):
    """Keras's own: without `run_dir`, from the last epoch that ended."""

    def tuner():
        made = small_tuner()
        made.compile(keras.optimizers.Adam(1e-3))
        return made

    whole, cut, rest = tuner(), tuner(), tuner()
    whole.fit(RECORDS, epochs=3, verbose=0)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        cut.fit(RECORDS, epochs=3, verbose=0, callbacks=[backup, StopIn(1, 1)])
    history = rest.fit(RECORDS, epochs=3, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert history.epoch == [1, 2]
    same(weights_of(rest), weights_of(whole))
    assert rest.fit(RECORDS, epochs=1, verbose=0).epoch == [0]


@pytest.mark.slow
def test_answers_in_a_callback_are_those_of_the_present_weights():
    """After every batch: as a second model that is given the same weights answers; training is not disturbed."""
    model, twin = small_gemma(), small_gemma()
    tuner, plain = small_tuner(model, learning_rate=0.05), small_tuner(learning_rate=0.05)
    found = []

    def answer(batch, logs):
        answers = []
        for one in (model, twin):
            if one is twin:
                for mine, theirs in zip(twin.trainable_variables, model.trainable_variables, strict=True):
                    mine.assign(np.array(theirs.value))
            answers.append(generate(one, ["say red", "say blue"], max_new_tokens=6))
        found.append(answers)

    tuner.fit(RECORDS, epochs=2, verbose=0, callbacks=[callback(on_train_batch_end=answer)])
    twin.gemma_lora_template = model.gemma_lora_template
    assert found and all(ours == theirs for ours, theirs in found)
    assert len({tuple(ours) for ours, _ in found}) > 1
    plain.fit(RECORDS, epochs=2, verbose=0)
    same(weights_of(tuner), weights_of(plain))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(0, 2), (1, 0), (1, 2)])
def test_averages_and_several_steps_an_execution_go_on_with_the_same_bits(tmp_path, stop):
    def tuner(folder):
        made = small_tuner(run_dir=folder, accumulate=2, checkpoint_seconds=0.0, row_length=24)
        made.compile(keras.optimizers.Adam(1e-2, use_ema=True, ema_overwrite_frequency=3), steps_per_execution=1)
        return made

    whole = tuner(tmp_path / "whole")
    history = whole.fit(RECORDS, epochs=2, verbose=0)
    cut = tuner(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        cut.fit(RECORDS, epochs=2, verbose=0, callbacks=[StopIn(*stop)])
    again = cut.fit(RECORDS, epochs=2, verbose=0)  # the same tuner: Keras has put the averages in place of its weights
    assert again.history == history.history
    same(weights_of(cut), weights_of(whole))
    rows = [json.loads(line) for line in (tmp_path / "cut" / "training.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole.log.rows]


@pytest.mark.slow
def test_a_run_of_several_steps_an_execution_goes_on_too(tmp_path):
    def tuner(folder, steps=2):
        made = small_tuner(run_dir=folder, checkpoint_seconds=0.0, row_length=24)
        made.compile(keras.optimizers.Adam(1e-2), steps_per_execution=steps)
        return made

    data = load_dataset(RECORDS)
    whole, cut = tuner(tmp_path / "whole"), tuner(tmp_path / "cut")
    whole.fit(data, epochs=2, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(data, epochs=2, verbose=0, callbacks=[StopIn(0, 3)])
    assert checkpoint.load(tmp_path / "cut").step == 2
    again = tuner(tmp_path / "cut")
    again.fit(data, epochs=2, verbose=0)
    same(weights_of(again), weights_of(whole))
    assert [row["step"] for row in again.log.rows] == list(range(1, len(whole.log.rows) + 1))


def test_patience_is_checked():
    with pytest.raises(ValueError, match="patience=0"):
        KeepBest(patience=0)
