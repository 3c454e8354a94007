"""Bottleneck adapters against numpy, a plain Keras model and blocks put together by hand, for every Gemma."""

import contextlib

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template
from gemma_lora.generation import engine as generation
from gemma_lora.lora import houlsby as adapters
from gemma_lora.training.tuner import FineTuner
from tests.conftest import tiny_gemma
from tests.training.test_checkpoint import StopAt

X = {"token_ids": np.arange(12)[None] + 5, "padding_mask": np.ones((1, 12), "int32")}


def filled(model, size=0.3, seed=0):
    """Gives every adapter large weights, so that each of them does something."""
    rng = np.random.default_rng(seed)
    for layer in adapters.adapter_layers(model):
        for variable in layer.adapter.variables:
            variable.assign(rng.normal(0, size, variable.shape))
    return model


def built(bottleneck=3, width=5, **named):
    adapter = adapters.BottleneckAdapter(bottleneck, **named)
    adapter.build((None, width))
    return adapter


def random_weights(adapter, seed=0):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=v.shape).astype("float32") for v in adapter.variables]
    adapter.set_weights(weights)
    return weights


def plain_model():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, activation="relu", name="first")(inputs)
    hidden = keras.layers.Dense(6, activation="relu", name="second")(hidden)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))


# --- the layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_layer_is_the_formula(shape):
    adapter = built(activation="relu")
    down, down_bias, up, up_bias = random_weights(adapter)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    expected = x + np.maximum(np.einsum("...d,dm->...m", x, down) + down_bias, 0) @ up + up_bias
    np.testing.assert_allclose(adapter(x), expected, atol=1e-5)


