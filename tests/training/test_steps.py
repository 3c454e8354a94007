"""A tuner uses its model as it is now: merged, with another adapter, quantized; a merged one is not trained."""

import gc
import json
import weakref

import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.exchange import peft
from gemma_lora.lora.qlora import quantize_base
from gemma_lora.training import tuner as tuner_module
from gemma_lora.training.programs import Fingerprint
from tests.training.conftest import arrays, moved, small_gemma, small_tuner, weights_of, with_lora

DATA = arrays(4)


def loss_of(tuner):
    return float(tuner.evaluate(*DATA[:2], sample_weight=DATA[2], verbose=0))


def merge(model, folder):
    lora.merge_lora(model)


def another_alpha(model, folder):
    peft.save_adapter(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9 * config["lora_alpha"]}))
    peft.load_adapter(model, folder)


def another_lora(model, folder):
    lora.detach_lora(model)
    with_lora(model, rank=2, alpha=40.0)


def quantized(model, folder):
    lora.detach_lora(model)
    quantize_base(model, "int4", block_size=8)
    with_lora(model)


CHANGES = [merge, another_alpha, another_lora, quantized]


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_evaluated_and_trained_as_it_is(tmp_path, change, mixed_precision):
    model = small_gemma()
    tuner = small_tuner(model, mixed_precision=mixed_precision)
    tuner.train_on_batch(*DATA)
    before = loss_of(tuner)
    change(model, tmp_path)
    fresh = small_tuner(model, mixed_precision=mixed_precision)
    fresh.compile("sgd")
    assert loss_of(tuner) == pytest.approx(loss_of(fresh), rel=1e-6)
    if change is merge:
        assert loss_of(tuner) == pytest.approx(before, rel=1e-4)
        lora.unmerge_lora(model)
        assert loss_of(tuner) == pytest.approx(before, rel=1e-4)
    else:
        assert abs(loss_of(tuner) - before) > 1e-3
    start = weights_of(tuner)
    tuner.train_on_batch(*DATA)
    after = weights_of(tuner)
    assert all(moved(tuner, start)) and int(tuner.optimizer.iterations) == (2 if change is merge else 1)
    tuner.fit(*DATA[:2], sample_weight=DATA[2], batch_size=2, verbose=0)
    assert all(moved(tuner, after))


@pytest.mark.slow
def test_a_changed_model_before_the_first_step(tmp_path):
    """Rounded copies are made with the tuner, which is before."""
    model = small_gemma()
    tuner = small_tuner(model, mixed_precision=True)
    another_lora(model, tmp_path)
    found = [float(one.train_on_batch(*DATA)) for one in (tuner, small_tuner(small_gemma(alpha=40.0)))]
    assert found[0] == pytest.approx(found[1], rel=0.02)
    held = [v for v in tuner.non_trainable_variables if str(v.dtype) in ("bfloat16", "uint16")]
    assert len(held) == len(tuner.copies) == 7 + 1  # none of those before


@pytest.mark.slow
def test_a_users_optimizer_asks_for_compile(tmp_path, lines):
    model = small_gemma()
    tuner = small_tuner(model)
    tuner.compile(keras.optimizers.Adam(1e-3))
    tuner.train_on_batch(*DATA)
    another_lora(model, tmp_path)
    assert np.isfinite(loss_of(tuner))
    for train in (lambda: tuner.train_on_batch(*DATA), lambda: tuner.fit(lines), lambda: tuner.fit(*DATA[:2])):
        with pytest.raises(GemmaLoraError, match=r"compile\(optimizer=…\)` again"):
            train()
    tuner.compile(keras.optimizers.Adam(1e-3))
    start = weights_of(tuner)
    tuner.train_on_batch(*DATA)
    assert all(moved(tuner, start))


@pytest.mark.slow
def test_an_unchanged_model_is_compiled_once():
    tuner = small_tuner()
    tuner.train_on_batch(*DATA)
    loss_of(tuner)
    functions = tuner.train_function, tuner.test_function
    tuner.train_on_batch(*DATA)
    loss_of(tuner)
    assert (tuner.train_function, tuner.test_function) == functions


