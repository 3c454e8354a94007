"""Several batches that make a step: the step of one large batch, from whatever data; the log tells each loss."""

import json

import keras
import numpy as np
import pytest

from gemma_lora.training import FineTuner, optimizer_steps
from tests.training.conftest import arrays, assert_alike, moved, part, small_gemma, small_tuner, weights_of


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [3, 5, 50])
def test_batches_that_make_a_step_train_as_one_large_batch(lines, accumulate):
    """With the default schedule, over two epochs; 50 is more than there are batches."""
    many, large = small_tuner(accumulate=accumulate), small_tuner(rows=accumulate)
    start = weights_of(many)
    for tuner in (many, large):
        tuner.fit(lines, epochs=2, verbose=0)
    batches = len(many.batches(lines))
    assert batches > 4 and batches % accumulate  # so the last step of an epoch is of fewer
    assert int(many.optimizer.iterations) == int(large.optimizer.iterations) == 2 * -(-batches // accumulate)
    assert_alike(many, large)
    assert all(moved(many, start))


@pytest.mark.slow
def test_two_batches_of_fifty_train_b(lines):
    tuner = small_tuner(accumulate=50, row_length=150)
    assert len(tuner.batches(lines)) == 2
    for layer in (layer for layer in tuner.causal_lm.backbone._flatten_layers() if hasattr(layer, "lora_b")):
        layer.lora_b.assign(np.zeros(layer.lora_b.shape))
    tuner.fit(lines, verbose=0)
    assert all(np.any(v) for v in tuner.trainable_variables if v.name == "lora_b")


@pytest.mark.slow
def test_arrays_train_as_one_large_batch_too():
    """Without `compile`. Five batches of two examples an epoch against batches of four."""
    x, y, weights = arrays(10)
    tuners = small_tuner(accumulate=2), small_tuner()
    for tuner, batch_size in zip(tuners, (2, 4), strict=True):
        tuner.fit(x, y, sample_weight=weights, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
        assert int(tuner.optimizer.iterations) == tuner.optimizer._learning_rate.steps == 6
    assert_alike(*tuners)


@pytest.mark.slow
def test_a_generator_with_an_optimizer_of_ones_own_and_validation():
    data = arrays(6)
    found = []
    for accumulate, size in ((2, 2), (1, 4)):
        tuner = small_tuner(accumulate=accumulate)
        tuner.compile(keras.optimizers.SGD(0.5))
        source = (part(data, start, start + size) for start in range(0, 6, size))
        history = tuner.fit(source, steps_per_epoch=-(-6 // size), validation_data=data, verbose=0)
        found.append((tuner, history.history["val_loss"][0]))
    assert_alike(found[0][0], found[1][0])
    # Validation sees the last step, which was of one batch.
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6) == pytest.approx(tuner.test_on_batch(*data), rel=1e-6)


@pytest.mark.slow
def test_an_optimizer_of_ones_own_makes_the_step_of_one_large_batch():
    data = arrays(4)
    many, large, alone = small_tuner(accumulate=3), small_tuner(), small_tuner()
    for tuner in (many, large, alone):
        tuner.compile(keras.optimizers.SGD(0.5))
    start = weights_of(many)
    for place in range(3):
        assert not any(moved(many, start))
        many.train_on_batch(*part(data, place, place + 1))
    large.train_on_batch(*part(data, 0, 3))
    assert_alike(many, large)
    many.train_on_batch(*part(data, 3, 4))
    before = weights_of(many)
    many.end_step()  # of one batch
    assert all(moved(many, before)) and int(many.optimizer.iterations) == 2
    for ours, theirs in zip(alone.trainable_variables, before, strict=True):
        ours.assign(theirs)
    alone.train_on_batch(*part(data, 3, 4))
    assert_alike(many, alone)
    many.end_step()  # of none
    assert_alike(many, alone)


@pytest.mark.slow
def test_without_weights_every_token_counts():
    """A batch of four rows and one of two: twice as many tokens."""
    (x, y, _), found = arrays(6), []
    for accumulate, size in ((2, 4), (1, 6)):
        tuner = small_tuner(accumulate=accumulate)
        tuner.compile(keras.optimizers.SGD(0.5))
        tuner.fit(x, y, batch_size=size, shuffle=False, verbose=0)
        found.append(tuner)
    assert_alike(*found)


def test_kerass_own_accumulation_is_refused_with_a_remedy():
    tuner = FineTuner(small_gemma(), accumulate=2)
    with pytest.raises(ValueError, match=r"FineTuner\(accumulate=…\).*gradient_accumulation_steps=2"):
        tuner.compile(keras.optimizers.SGD(0.5, gradient_accumulation_steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_row_of_the_log_is_its_batchs_own_loss(tmp_path, lines, accumulate):
    tuner = small_tuner(accumulate=accumulate, run_dir=tmp_path)
    tuner.compile(keras.optimizers.SGD(0.0))  # nothing moves: each batch's loss can be computed apart
    tuner.fit(lines, verbose=0)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(logged, [tuner.test_on_batch(*b.as_keras()) for b in tuner.batches(lines)], rtol=1e-5)
    data = arrays(5)
    # The last batch is smaller: Keras's running mean weighs it by its rows.
    history = tuner.fit(*data[:2], sample_weight=data[2], batch_size=2, shuffle=False, verbose=0)
    alone = [tuner.test_on_batch(*part(data, start, start + 2)) for start in (0, 2, 4)]
    np.testing.assert_allclose([row["loss"] for row in tuner.log.rows], alone, rtol=1e-5)
    assert history.history["loss"][0] == pytest.approx(np.average(alone, weights=[2, 2, 1]), rel=1e-5)
    assert set(history.history) == {"loss"}
    assert isinstance(tuner.train_on_batch(*data), float | np.floating | np.ndarray)


def test_steps_end_with_an_epoch():
    assert optimizer_steps([10, 10], 4) == 6 and optimizer_steps([10, 10], 1) == 20 and optimizer_steps([2], 50) == 1
