"""`fit` on lines of text is Keras's `fit`: its epochs, its arguments, and a loss on lines that are not trained on."""

import json

import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template
from gemma_lora.training import FineTuner, WarmupCosine, default_epochs
from tests.training.conftest import WORDS, arrays, assert_alike, moved, small_gemma, small_tuner, weights_of

TEMPLATE = Template("{prompt}:", "{response}<eos>")
HELD_OUT = [{"prompt": f"name {word}", "response": word * 2} for word in WORDS]


@pytest.fixture
def uneven():
    """Lines that fill 7 rows of 48 in one order and 6 in another."""
    lengths = (31, 28, 26, 14, 14, 21, 28, 32, 33)
    records = [{"prompt": f"{chr(97 + i)}" * (length - 9), "response": "abcdef"} for i, length in enumerate(lengths)]
    return load_dataset({"train": records, "validation": records[:1]}, template=TEMPLATE)


def per_token(tuner, batches):
    """Σ of the losses of all tokens / their number, from Keras's own evaluation of each batch alone."""
    totals = [
        (float(tuner.test_on_batch(*batch.as_keras())) * batch.weights.sum(), batch.weights.sum()) for batch in batches
    ]
    return sum(total for total, _ in totals) / sum(count for _, count in totals)


@pytest.mark.slow
def test_epochs_are_kerass_epochs_each_with_its_own_batches(uneven):
    lines, tuner = uneven, small_tuner()
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append((epoch, [])),
        on_train_batch_end=lambda batch, logs: seen[-1][1].append(batch),
    )
    history = tuner.fit(lines, epochs=3, verbose=0, callbacks=watch)
    lengths = [len(tuner.batches(lines, epoch)) for epoch in range(3)]
    assert len(set(lengths)) > 1  # another order fills rows otherwise
    assert seen == [(epoch, list(range(length))) for epoch, length in enumerate(lengths)]
    assert history.epoch == [0, 1, 2] and set(history.history) == {"loss", "val_loss"}
    assert len(history.history["val_loss"]) == 3
    rows, start = tuner.log.rows, 0
    assert len(rows) == sum(lengths) == int(tuner.optimizer.iterations)
    for length, loss in zip(lengths, history.history["loss"], strict=True):
        assert loss == pytest.approx(np.mean([row["loss"] for row in rows[start : start + length]]), rel=1e-4)
        start += length


@pytest.mark.slow
def test_the_batches_of_each_epoch_are_trained(lines):
    """Against a loop of `train_on_batch` over `batches`."""
    tuner, loop = small_tuner(seed=4), small_tuner(seed=4)
    tuner.fit(lines, epochs=3, verbose=0)
    batches = [batch for epoch in range(3) for batch in loop.batches(lines, epoch)]
    loop.compile_for(len(batches))
    for batch in batches:
        loop.train_on_batch(*batch.as_keras())
    assert_alike(tuner, loop)


@pytest.mark.slow
def test_the_validation_loss_is_the_mean_over_tokens_however_batches_are_cut(tmp_path):
    """Of a dataset's own split by default, and after each epoch: what `evaluate` says of the model there."""
    data = load_dataset({"train": HELD_OUT * 3, "validation": HELD_OUT[:5]}, template=TEMPLATE)
    tuner = small_tuner()
    tuner.compile(keras.optimizers.SGD(0.05))
    alone = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: alone.append(logs["val_loss"]))
    history = tuner.fit(data, epochs=2, verbose=0, callbacks=[watch])
    assert history.history["val_loss"] == alone and alone[0] != alone[1]
    last = tuner.evaluate(data, verbose=0)
    assert last == pytest.approx(alone[1], rel=1e-6)
    assert last == pytest.approx(tuner.evaluate(data.validation, verbose=0), rel=1e-6)
    assert last == pytest.approx(tuner.evaluate(HELD_OUT[:5], verbose=0), rel=0.5)  # the model's own template here
    found = [small_tuner(tuner.causal_lm, rows=rows, row_length=length) for rows, length in ((1, 24), (2, 30), (4, 60))]
    own = [per_token(one, one._validation(data).epochs[0]) for one in found]
    cut = {len(one._validation(data)) for one in found}
    assert len(cut) == 3 and own == pytest.approx([last] * 3, rel=1e-5)
    assert [one.evaluate(data, verbose=0) for one in found] == pytest.approx([last] * 3, rel=1e-5)


