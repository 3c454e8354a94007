"""Each check says ✓ of a sound training and ✗ once the one thing that it looks at is broken."""

import jax
import keras
import numpy as np
import pytest

from gemma_lora.course import traps
from gemma_lora.data.dataset import load_dataset
from gemma_lora.lora import apply_lora
from gemma_lora.training import health
from gemma_lora.training.tuner import FineTuner
from tests.conftest import CharacterTokenizer, tiny_gemma


def mean_loss(**more):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **more)


def with_large_logits(model):
    """Frozen norm and embeddings bound the logits of a random Gemma, and so how small a loss LoRA can reach."""
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, 5.0))
    return model


def gemma_with_lora(rate=0.02, **loss):
    model = with_large_logits(traps.tiny_gemma())
    model.backbone.enable_lora(8, ["query", "key", "value", "attention_output", "ffw_gating", "ffw_linear"])
    model.compile(keras.optimizers.Adam(rate), mean_loss(**(loss or {"reduction": "mean_with_sample_weight"})))
    return model


def network(*layers, rate=0.01, loss="mse"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, name="hidden"), *layers, keras.layers.Dense(4)])
    model.compile(keras.optimizers.Adam(rate), loss)
    return model


def numbers(rows=4):
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, 8)).astype("float32"), rng.normal(size=(rows, 4)).astype("float32"), None


@pytest.fixture(scope="module")
def sound():
    return gemma_with_lora()


@pytest.mark.slow
def test_a_sound_training_passes_every_check(sound):
    found = health.check(sound, traps.random_rows(rows=2))
    assert [str(finding) for finding in found if not finding.fine] == []
    assert len(found) == 5 and all(str(finding).startswith("✓ ") for finding in found)


@pytest.mark.slow
def test_the_model_and_its_optimizer_are_given_back(sound):
    batch = traps.random_rows()
    sound.train_on_batch(*batch)
    variables = [*sound.variables, *sound.optimizer.variables]
    metrics = {id(variable) for variable in sound.metrics_variables}  # every Keras step begins them anew
    before = {variable.path: np.array(variable.value) for variable in variables if id(variable) not in metrics}
    health.check(sound, batch)
    after = {variable.path: np.array(variable.value) for variable in variables if id(variable) not in metrics}
    assert all(np.array_equal(after[path], value) for path, value in before.items())
    assert int(sound.optimizer.iterations) == 1


@pytest.mark.slow
def test_it_looks_at_a_fine_tuner_too():
    model = apply_lora(with_large_logits(tiny_gemma()), rank=8, targets="all-linear")
    tuner = FineTuner(model, mixed_precision=False)
    tuner.compile(keras.optimizers.Adam(0.02))
    x, y, weights = traps.random_rows(rows=2, length=16)
    x["padding_mask"] = np.array([[1] * 8 + [2] * 8] * 2, "int32")
    found = health.check(tuner, (x, y, weights))
    assert [str(finding) for finding in found if not finding.fine] == []
    assert "neighbours are unseen" in [finding.check for finding in found]