def test_layer_is_a_keras_model_with_the_same_weights():
    adapter = built(activation="gelu")
    weights = random_weights(adapter)
    inputs = keras.Input((5,))
    middle = keras.layers.Dense(3, activation="gelu")(inputs)
    model = keras.Model(inputs, keras.layers.Add()([inputs, keras.layers.Dense(5)(middle)]))
    model.set_weights(weights)
    x = np.random.default_rng(1).normal(size=(7, 5)).astype("float32")
    np.testing.assert_allclose(adapter(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_start_is_close_to_the_identity_and_not_stuck():
    adapter = built(bottleneck=16, width=400, seed=1)
    down, up = np.asarray(adapter.down_kernel), np.asarray(adapter.up_kernel)
    for kernel in (down, up):  # cut off at two standard deviations, which leaves 0.88 of one
        assert 0.018 < np.abs(kernel).max() <= 0.02 and abs(kernel.std() - 0.0088) < 3e-4
    assert not np.any(adapter.down_bias) and not np.any(adapter.up_bias)
    for other in (up.ravel(), up.T.ravel()):
        assert abs(np.corrcoef(down.ravel(), other)[0, 1]) < 0.05  # two draws, not one
    x = np.random.default_rng(1).normal(size=(50, 400)).astype("float32")
    change = np.linalg.norm(np.asarray(adapter(x)) - x) / np.linalg.norm(x)
    assert 1e-4 < change < 0.02


@pytest.mark.parametrize("width, bottleneck", [(5, 3), (640, 16), (7, 1)])
def test_parameter_count_is_what_the_layer_holds(width, bottleneck):
    adapter = built(bottleneck, width)
    assert adapters.parameter_count(width, bottleneck) == sum(v.value.size for v in adapter.trainable_variables)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    adapter = built(activation="tanh")
    values = [w.astype("float64") for w in random_weights(adapter)]
    x = np.random.default_rng(1).normal(size=(4, 5))

    def loss(values):
        down, down_bias, up, up_bias = values
        return np.sum((x + np.tanh(x @ down + down_bias) @ up + up_bias) ** 2)

    import jax

    def of_layer(trainable):
        return keras.ops.sum(adapter.stateless_call(trainable, [], x.astype("float32"))[0] ** 2)

    found = jax.grad(of_layer)([v.value for v in adapter.trainable_variables])
    for number, gradient in enumerate(found):
        for index in list(np.ndindex(gradient.shape))[::4]:
            steps = []
            for step in (1e-5, -1e-5):
                moved = [value.copy() for value in values]
                moved[number][index] += step
                steps.append(loss(moved))
            assert gradient[index] == pytest.approx((steps[0] - steps[1]) / 2e-5, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("bottleneck", [0, -1, 2.5, True])
def test_bad_bottlenecks_are_named(bottleneck):
    with pytest.raises(ValueError, match="bottleneck"):
        adapters.BottleneckAdapter(bottleneck)


@pytest.mark.parametrize("init_std", [-0.1, float("nan")])
def test_bad_starts_are_named(init_std):
    with pytest.raises(ValueError, match="init_std"):
        adapters.BottleneckAdapter(2, init_std=init_std)


def test_bfloat16_stays_bfloat16_over_float32_weights():
    adapter = built(dtype="bfloat16")
    assert {v.dtype for v in adapter.variables} == {"float32"}
    assert adapter(np.ones((2, 5), "float32")).dtype == "bfloat16"


@pytest.mark.slow
def test_a_saved_keras_model_comes_back(tmp_path):
    model = filled(adapters.apply_adapters(plain_model(), 2, ("first", "second")))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(1).normal(size=(3, 4))
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)


# --- in a plain Keras model --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_plain_model_against_numpy(kind):
    base = plain_model()
    if kind == "sequential":
        base = keras.Sequential([keras.Input((4,)), *base.layers[1:]])
    kernels = [np.asarray(w) for w in base.get_weights()]
    x = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
    before = np.asarray(base(x))
    model = filled(adapters.apply_adapters(base, 2, ("first", "second"), activation="tanh"))
    parts = {layer.name: layer.adapter.get_weights() for layer in adapters.adapter_layers(model)}

    def adapted(h, name):
        down, down_bias, up, up_bias = parts[name]
        return h + np.tanh(h @ down + down_bias) @ up + up_bias

    h = adapted(np.maximum(x @ kernels[0] + kernels[1], 0), "first")
    h = adapted(np.maximum(h @ kernels[2] + kernels[3], 0), "second")
    np.testing.assert_allclose(model(x), h @ kernels[4] + kernels[5], atol=1e-5)
    assert {v.name for v in model.trainable_variables} == {"down_kernel", "down_bias", "up_kernel", "up_bias"}
    np.testing.assert_array_equal(adapters.remove_adapters(model)(x), before)
    np.testing.assert_array_equal(base(x), before)  # the first model's graph has not changed


class Held(keras.Model):
    """A model whose layers are attributes, as KerasHub's blocks hold theirs."""

    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(6, name="inner")
        self.last = keras.layers.Dense(2, name="last")

    def call(self, x):
        return self.last(self.inner(x))


def test_layers_held_as_attributes_change_in_place():
    model, x = Held(), np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
    before = np.asarray(model(x))
    assert adapters.apply_adapters(model, 2, "inner") is model
    filled(model)
    expected = model.last(model.inner.adapter(model.inner.base(x)))
    np.testing.assert_allclose(model(x), expected, atol=1e-6)
    assert np.abs(np.asarray(model(x)) - before).max() > 0.01
    assert adapters.remove_adapters(model) is model
    np.testing.assert_array_equal(model(x), before)


def test_fit_moves_the_adapters_and_a_head_that_is_set_trainable():
    model = adapters.apply_adapters(plain_model(), 2, "first")
    model.get_layer("head").trainable = True
    frozen = [np.asarray(v) for v in model.non_trainable_variables]
    moving = [np.asarray(v) for v in model.trainable_variables]
    rng = np.random.default_rng(1)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(rng.normal(size=(64, 4)), rng.normal(size=(64, 2)), epochs=3, verbose=0)
    assert len(moving) == 6 and len(frozen) == 4
    assert all(np.any(np.asarray(v) != w) for v, w in zip(model.trainable_variables, moving, strict=True))
    assert all(np.array_equal(v, w) for v, w in zip(model.non_trainable_variables, frozen, strict=True))


@pytest.mark.parametrize("after", ["nonsense", (), ("first", "frist")])
def test_unknown_layers_are_named_and_nothing_is_changed(after):
    model = plain_model()
    with pytest.raises(ValueError, match="after"):
        adapters.apply_adapters(model, 2, after)
    assert len(model.trainable_variables) == 6


def test_two_layers_of_one_path_are_refused():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other = keras.layers.Dense(4, name="same"), keras.layers.Dense(4, name="same")
            for layer in (self.one, self.other):
                layer.build((None, 4))

        def call(self, x):
            return self.other(self.one(x))

    with pytest.raises(ValueError, match="two layers have the path"):
        adapters.apply_adapters(Twins(), 2, "same")


def test_a_second_apply_is_refused(gemma):
    adapters.apply_adapters(gemma, 2)
    with pytest.raises(ValueError, match="already"):
        adapters.apply_adapters(gemma, 2)


def test_a_bad_bottleneck_leaves_the_model_trainable():
    model = plain_model()
    with pytest.raises(ValueError, match="bottleneck"):
        adapters.apply_adapters(model, 0, "first")
    assert len(model.trainable_variables) == 6


# --- in Gemma ----------------------------------------------------------------------------------------------


def block_by_hand(block, x, adapted):
    """A plain block of any Gemma put together from its sub-layers, with `adapted(name, h)` behind each of the two."""
    mask = np.tri(x.shape[1], dtype=bool)[None]
    h = adapted("attention_output", block.attention(block.pre_attention_norm(x), attention_mask=mask))
    x = x + (block.post_attention_norm(h) if block.use_post_attention_norm else h)
    normed = block.pre_ffw_norm(x)
    middle = keras.activations.gelu(block.gating_ffw(normed), approximate=True) * block.gating_ffw_2(normed)
    h = adapted("ffw_linear", block.ffw_linear(middle))
    return x + (block.post_ffw_norm(h) if block.use_post_ffw_norm else h)


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_the_adapters_stand_behind_both_sub_layers_and_before_the_post_norm(generation):
    adapted, plain = tiny_gemma(generation), tiny_gemma(generation)
    filled(adapters.apply_adapters(adapted, 3, activation="tanh"))
    x = np.random.default_rng(1).normal(size=(1, 12, 16)).astype("float32")
    for number, block in enumerate(adapted.backbone.transformer_layers):
        parts = {layer.name: layer.adapter.get_weights() for layer in adapters.adapter_layers(block)}
        assert set(parts) == {"attention_output", "ffw_linear"}

        def by_numpy(name, h, parts=parts):
            down, down_bias, up, up_bias = parts[name]
            return h + np.tanh(h @ down + down_bias) @ up + up_bias

        expected = block_by_hand(plain.backbone.transformer_layers[number], x, by_numpy)
        np.testing.assert_allclose(block(x, padding_mask=X["padding_mask"]), expected, atol=2e-4)


def test_apply_starts_near_the_base_and_remove_gives_it_back(any_gemma):
    before = np.asarray(any_gemma.backbone(X))
    assert adapters.apply_adapters(any_gemma, 3) is any_gemma
    assert len(adapters.adapter_layers(any_gemma)) == 4
    count = sum(v.value.size for v in any_gemma.trainable_variables)
    assert count == 4 * (2 * 3 * 16 + 16 + 3)
    near = np.asarray(any_gemma.backbone(X))
    assert 0 < np.abs(near - before).max() < 0.02 * np.abs(before).max()
    far = np.asarray(filled(any_gemma).backbone(X))
    assert np.abs(far - before).max() > 0.2 * np.abs(before).max()
    assert adapters.remove_adapters(any_gemma) is any_gemma
    assert not adapters.adapter_layers(any_gemma)
    np.testing.assert_array_equal(any_gemma.backbone(X), before)


def test_an_adapter_may_stand_behind_the_post_norm_too(gemma):
    adapters.apply_adapters(gemma, 2, ("post_attention_norm", "post_ffw_norm"))
    block = gemma.backbone.transformer_layers[0]
    assert {layer.name for layer in adapters.adapter_layers(block)} == {"post_attention_norm", "post_ffw_norm"}
    assert not isinstance(block.ffw_linear, adapters.AdaptedLayer)


def test_lora_and_adapters_stand_together(gemma):
    lora.apply_lora(gemma, rank=2, targets="all-linear")
    for number, layer in enumerate(lora.lora_layers(gemma)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.1, layer.lora_b.shape))
    with_lora = np.asarray(gemma.backbone(X))
    adapters.apply_adapters(gemma, 3, init_std=0.0)  # the identity
    assert len(adapters.adapter_layers(gemma)) == 4 and len(lora.lora_layers(gemma)) == 14
    np.testing.assert_array_equal(gemma.backbone(X), with_lora)
    filled(gemma)
    with_both = np.asarray(gemma.backbone(X))
    lora.merge_lora(gemma)  # LoRA still merges, into the kernel before the adapter
    np.testing.assert_allclose(gemma.backbone(X), with_both, atol=2e-3)


@pytest.mark.slow
def test_generation_is_the_models_own_forward(any_gemma):
    filled(adapters.apply_adapters(any_gemma, 3), 1.0)
    prompts = [np.array([5, 9, 11], "int32"), np.array([40, 41, 42, 43, 44], "int32")]
    answers = generation.generate_tokens(any_gemma, prompts, [1], 9)
    table = np.asarray(any_gemma.backbone.token_embedding.embeddings)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = np.concatenate([prompt, answer])[None]  # a token sees those before it only, so one pass tells all
        hidden = np.asarray(any_gemma.backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[0]
        assert (hidden @ table.T).argmax(axis=1)[len(prompt) - 1 : -1].tolist() == answer.tolist()
    base = generation.generate_tokens(adapters.remove_adapters(any_gemma), prompts, [1], 9)
    assert any(a.tolist() != b.tolist() for a, b in zip(answers, base, strict=True))


# --- training through FineTuner ----------------------------------------------------------------------------

RECORDS = [{"prompt": f"say {word}", "response": word} for word in ("red", "green", "blue", "black", "white") * 8]


def tuner_for(gemma, tokenizer, bottleneck=4, **named):
    class Preprocessor:
        pass

    gemma.preprocessor = Preprocessor()
    gemma.preprocessor.tokenizer = tokenizer
    adapters.apply_adapters(gemma, bottleneck)
    return FineTuner(gemma, rows=2, row_length=48, chunk_size=16, learning_rate=6e-2, **named)


def words():
    from gemma_lora.data.dataset import load_dataset

    return load_dataset(RECORDS, template=Template("{prompt}:", "{response}<eos>"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"remat": True}, {"mixed_precision": True}], ids=str)
def test_fine_tuner_trains_the_adapters_alone(gemma, tokenizer, more):
    tuner = tuner_for(gemma, tokenizer, **more)
    frozen = {v.path: np.asarray(v) for v in gemma.non_trainable_variables}
    start = [np.asarray(v) for v in gemma.trainable_variables]
    tuner.fit(words(), epochs=4, verbose=0)
    losses = [row["loss"] for row in tuner.log.rows]
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert all(np.array_equal(v, frozen[v.path]) for v in gemma.non_trainable_variables)
    assert all(np.any(np.asarray(v) != w) for v, w in zip(gemma.trainable_variables, start, strict=True))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, tokenizer):
    whole = tuner_for(tiny_gemma(), tokenizer)
    whole.fit(words(), verbose=0)
    stopped = tuner_for(tiny_gemma(), tokenizer, run_dir=tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(words(), verbose=0, callbacks=[StopAt(3)])
    again = tuner_for(tiny_gemma(), tokenizer, run_dir=tmp_path, checkpoint_seconds=0.0)
    again.fit(words(), verbose=0)
    assert len(again.log.rows) == len(whole.log.rows)
    for ours, theirs in zip(again.trainable_variables, whole.trainable_variables, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_another_bottleneck_is_refused_with_a_message(tmp_path, tokenizer):
    tuner_for(tiny_gemma(), tokenizer, run_dir=tmp_path).fit(words(), verbose=0)
    with pytest.raises(GemmaLoraError, match="another model"):
        tuner_for(tiny_gemma(), tokenizer, bottleneck=5, run_dir=tmp_path).fit(words(), verbose=0)


# --- on disk -----------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path, any_gemma):
    filled(adapters.apply_adapters(any_gemma, 3, activation="relu"))
    expected = np.asarray(any_gemma.backbone(X))
    adapters.save(any_gemma, tmp_path / "one" / "task.safetensors")
    tensors = load_file(tmp_path / "one" / "task.safetensors")
    assert len(tensors) == 16 and tensors["decoder_block_1/ffw_linear/down_kernel"].shape == (16, 3)
    filled(any_gemma, seed=5)
    assert adapters.load(any_gemma, tmp_path / "one" / "task.safetensors") is any_gemma  # in place of others
    np.testing.assert_allclose(any_gemma.backbone(X), expected, atol=1e-6)
    adapters.remove_adapters(any_gemma)
    adapters.load(any_gemma, tmp_path / "one" / "task.safetensors")  # on a model without
    np.testing.assert_allclose(any_gemma.backbone(X), expected, atol=1e-6)


def test_a_plain_models_file_loads_into_another_of_its_kind(tmp_path):
    base, x = plain_model(), np.random.default_rng(1).normal(size=(3, 4))
    model = filled(adapters.apply_adapters(base, 2, "second"))
    adapters.save(model, tmp_path / "task.safetensors")
    np.testing.assert_array_equal(adapters.load(plain_model(), tmp_path / "task.safetensors")(x), model(x))
    twins = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden")]) for _ in range(2)]
    twins[1].set_weights(twins[0].get_weights())
    model = filled(adapters.apply_adapters(twins[0], 2, "hidden"))
    adapters.save(model, tmp_path / "task.safetensors")
    np.testing.assert_array_equal(adapters.load(twins[1], tmp_path / "task.safetensors")(x), model(x))


def test_a_save_that_fails_leaves_the_file_before(tmp_path, gemma, monkeypatch):
    path = tmp_path / "task.safetensors"
    filled(adapters.apply_adapters(gemma, 3))
    adapters.save(gemma, path)
    first = path.read_bytes()
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        adapters.save(gemma, path)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["task.safetensors"]


def test_errors_of_files_say_what_is_wrong_and_change_nothing(tmp_path, gemma):
    with pytest.raises(GemmaLoraError, match="apply_adapters"):
        adapters.save(gemma, tmp_path / "x")
    before = np.asarray(gemma.backbone(X))
    path = tmp_path / "task.safetensors"
    adapters.save(filled(adapters.apply_adapters(plain_model(), 2, "second")), path)
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:50])
    save_file({"w": np.zeros(2, "float32")}, tmp_path / "other")
    for name, said in {
        "nowhere": "no such file",
        "task.safetensors": "another model",
        "damaged": "cannot be read",
        "other": "no adapters",
    }.items():
        with pytest.raises(GemmaLoraError, match=said):
            adapters.load(gemma, tmp_path / name)
    np.testing.assert_array_equal(gemma.backbone(X), before)
    assert gemma.trainable_variables