@pytest.mark.slow
def test_validation_may_be_lines_arrays_or_switched_off(lines):
    tuner = small_tuner(learning_rate=1e-6)
    tuner.causal_lm.gemma_lora_template = TEMPLATE
    data = arrays(4)
    x, y, weights = data
    right = {
        "dataset": (lines, tuner.evaluate(lines, verbose=0)),
        "records": (HELD_OUT, None),
        "examples": (lines.train[:3], tuner.evaluate(lines.train[:3], verbose=0)),
        "arrays": (data, tuner.evaluate(x, y, sample_weight=weights, verbose=0)),
        "no weights": (data[:2], tuner.evaluate(x, y, verbose=0)),
    }
    for name, (given, loss) in right.items():
        history = tuner.fit(lines, verbose=0, limit=3, validation_data=given)
        assert np.isfinite(history.history["val_loss"][0]), name
        assert loss is None or history.history["val_loss"][0] == pytest.approx(loss, rel=1e-3), name
    assert "val_loss" not in tuner.fit(lines, verbose=0, limit=3, validation_data=False).history
    history = tuner.fit(x, y, sample_weight=weights, verbose=0, validation_data=lines.validation)
    assert np.isfinite(history.history["val_loss"][0])
    assert "val_loss" not in tuner.fit(x, y, verbose=0).history
    history = tuner.fit(lines, epochs=2, verbose=0, validation_freq=2, limit=3, validation_steps=1)
    assert len(history.history["val_loss"]) == 1


def test_a_validation_line_longer_than_a_row_is_whole(lines):
    tuner = small_tuner(row_length=24)
    long = Example("a" * 100, "b")
    data = tuner._validation([*lines.train[:2], long])
    assert max(batch.token_ids.shape[1] for batch in data.epochs[0]) == 192
    assert sum(batch.examples for batch in data.epochs[0]) == 3
    tuner.causal_lm.gemma_lora_template = TEMPLATE
    assert np.isfinite(tuner.evaluate([long], verbose=0))


@pytest.mark.parametrize("wrong", [True, 3, {"x": 1}, (1, 2), []])
def test_validation_that_is_none_is_refused_before_training(lines, wrong):
    tuner = small_tuner()
    start = weights_of(tuner)
    with pytest.raises(ValueError, match="validation_data"):
        tuner.fit(lines, verbose=0, validation_data=wrong)
    assert not tuner.compiled and not any(moved(tuner, start))


