"""FineTuner: Keras's fit with our loss; what is frozen stays, what is trained moves, the log tells the truth."""

import json

import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.templates import Template
from gemma_lora.training import FineTuner, WarmupCosine

RECORDS = [{"prompt": f"say {word}", "response": word} for word in ("red", "green", "blue", "black", "white") * 8]


def tuner_for(gemma, tokenizer, **named):
    class Preprocessor:
        pass

    gemma.preprocessor = Preprocessor()
    gemma.preprocessor.tokenizer = tokenizer
    lora.apply_lora(gemma, rank=4, targets="all-linear")
    return FineTuner(gemma, rows=2, row_length=48, chunk_size=16, **named)


@pytest.fixture
def dataset():
    return load_dataset(RECORDS, template=Template("{prompt}:", "{response}<eos>"))


@pytest.mark.slow
def test_fit_learns_logs_and_leaves_the_base_alone(tmp_path, gemma, tokenizer, dataset):
    tuner = tuner_for(gemma, tokenizer, run_dir=tmp_path, learning_rate=2e-2)
    frozen = {v.path: np.asarray(v) for v in gemma.non_trainable_variables}
    tuner.fit(dataset, epochs=4, verbose=0)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert set(rows[0]) == {"step", "loss", "seconds", "tokens_per_second", "memory_bytes"}
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for variable in gemma.non_trainable_variables:
        np.testing.assert_array_equal(variable, frozen[variable.path])
    assert all(np.any(layer.lora_b) for layer in lora.lora_layers(gemma))


@pytest.mark.slow
def test_logged_loss_is_each_steps_own(gemma, tokenizer, dataset):
    tuner = tuner_for(gemma, tokenizer)
    tuner.compile(keras.optimizers.SGD(0.0))  # nothing moves: each batch's loss can be computed apart
    tuner.fit(dataset, verbose=0)
    logged = [row["loss"] for row in tuner.log.rows]
    alone = [float(tuner.test_on_batch(*batch.as_keras())) for batch in tuner.batches(dataset)]
    np.testing.assert_allclose(logged, alone, rtol=1e-4)


@pytest.mark.slow
def test_frozen_weights_are_never_copied(gemma, tokenizer, dataset):
    tuner = tuner_for(gemma, tokenizer)
    tuner.compile_for(5)
    batch = tuner.batches(dataset)[0]

    def places():
        return {v.path: v.value.unsafe_buffer_pointer() for v in gemma.non_trainable_variables}

    before = places()
    tuner.train_on_batch(*batch.as_keras())
    tuner.test_on_batch(*batch.as_keras())
    tuner.fit(dataset, verbose=0)
    assert places() == before


def test_optimizer_holds_nothing_for_frozen_weights(gemma, tokenizer):
    tuner = tuner_for(gemma, tokenizer)
    tuner.compile_for(5)
    tuner.optimizer.build(tuner.trainable_variables)
    trainable = sum(int(np.prod(v.shape)) for v in gemma.trainable_variables)
    states = sum(int(np.prod(v.shape)) for v in tuner.optimizer.variables)
    assert states < 2 * trainable + 10


@pytest.mark.slow
def test_takes_kerashubs_arrays(gemma, tokenizer):
    tuner = tuner_for(gemma, tokenizer)
    tuner.compile("adam")
    x = {"token_ids": np.ones((4, 8), "int32"), "padding_mask": np.ones((4, 8), "int32")}
    history = tuner.fit(x, np.ones((4, 8), "int32"), sample_weight=np.ones((4, 8)), batch_size=2, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_with_a_message(gemma, tokenizer, dataset):
    tuner = tuner_for(gemma, tokenizer)
    gemma.backbone.layer_norm.scale.assign(np.full(gemma.backbone.layer_norm.scale.shape, np.nan))
    with pytest.raises(GemmaLoraError, match="loss is nan at step 1"):
        tuner.fit(dataset, verbose=0)


def test_nothing_to_train_is_an_error(gemma):
    for variable in gemma.variables:
        variable.trainable = False
    with pytest.raises(GemmaLoraError, match="apply_lora"):
        FineTuner(gemma)


def test_another_loss_is_refused(gemma, tokenizer):
    with pytest.raises(ValueError, match="chunked_cross_entropy"):
        tuner_for(gemma, tokenizer).compile("adam", loss="mse")


def test_schedule_rises_to_its_peak_and_falls_to_zero():
    rates = [float(WarmupCosine(0.1, 100, 0.1)(step)) for step in range(100)]
    assert max(rates) == pytest.approx(0.1) and rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.01) and rates[-1] < 1e-4
    assert rates[55] == pytest.approx(0.05, rel=1e-3)  # half way down a cosine


def batch_pair(seed=0):
    rng = np.random.default_rng(seed)
    x = [{"token_ids": rng.integers(5, 300, (2, 12)), "padding_mask": np.ones((2, 12), "int32")} for _ in range(2)]
    y = [rng.integers(5, 300, (2, 12)) for _ in range(2)]
    return x, y, [(rng.random((2, 12)) > limit).astype("float32") for limit in (0.2, 0.8)]


@pytest.mark.slow
def test_validations_loss_is_a_mean_however_many_batches_make_a_step(gemma):
    x, y, weights = batch_pair()
    lora.apply_lora(gemma, rank=2)
    found = []
    for accumulate in (1, 2):
        tuner = FineTuner(gemma, accumulate=accumulate)
        tuner.compile_for(2)
        found.append(tuner.test_on_batch(x[0], y[0], weights[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
def test_remat_changes_memory_and_nothing_else(any_gemma):
    x, y, weights = batch_pair()
    lora.apply_lora(any_gemma, rank=2, targets="all-linear")
    found = []
    for remat in (False, True):
        for number, layer in enumerate(lora.lora_layers(any_gemma)):
            layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.1, layer.lora_b.shape))
            layer.lora_a.assign(np.random.default_rng(number + 50).normal(0, 0.1, layer.lora_a.shape))
        tuner = FineTuner(any_gemma, remat=remat)
        tuner.compile(keras.optimizers.SGD(0.5))
        loss = float(tuner.train_on_batch(x[0], y[0], weights[0]))
        found.append([loss, *(np.asarray(v) for v in tuner.trainable_variables)])
    for plain, computed_twice in zip(*found, strict=True):
        np.testing.assert_allclose(computed_twice, plain, atol=1e-5)


def test_remat_with_dropout_is_refused(gemma):
    lora.apply_lora(gemma, rank=2, dropout=0.1)
    with pytest.raises(ValueError, match="remat"):
        FineTuner(gemma, remat=True)