def test_a_file_of_another_width_or_with_a_tensor_missing_is_refused(tmp_path, gemma):
    path = tmp_path / "task.safetensors"
    adapters.save(adapters.apply_adapters(tiny_gemma(), 3), path)
    tensors = load_file(path)
    metadata = adapters._read(path)[1]
    wide = tensors | {"decoder_block_0/ffw_linear/up_bias": np.zeros(17, "float32")}
    short = {name: value for name, value in tensors.items() if name != "decoder_block_0/ffw_linear/up_bias"}
    for wrong in (wide, short):
        save_file(wrong, path, metadata)
        with pytest.raises(GemmaLoraError, match="decoder_block_0/ffw_linear/up_bias"):
            adapters.load(gemma, path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"activation": "gulu"}, "activation must be a name that Keras knows. Received: 'gulu'"),
        ({"activation": None}, "activation must be .* Received: None"),
        ({"bottleneck": "three"}, "bottleneck must be an integer of at least 1. Received: 'three'"),
        ({"bottleneck": "0"}, "bottleneck must be"),
        ({"bottleneck": "-3"}, "bottleneck must be"),
        ({"bottleneck": None}, "bottleneck must be .* Received: None"),
        ({"after": '"down"'}, "after must be a list of layers' names"),
        ({"after": "[1]"}, "after must be a list"),
        ({"after": "[]"}, "after must be a list"),
        ({"after": "{"}, "after must be a list"),
        ({"after": None}, "after must be a list"),
    ],
)
def test_metadata_that_says_nothing_sensible_is_refused_before_the_adapters_go(tmp_path, change, said):
    path = tmp_path / "task.safetensors"
    model = filled(adapters.apply_adapters(plain_model(), 3, "second"))
    adapters.save(model, path)
    tensors, metadata = load_file(path), adapters._read(path)[1]
    save_file(tensors, path, {name: value for name, value in (metadata | change).items() if value is not None})
    with unchanged(model), pytest.raises(GemmaLoraError, match=said):
        adapters.load(model, path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "task.safetensors"
    model = filled(adapters.apply_adapters(plain_model(), 3, "second"))
    adapters.save(model, path)
    metadata = adapters._read(path)[1]
    save_file({name: tensor * np.float32(np.nan) for name, tensor in load_file(path).items()}, path, metadata)
    with unchanged(model), pytest.raises(GemmaLoraError, match="not finite"):
        adapters.load(model, path)


def test_a_load_that_is_cut_short_is_undone(tmp_path, gemma, monkeypatch):
    path = tmp_path / "task.safetensors"
    adapters.save(filled(adapters.apply_adapters(tiny_gemma(), 3)), path)
    filled(adapters.apply_adapters(gemma, 2, "query"))
    replace, done = adapters.replace, []

    def cut_short(*arguments):
        done.append(arguments)
        if len(done) == 3:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(adapters, "replace", cut_short)
    with unchanged(gemma), pytest.raises(KeyboardInterrupt):
        adapters.load(gemma, path)
    assert len(done) > 3


@contextlib.contextmanager
def unchanged(model):
    """Holds that layers, variables, their values and their flags are afterwards what they were before."""

    def state():
        return (
            [id(layer) for layer in model._flatten_layers()],
            [(id(v), v.trainable, np.asarray(v.value).tobytes()) for v in model.variables],
        )

    before = state()
    yield
    assert state() == before


def test_a_function_without_a_name_is_not_saved(tmp_path):
    model = adapters.apply_adapters(plain_model(), 2, "first", activation=lambda x: x)
    with pytest.raises(GemmaLoraError, match="no name"):
        adapters.save(model, tmp_path / "task.safetensors")