def classifier(lora=None, rate=0.01):
    """A classifier with everything that moves without being trained, and a batch `(x, y)` for it."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5)).astype("float32"), rng.integers(0, 3, 16)
    normalization = keras.layers.Normalization()
    normalization.adapt(x)
    hidden = [keras.layers.Dense(16, "relu", name="first"), keras.layers.BatchNormalization(name="norm")]
    more = [keras.layers.Dropout(0.1), keras.layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((5,)), normalization, *hidden, *more])
    if lora is not None:
        apply_lora(model, rank=4, **lora)
    model.compile(keras.optimizers.Adam(rate), mean_loss(), metrics=["accuracy"])
    return model, (x, y)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {}, {"targets": "first", "train": "head"}, {"targets": "first", "dora": True}])
def test_a_classifiers_batch_of_two_raises_no_alarm(lora):
    # DoRA's kernels keep their direction longer, and need larger steps to overfit a batch.
    model, batch = classifier(lora, rate=0.03 if lora and lora.get("dora") else 0.01)
    found = health.check(model, batch)
    assert [str(finding) for finding in found if not finding.fine] == []
    assert "padding is free" not in [finding.check for finding in found]  # its features are no tokens


@pytest.mark.slow
def test_averages_that_move_beside_lora_are_named():
    model, batch = classifier({})
    model.get_layer("norm").trainable = True
    model.compile(keras.optimizers.Adam(0.01), mean_loss())
    finding = health.trains_what_it_should(model, batch)
    assert not finding.fine and "norm/" in finding.says and "should not" in finding.says


@pytest.mark.slow
def test_a_slow_training_that_gets_there_is_no_alarm():
    model, batch = classifier({}, rate=1e-3)
    assert not health.overfits_one_batch(model, batch, rounds=1).fine
    finding = health.overfits_one_batch(model, batch)
    assert finding.fine and "in 100 steps" not in finding.says


def test_padding_is_for_tokens():
    tokens, labels = np.ones((4, 6), "int32"), np.ones(4, "int32")
    mask = {"token_ids": tokens, "padding_mask": tokens}
    assert health._has_padding(mask, labels, None) and health._has_padding(tokens, tokens, None)
    assert health._has_padding(np.ones((4, 6, 2)), tokens, np.ones((4, 6)))
    assert not health._has_padding(tokens, labels, None) and not health._has_padding(np.ones((4, 6)), tokens, None)
    with pytest.raises(ValueError, match="`batch`"):
        health._parts((tokens,))


@pytest.mark.slow
@pytest.mark.parametrize("dora, accumulate", [(False, 1), (True, 1), (False, 3)])
def test_it_raises_no_false_alarm_before_and_after_fit(dora, accumulate):
    """As README shows it: no `compile`, and after a `fit` whose schedule ended at zero."""
    model = with_large_logits(tiny_gemma(layers=1))
    model.preprocessor = type("Preprocessor", (), {"tokenizer": CharacterTokenizer()})()
    apply_lora(model, rank=8, targets="all-linear", dora=dora)
    named = {"rows": 1, "row_length": 32, "learning_rate": 0.02, "mixed_precision": False}
    tuner = FineTuner(model, accumulate=accumulate, **named)
    lines = load_dataset([{"prompt": f"say {word}", "response": word} for word in ("red", "blue", "green")])
    batch = tuner.batches(lines)[0].as_keras()
    for _ in range(2):
        before = {v.path: np.array(v.value) for v in model.variables}
        found = health.check(tuner, batch)
        assert [str(finding) for finding in found if not finding.fine] == []
        assert all(np.array_equal(v.value, before[v.path]) for v in model.variables)
        tuner.fit(lines, epochs=30, verbose=0, validation_data=False)
    steps = tuner.optimizer.iterations
    assert int(steps) > 0 and float(tuner.optimizer.learning_rate) < 1e-3  # the schedule's end
    health.what_moves(tuner, batch)
    assert tuner.optimizer.iterations is steps and int(steps) > 0


def test_adapters_of_houlsby_are_what_should_move():
    paths = ["block/down_kernel", "block/up_bias (2)", "dense/kernel"]
    assert list(map(health._is_bottleneck, paths)) == [True, True, False]


# --- trains what it should ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_weight_that_should_be_frozen_is_named():
    model = gemma_with_lora()
    model.backbone.layer_norm.trainable = True
    model.compile(keras.optimizers.Adam(0.02), mean_loss())
    finding = health.trains_what_it_should(model, traps.random_rows())
    assert not finding.fine and "final_normalization" in finding.says and "should not" in finding.says


@pytest.mark.slow
def test_factors_that_are_both_zero_are_named():
    model = gemma_with_lora()
    for weight in model.trainable_weights:
        weight.assign(np.zeros(weight.shape))
    finding = health.trains_what_it_should(model, traps.random_rows())
    assert not finding.fine and "does not" in finding.says and "lora_kernel" in finding.says


def test_nothing_to_train_and_steps_too_small_are_named():
    model = network()
    assert "nothing" in health.trains_what_it_should(model, numbers(), should=lambda path: "lora" in path).says
    coarse = traps.tiny_network("bfloat16")
    coarse.compile(keras.optimizers.SGD(1e-3), "mse")
    finding = health.trains_what_it_should(coarse, numbers(), steps=5)
    assert not finding.fine and "stand still in bfloat16" in finding.says


def test_what_moves_tells_of_equal_paths_apart():
    assert health._paths(network().weights)[0].endswith("hidden/kernel")

    class Weight:
        path = "a/kernel"

    assert health._paths([Weight(), Weight()]) == ["a/kernel", "a/kernel (2)"]


# --- the other checks --------------------------------------------------------------------------------------


@jax.custom_vjp
def passed_on(x):
    return x


passed_on.defvjp(lambda x: (x, None), lambda _, dy: (3.0 * dy,))


class WrongGradient(keras.layers.Layer):
    def call(self, x):
        return passed_on(x)


@pytest.mark.slow
def test_a_wrong_gradient_is_seen():
    assert health.gradient_is_right(network(), numbers()).fine
    model = network(WrongGradient())
    finding = health.gradient_is_right(model, numbers())
    assert not finding.fine and health.slope_ratio(model, numbers()) < 0.6
    frozen = network()
    frozen.trainable = False
    frozen.compile("adam", "mse")
    assert "zero" in health.gradient_is_right(frozen, numbers()).says


def test_a_training_that_does_not_get_there_is_seen():
    assert health.overfits_one_batch(network(), numbers(), steps=200).fine
    assert not health.overfits_one_batch(network(rate=1e-6), numbers(), steps=20).fine


class AlwaysDropout(keras.layers.Dropout):
    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


def test_dropout_in_evaluation_is_seen():
    assert health.evaluates_alike(network(keras.layers.Dropout(0.3)), numbers()).fine
    assert not health.evaluates_alike(network(AlwaysDropout(0.3)), numbers()).fine


@pytest.mark.slow
def test_a_mean_over_padding_is_seen():
    model = gemma_with_lora(reduction="sum_over_batch_size")
    finding = health.padding_is_free(model, traps.random_rows())
    assert not finding.fine and "8 more" in finding.says


@pytest.mark.slow
def test_neighbours_that_are_seen():
    model, (x, y, weights) = gemma_with_lora(), traps.random_rows()
    x["padding_mask"] = np.array([[1] * 6 + [2] * 6] * 4, "int32")
    assert not health.neighbours_are_unseen(model, (x, y, weights)).fine
    tuner = FineTuner(model)
    tuner.compile(keras.optimizers.Adam(0.02))
    assert health.neighbours_are_unseen(tuner, (x, y, weights)).fine
    with pytest.raises(ValueError, match="No row"):
        health.neighbours_are_unseen(model, traps.random_rows())


def test_reading_a_batch_back_marks_what_carries_loss():
    tokenizer = CharacterTokenizer()
    ids = np.array([[2, *tokenizer.tokenize("2+2="), *tokenizer.tokenize("4"), 1, 0, 0]])
    x = {"token_ids": ids[:, :-1], "padding_mask": (ids[:, :-1] > 0)}
    weights = np.array([[0, 0, 0, 0, 1, 1, 0, 0]])
    assert health.read_back((x, ids[:, 1:], weights), tokenizer) == ["<bos>2+2=⟦4<eos>⟧"]
    assert health.pieces((x, ids[:, 1:], weights), tokenizer)[0][-3:] == [("=", False), ("4", True), ("<eos>", True)]
    assert health.read_back((x, ids[:, 1:], 0 * weights), tokenizer) == ["<bos>2+2=4<eos>"]
    cut = {name: array[:, :5] for name, array in x.items()}  # the answer is a target only
    assert health.read_back((cut, ids[:, 1:6], weights[:, :5]), tokenizer) == ["<bos>2+2=⟦4⟧"]
    packed = {"token_ids": np.array([[2, 70, 2, 71]]), "padding_mask": np.array([[1, 1, 2, 2]])}
    batch = packed, np.array([[70, 0, 71, 0]]), np.array([[1.0, 0, 1, 0]])
    assert health.read_back(batch, tokenizer) == ["<bos>⟦@⟧<bos>⟦A⟧"]
