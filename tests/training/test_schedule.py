"""What `fit` and `train_on_batch` do without `compile`: Adam, and a schedule over the steps that there are."""

import keras
import numpy as np
import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.training import FineTuner, WarmupCosine, batches_per_epoch
from gemma_lora.training.schedule import default_optimizer
from tests.training.conftest import arrays, moved, part, small_gemma, small_tuner, weights_of


class Known(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return len(self.data[1]) // 2

    def __getitem__(self, index):
        return part(self.data, 2 * index, 2 * index + 2)


def generator():
    yield arrays(2)


@pytest.mark.parametrize(
    "x, named, expected",
    [
        ({"token_ids": np.zeros((70, 8))}, {}, 3),
        ({"token_ids": np.zeros((70, 8))}, {"batch_size": 20}, 4),
        ({"token_ids": np.zeros((70, 8))}, {"batch_size": 20, "validation_split": 0.5}, 2),
        ({"token_ids": np.zeros((70, 8))}, {"batch_size": 20, "steps_per_epoch": 2}, 2),
        (Known(arrays(6)), {}, 3),
        (generator(), {}, None),
        (generator(), {"steps_per_epoch": 5}, 5),
    ],
)
def test_batches_of_an_epoch(x, named, expected):
    assert batches_per_epoch(x, **named) == expected


def test_an_unknown_rate_is_constant_and_a_known_number_of_steps_makes_a_schedule():
    assert default_optimizer(0.01, 0.1, None).get_config()["learning_rate"] == pytest.approx(0.01)
    assert default_optimizer(0.01, 0.1, 7)._learning_rate.get_config() == {"peak": 0.01, "steps": 7, "warmup": 0.1}


@pytest.mark.slow
def test_fit_with_arrays_needs_no_compile():
    tuner = small_tuner()
    start = weights_of(tuner)
    tuner.fit(Known(arrays(6)), epochs=2, verbose=0)
    schedule = tuner.optimizer._learning_rate
    assert isinstance(schedule, WarmupCosine) and schedule.steps == int(tuner.optimizer.iterations) == 6
    assert all(moved(tuner, start))


def test_an_unknown_length_is_a_clear_error():
    with pytest.raises(GemmaLoraError, match="steps_per_epoch.*compile"):
        small_tuner().fit(generator(), verbose=0)


@pytest.mark.slow
def test_train_on_batch_needs_no_compile():
    tuner = FineTuner(small_gemma(), learning_rate=0.01)
    start = weights_of(tuner)
    tuner.train_on_batch(*arrays(2))
    assert all(moved(tuner, start))
    assert float(tuner.optimizer.learning_rate) == pytest.approx(0.01)


@pytest.mark.slow
def test_a_second_fit_is_a_training_of_its_own(lines):
    """A smoke test before it changes its start and nothing else."""
    tuner = small_tuner()
    tuner.fit(lines, limit=4, verbose=0)
    between = weights_of(tuner)
    tuner.fit(lines, verbose=0)
    second = weights_of(tuner)
    assert tuner.optimizer._learning_rate.steps == int(tuner.optimizer.iterations) == len(tuner.batches(lines))
    assert all(moved(tuner, between))
    for variable, value in zip(tuner.trainable_variables, between, strict=True):
        variable.assign(value)
    alone = small_tuner(tuner.causal_lm)
    alone.fit(lines, verbose=0)
    for ours, theirs in zip(weights_of(alone), second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_second_fit_with_arrays_is_too():
    data, tuner = arrays(4), small_tuner()
    for epochs in (1, 3):
        start = weights_of(tuner)
        tuner.fit(*data[:2], sample_weight=data[2], batch_size=2, epochs=epochs, verbose=0)
        assert all(moved(tuner, start)) and int(tuner.optimizer.iterations) == 2 * epochs


@pytest.mark.slow
def test_an_optimizer_of_ones_own_goes_on(lines):
    tuner = small_tuner(accumulate=2)
    tuner.compile_for(3)
    tuner.compile(keras.optimizers.Adam(1e-3))
    mine, steps = tuner.optimizer, -(-len(tuner.batches(lines)) // 2)
    tuner.train_on_batch(*arrays(2))  # half a step; `fit` begins with a whole one
    for count in (1, 2):
        tuner.fit(lines, verbose=0)
        assert tuner.optimizer is mine and int(mine.iterations) == count * steps


@pytest.mark.slow
def test_a_second_fit_in_a_run_folder(tmp_path, lines, capsys):
    tuner = small_tuner(run_dir=tmp_path)
    tuner.fit(lines, limit=12, verbose=0)
    done, log = weights_of(tuner), (tmp_path / "training.jsonl").read_text()
    tuner.fit(lines, limit=12, verbose=0)
    assert "is finished" in capsys.readouterr().out and not any(moved(tuner, done))
    optimizer = tuner.optimizer
    with pytest.raises(GemmaLoraError, match="limit was 12, is None.*choose another run folder"):
        tuner.fit(lines, verbose=0)
    assert not any(moved(tuner, done)) and tuner.optimizer is optimizer
    assert (tmp_path / "training.jsonl").read_text() == log
