"""LoRA on plain Keras models: which layers get it, what `fit` moves, and that they are Keras models still."""

import keras
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.base.settings import layer_patterns
from gemma_lora.lora import LoRADense, adapt, lora_layers, named_layers, trained_weights
from gemma_lora.lora.plain import matches

layers = keras.layers
X = np.random.default_rng(0).normal(size=(24, 5)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 24)


def sequential():
    between = [layers.BatchNormalization(name="norm"), layers.Dropout(0.1)]
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(8, "relu", name="first"), *between, layers.Dense(3, name="last")]
    )


def functional():
    """A block inside a model, and a layer that is called twice."""
    block = keras.Sequential([keras.Input((8,)), layers.Dense(8, "tanh", name="dense")], name="block_0")
    shared = layers.Dense(8, name="shared")
    inputs = keras.Input((5,))
    hidden = shared(block(shared(layers.Dense(8, name="first")(inputs))))
    return keras.Model(inputs, layers.Dense(3, name="last")(hidden))


class Subclassed(keras.Model):
    """Layers in a list, a dictionary, a tuple and an attribute."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(8, "relu", name=f"block_{i}") for i in range(2)]
        named = {"activation": "tanh", "bias_axes": "o", "name": "einsum"}
        self.named = {"a": layers.EinsumDense("bi,io->bo", output_shape=(8,), **named)}
        self.held = (layers.Dense(8, name="first"),)
        self.last = layers.Dense(3, name="last")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(self.held[0](self.named["a"](x)))


def subclassed():
    model = Subclassed()
    model(X)
    return model


MODELS = [sequential, functional, subclassed]
LINEAR = {sequential: 2, functional: 4, subclassed: 5}


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def trained(model, epochs=8, falls=True):
    model.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(X, Y, epochs=epochs, verbose=0).history["loss"]
    assert not falls or losses[-1] < losses[0]
    return model


def answers(model):
    return model.predict(X, verbose=0)


def values(model):
    return {id(weight): np.asarray(weight.value).copy() for weight in model.weights}


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_fit_moves_a_and_b_alone_and_merging_changes_no_answer(make):
    model = make()
    before, held = answers(model), values(model)
    assert gl.apply_lora(model, rank=2, targets="all-linear") is model
    assert len(lora_layers(model)) == LINEAR[make]
    np.testing.assert_array_equal(answers(model), before)
    assert {weight.name for weight in model.trainable_weights} == {"lora_a", "lora_b"}
    trained(model)
    after, now = answers(model), values(model)
    assert np.abs(after - before).max() > 0.1
    assert held.keys() <= now.keys()  # every weight is there still, the same object
    assert all(np.array_equal(held[key], now[key]) for key in held)
    gl.merge_lora(model)
    np.testing.assert_allclose(answers(model), after, atol=1e-5)
    gl.unmerge_lora(model)
    np.testing.assert_allclose(answers(model), after, atol=1e-5)
    gl.detach_lora(model)
    assert not lora_layers(model) and values(model).keys() == held.keys()
    np.testing.assert_allclose(answers(model), before, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_a_merged_update_stays_when_lora_goes_and_the_model_trains_again(make):
    model = trained(gl.apply_lora(make(), rank=2))
    after = answers(model)
    gl.merge_lora(model)
    gl.detach_lora(model)
    np.testing.assert_allclose(answers(model), after, atol=1e-5)
    model.trainable = True
    trained(model, epochs=3, falls=False)  # it had been trained before
    assert np.abs(answers(model) - after).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_weights_are_saved_by_keras(make, tmp_path):
    model = trained(gl.apply_lora(make(), rank=2, targets="*", train="last"))
    model.save_weights(tmp_path / "lora.weights.h5")
    other = gl.apply_lora(make(), rank=2, targets="*", train="last", seed=5)
    other.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_allclose(answers(other), answers(model), atol=1e-6)
    if make is not subclassed:
        model.save(tmp_path / "model.keras")
        np.testing.assert_allclose(
            answers(keras.models.load_model(tmp_path / "model.keras")), answers(model), atol=1e-6
        )


@pytest.mark.slow
def test_a_head_is_trained_as_it_is():
    model = sequential()
    held = values(model)
    gl.apply_lora(model, rank=2, targets="all-linear", train=("last",))
    assert [layer.name for layer in lora_layers(model)] == ["first"]
    assert {id(weight) for weight in trained_weights(model)} == {id(w) for w in model.get_layer("last").weights}
    trained(model)
    now = values(model)
    moved = {w.path.split("/")[-2] for w in model.weights if id(w) in held and (held[id(w)] != now[id(w)]).any()}
    assert moved == {"last"}


@pytest.mark.slow
def test_a_frozen_part_gets_lora_that_trains():
    model = functional()
    model.get_layer("block_0").trainable = False
    gl.apply_lora(model, rank=2, targets="block_0/dense")
    assert len(model.trainable_weights) == 2
    (layer,) = lora_layers(model)
    trained(model)
    assert np.any(layer.lora_b)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Layer .* does not support masking")
def test_a_mask_passes_a_layer_with_lora():
    tokens = np.random.default_rng(0).integers(1, 9, (4, 6))
    tokens[:, 4:] = 0
    between = [layers.Dense(4, "relu", name="first"), layers.GlobalAveragePooling1D(), layers.Dense(2, name="last")]
    model = keras.Sequential([keras.Input((6,)), layers.Embedding(9, 4, "normal", mask_zero=True), *between])
    gl.apply_lora(model, rank=2, targets="first")
    (layer,) = lora_layers(model)
    layer.lora_b.assign(np.random.default_rng(1).normal(size=layer.lora_b.shape))
    assert layer.supports_masking
    embedded = np.asarray(model.layers[0].embeddings)[tokens]
    kernel = np.asarray(layer.base.kernel) + layer.scaling * np.asarray(layer.lora_a) @ np.asarray(layer.lora_b)
    hidden = np.maximum(embedded @ kernel, 0)
    mean = hidden[:, :4].mean(axis=1)  # over the tokens that are there
    np.testing.assert_allclose(model.predict(tokens, verbose=0), mean @ model.layers[3].kernel, atol=1e-5)


@pytest.mark.slow
def test_keras_attention_takes_lora():
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    inputs = keras.Input((4, 6))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs))
    before = np.asarray(model(x))
    gl.apply_lora(model, rank=2, targets="attention/*")
    assert len(lora_layers(model)) == 4
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    for layer in lora_layers(model):
        layer.lora_b.assign(np.random.default_rng(1).normal(size=layer.lora_b.shape))
    after = np.asarray(model(x))
    assert np.abs(after - before).max() > 0.01
    gl.merge_lora(model)
    np.testing.assert_allclose(model(x), after, atol=1e-4)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("first", ["first"]),
        ("first, last", ["first", "last"]),
        (["block_*/dense"], ["dense"]),
        (["block_0/*"], ["dense"]),
        ("dens[ef]", ["dense"]),
        (("*st",), ["first", "last"]),
        ("*", ["first", "shared", "dense", "last"]),
        ("all-linear", ["first", "shared", "dense", "last"]),
    ],
)
def test_layers_are_named_by_the_end_of_their_path(targets, expected):
    model = gl.apply_lora(functional(), rank=1, targets=targets)
    assert sorted(layer.name for layer in lora_layers(model)) == sorted(expected)


def test_a_star_stays_inside_a_name():
    assert matches("block_*/dense", "a/block_1/dense") and not matches("block_*/dense", "block_1/mlp/dense")
    assert not matches("a/b/c", "b/c")


def test_layers_of_one_name_have_paths_apart():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(2, name="same"), layers.Dense(2, name="same")

        def call(self, x):
            return self.b(self.a(x))

    model = Twins()
    model(X)
    assert list(named_layers(model)) == ["same", "same (2)"]
    gl.apply_lora(model, rank=1, targets="same")
    assert len(lora_layers(model)) == 2


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"targets": "frist"}, ["`targets`", "'frist'", "Near it: first"]),
        ({"targets": "block_0/dence"}, ["block_0/dense"]),
        ({"targets": ("first", "zzz")}, ["'zzz'", "There are first, "]),
        ({"targets": "block_0"}, ["'block_0' is a Sequential", "It holds block_0/dense"]),
        ({"targets": "first", "train": "heat"}, ["`train`", "'heat'"]),
        ({"targets": "last", "train": "last"}, ["`train`"]),
        ({"targets": ()}, ["`targets`", "Received: targets=()"]),
        ({"targets": [3]}, ["`targets`", "Received: targets=[3]"]),
        ({"targets": None}, ["`targets`"]),
        ({"rank": 0}, ["`rank`"]),
    ],
)
def test_what_names_no_layer_is_refused_and_changes_nothing(named, words):
    model = functional()
    flags = [variable.trainable for variable in model.variables]
    with pytest.raises(ValueError) as error:
        gl.apply_lora(model, **named)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not lora_layers(model) and flags == [variable.trainable for variable in model.variables]


def test_a_layer_that_is_no_product_is_named():
    with pytest.raises(ValueError, match="'norm' is a BatchNormalization"):
        gl.apply_lora(sequential(), targets="norm")
    with pytest.raises(ValueError, match="holds no Dense"):
        gl.apply_lora(keras.Sequential([keras.Input((3,)), layers.BatchNormalization()]))


def test_layers_that_cannot_have_lora_are_named():
    with pytest.raises(ValueError, match="not built"):
        gl.apply_lora(keras.Sequential([layers.Dense(3, name="first")]))
    model = sequential()
    model.get_layer("first").enable_lora(2)
    with pytest.raises(ValueError, match="'first'.*Keras's own LoRA"):
        gl.apply_lora(model)
    inputs = keras.Input((4, 6))
    odd = keras.Model(inputs, layers.EinsumDense("btd,tdh->bth", output_shape=(4, 3), name="odd")(inputs))
    with pytest.raises(ValueError, match="'odd'.*no matrix product"):
        gl.apply_lora(odd)


def test_an_error_half_way_leaves_the_model_as_it_was():
    model = sequential()
    flags = [variable.trainable for variable in model.variables]

    def make(layer, number):
        if number:
            raise RuntimeError("half way")
        return LoRADense(layer, 2)

    with pytest.raises(RuntimeError, match="half way"):
        adapt(model, make, "all-linear")
    assert flags == [variable.trainable for variable in model.variables]
    assert model.get_layer("first").activation is keras.activations.relu


def test_a_gemma_keeps_its_seven_names(gemma):
    for targets in ("dense", "block_*", "ffw_gating", "*"):
        with pytest.raises(ValueError, match="`targets` must name layers among query, key"):
            gl.apply_lora(gemma, targets=targets)
    with pytest.raises(ValueError, match="`train` is for plain Keras models"):
        gl.apply_lora(gemma, train="final_normalization")
    assert not lora_layers(gemma)


def test_pefts_format_is_a_gemmas(tmp_path):
    model = gl.apply_lora(sequential(), rank=2)
    with pytest.raises(ValueError, match="save_weights.*Sequential"):
        gl.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="load_weights.*Sequential"):
        gl.load_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_patterns_are_kept_in_order():
    assert layer_patterns(["b", "a", "b"]) == ("b", "a")
    with pytest.raises(ValueError, match="`train` must be names"):
        layer_patterns("a,,b", "train")