@pytest.mark.slow
def test_a_merged_model_is_evaluated_and_not_trained(lines):
    model = small_gemma()
    tuner = small_tuner(model)
    lora.merge_lora(model)
    start = weights_of(tuner)
    for train in (lambda: tuner.fit(lines), lambda: tuner.fit(*DATA[:2]), lambda: tuner.train_on_batch(*DATA)):
        with pytest.raises(GemmaLoraError, match="unmerge_lora"):
            train()
    assert not tuner.compiled and not any(moved(tuner, start))
    tuner.compile("sgd")
    assert np.isfinite(tuner.test_on_batch(*DATA)) and np.isfinite(loss_of(tuner))
    lora.unmerge_lora(model)
    tuner.train_on_batch(*DATA)
    assert all(moved(tuner, start))


def test_a_model_that_lost_its_lora_is_not_trained():
    model = small_gemma()
    tuner = small_tuner(model)
    lora.detach_lora(model)
    with pytest.raises(GemmaLoraError, match="apply_lora"):
        tuner.train_on_batch(*DATA)


def test_remat_with_dropout_that_came_later_is_refused():
    model = small_gemma()
    tuner = small_tuner(model, remat=True)
    lora.detach_lora(model)
    with_lora(model, dropout=0.1)
    with pytest.raises(ValueError, match="remat"):
        tuner.train_on_batch(*DATA)


@pytest.mark.slow
def test_a_fingerprint_sees_flags_and_keeps_nothing_alive():
    dense = keras.layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((2,)), dense])
    fingerprint = Fingerprint(model)
    assert fingerprint.matches(model)
    dense.kernel.trainable = False
    assert not fingerprint.matches(model)
    dense.kernel.trainable = True
    assert fingerprint.matches(model)
    dense.trainable = False
    assert not fingerprint.matches(model)
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, use_bias=False)])
    assert not fingerprint.matches(other)
    alive = weakref.ref(dense)
    del model, dense
    keras.backend.clear_session()
    gc.collect()
    assert alive() is None and not fingerprint.matches(other)


# --- the loss's chunk ------------------------------------------------------------------------------------------


@pytest.fixture
def chunks(monkeypatch):
    """The chunk sizes that losses were traced with, by the targets' shape."""
    found, plain = {}, tuner_module.chunked_cross_entropy

    def watched(hidden, embeddings, targets, *args, chunk_size, **named):
        found[tuple(targets.shape)] = chunk_size
        return plain(hidden, embeddings, targets, *args, chunk_size=chunk_size, **named)

    monkeypatch.setattr(tuner_module, "chunked_cross_entropy", watched)
    return found


@pytest.mark.slow
def test_a_chunk_is_chosen_for_each_shape_and_recorded(tmp_path, lines, chunks):
    tuner = small_tuner(run_dir=tmp_path, rows=2)
    tuner.fit(lines, verbose=0)
    carrying = [int(np.count_nonzero(batch.weights)) for batch in tuner.batches(lines)]
    chosen = -(-int(np.quantile(carrying, 0.95)) // 16) * 16
    assert chunks == {(2, 48): chosen} and chosen < 96
    assert tuner.settings["chunk_size"] is None
    assert json.loads((tmp_path / "training_settings.json").read_text())["chunk_size"] == chosen
    tuner.fit(*DATA[:2], sample_weight=DATA[2], verbose=0)
    assert chunks[4, 12] == 48  # all 48 tokens at once
    x, y, _ = arrays(40)
    tuner.train_on_batch(x, y)
    assert chunks[40, 12] == 240  # 480 tokens in two


@pytest.mark.slow
def test_a_given_chunk_is_used_everywhere(lines, chunks):
    tuner = small_tuner(chunk_size=24)
    tuner.fit(lines, limit=6, verbose=0)
    tuner.train_on_batch(*DATA)
    assert set(chunks.values()) == {24}