def test_evaluating_needs_no_compile(lines):
    data = arrays(2)
    found = [small_tuner().test_on_batch(*data), small_tuner().evaluate(*data[:2], sample_weight=data[2], verbose=0)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert np.isfinite(small_tuner().evaluate(lines, verbose=0))


# --- what x may be -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fit_reads_what_load_dataset_reads(tmp_path):
    """A path, dictionaries, examples: the same lines, the same training; whole where validation is given or off."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in HELD_OUT))
    examples = [Example(record["prompt"], record["response"], "mine", 5) for record in HELD_OUT]
    found = []
    for source in (path, str(path), HELD_OUT, examples, load_dataset(path)):
        tuner = small_tuner()
        tuner.fit(source, verbose=0)
        found.append(tuner)
    for other in found[:-1]:
        assert_alike(other, found[-1], atol=0)
    rows = len(HELD_OUT) - len(load_dataset(path).validation)
    assert rows < len(HELD_OUT)
    whole = small_tuner()
    whole.fit(HELD_OUT, verbose=0, validation_data=False)
    all_lines = load_dataset({"train": HELD_OUT, "validation": HELD_OUT})
    other = small_tuner()
    other.fit(all_lines, verbose=0, validation_data=False)
    tokens = sum(batch.weights.sum() for batch in other.batches(all_lines))
    assert sum(whole.log.tokens) == tokens > sum(found[0].log.tokens)
    with pytest.raises(GemmaLoraError, match="nowhere.jsonl: not found"):
        whole.fit("nowhere.jsonl")


def test_an_example_that_is_too_long_is_named_as_its_caller_named_it():
    examples = [Example(record["prompt"], record["response"], "mine.jsonl", 5) for record in HELD_OUT]
    with pytest.raises(GemmaLoraError, match="mine.jsonl:7"):
        small_tuner().fit([*examples, Example("a" * 99, "b", "mine.jsonl", 7)], verbose=0, validation_data=False)


@pytest.mark.slow
def test_epochs_none_is_the_default_for_the_lines(lines):
    tuner = small_tuner()
    history = tuner.fit(lines, epochs=None, verbose=0, validation_data=False)
    assert len(history.epoch) == default_epochs(len(lines.train)) == 6


@pytest.mark.slow
def test_tokens_that_were_made_before_are_not_made_again(lines, monkeypatch):
    plain, given = small_tuner(), small_tuner()
    plain.fit(lines, limit=9, verbose=0, validation_data=False)
    encoded = given.encode(lines)
    monkeypatch.setattr(FineTuner, "encode", None)
    given.fit(lines, limit=9, verbose=0, validation_data=False, encoded=encoded)
    assert_alike(plain, given, atol=0)


# --- Keras's arguments -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_initial_epoch_begins_with_that_epochs_batches(lines):
    whole, rest = small_tuner(), small_tuner()
    for tuner in (whole, rest):
        tuner.compile(keras.optimizers.SGD(0.05))
    whole.fit(lines, epochs=2, verbose=0)
    history = rest.fit(lines, epochs=1, verbose=0)
    assert history.epoch == [0]
    history = rest.fit(lines, epochs=2, initial_epoch=1, verbose=0)
    assert history.epoch == [1]
    assert_alike(whole, rest, atol=0)
    rest = small_tuner()
    rest.fit(lines, epochs=3, initial_epoch=1, verbose=0)
    steps = len(rest.batches(lines, 1)) + len(rest.batches(lines, 2))
    assert rest.optimizer._learning_rate.steps == int(rest.optimizer.iterations) == steps


@pytest.mark.slow
def test_steps_per_epoch_goes_on_through_the_lines(lines):
    tuner = small_tuner()
    stream = [*tuner.batches(lines, 0), *tuner.batches(lines, 1)]
    steps = len(tuner.batches(lines)) - 2
    history = tuner.fit(lines, epochs=2, steps_per_epoch=steps, verbose=0)
    assert len(history.epoch) == 2 and len(tuner.log.rows) == 2 * steps
    assert tuner.log.tokens == [int(np.count_nonzero(batch.weights)) for batch in stream[: 2 * steps]]


@pytest.mark.slow
def test_several_steps_an_execution_change_nothing_but_when_callbacks_are_called(uneven):
    lines = uneven
    many, one = small_tuner(), small_tuner()
    seen = []
    many.compile(keras.optimizers.Adam(1e-3), steps_per_execution=4)
    one.compile(keras.optimizers.Adam(1e-3))
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    histories = [tuner.fit(lines, epochs=3, verbose=0, callbacks=[watch]) for tuner in (many, one)]
    assert_alike(many, one, atol=0)
    assert [row["loss"] for row in many.log.rows] == [row["loss"] for row in one.log.rows]
    assert histories[0].history == histories[1].history
    lengths = [len(one.batches(lines, epoch)) for epoch in range(3)]
    executions = [place + 3 for length in lengths for place in range(0, length, 4)]
    assert seen[: len(executions)] == executions and len(set(lengths)) > 1


@pytest.mark.slow
def test_shuffle_false_keeps_the_order_of_the_lines(lines):
    tuner = small_tuner()
    batches = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(tuner.log.rows[-1]))
    tuner.compile(keras.optimizers.SGD(0.0))
    tuner.fit(lines, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    losses = [row["loss"] for row in batches]
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :]
    tuner.fit(lines, epochs=2, verbose=0)
    losses = [row["loss"] for row in tuner.log.rows]
    assert losses[: len(losses) // 2] != losses[len(losses) // 2 :]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"batch_size": 4}, "rows="),
        ({"validation_split": 0.1}, "validation_fraction"),
        ({"validation_batch_size": 4}, "rows="),
        ({"y": 1}, "in the lines"),
        ({"sample_weight": 1}, "answers' tokens"),
        ({"class_weight": {0: 1}}, "answers' tokens"),
        ({"initial_epoch": -1}, "initial_epoch=-1"),
        ({"initial_epoch": 3, "epochs": 3}, "initial_epoch=3, epochs=3"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
    ],
)
def test_what_does_not_go_with_lines_is_named_before_training(lines, given, said):
    tuner = small_tuner()
    start = weights_of(tuner)
    with pytest.raises(ValueError, match=f"`(epochs|{next(iter(given))})` .*{said}"):
        tuner.fit(lines, verbose=0, **given)
    assert not tuner.compiled and not any(moved(tuner, start))


def test_an_unknown_argument_and_metrics_are_named(lines):
    with pytest.raises(TypeError, match="no argument 'epoch'"):
        small_tuner().fit(lines, epoch=3)
    for name in ("metrics", "weighted_metrics"):
        with pytest.raises(ValueError, match=f"`{name}` need all the logits.*gemma_lora.evaluate"):
            small_tuner().compile("adam", **{name: ["accuracy"]})


@pytest.mark.slow
def test_averaged_weights_are_those_of_keras(lines):
    """`use_ema`: at the end the weights are the averages of those after each step, as Keras writes them."""
    tuner = small_tuner()
    tuner.compile(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8))
    after = []

    def keep(batch, logs):
        after.append(weights_of(tuner))

    start = weights_of(tuner)
    history = tuner.fit(lines, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=keep)])
    assert len(history.epoch) == 1
    assert any(moved(tuner, start))
    averages = after[0]
    for weights in after[1:]:
        averages = [0.8 * old + 0.2 * new for old, new in zip(averages, weights, strict=True)]
    for ours, right in zip(weights_of(tuner), averages, strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-5)
    assert all(np.any(last != average) for last, average in zip(after[-1], averages, strict=True))


@pytest.mark.slow
def test_an_optimizer_of_ones_own_keeps_its_state(lines):
    """Two epochs are two calls of one epoch where it is the optimizer that goes on."""
    one, two = small_tuner(accumulate=2), small_tuner(accumulate=2)
    for tuner in (one, two):
        tuner.compile(keras.optimizers.Adam(1e-3))
    one.fit(lines, epochs=2, verbose=0)
    two.fit(lines, epochs=1, verbose=0)
    two.fit(lines, epochs=2, initial_epoch=1, verbose=0)
    assert_alike(one, two, atol=0)


def test_the_default_schedule_is_over_all_epochs(lines):
    tuner = small_tuner()
    tuner.fit(lines, epochs=2, limit=3, verbose=0, validation_data=False)
    assert isinstance(tuner.optimizer._learning_rate, WarmupCosine)
    assert tuner.optimizer._learning_rate.steps == len(tuner.log.rows)


def test_a_merged_model_is_evaluated_without_compile(lines):
    model = small_gemma()
    tuner = small_tuner(model)
    before = tuner.evaluate(lines, verbose=0)
    lora.merge_lora(model)
    assert small_tuner(model).evaluate(lines, verbose=0) == pytest.approx(before, rel=1e-4)
