"""qlora.py: a packed Gemma against the same Gemma with the decoded weights; bits, memory, refusals."""

import types

import jax
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.data.templates import Template
from gemma_lora.gemma.weights import head_table
from gemma_lora.layers.loss import chunked_cross_entropy
from gemma_lora.lora import qlora
from gemma_lora.quantization import packed
from tests.conftest import tiny_gemma

SCHEMES = [("nf4", False), ("nf4", True), ("int8", False), ("int4", False)]
IDS = np.random.default_rng(0).integers(6, 300, (2, 12)).astype("int32")
INPUTS = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}


def with_decoded_weights(model, seed=0):
    """A plain model that holds what a packed model's codes stand for."""
    plain = tiny_gemma(3, seed)
    for (parent, attribute, layer), (_, _, other) in zip(
        lora.linear_layers(plain), lora.linear_layers(model), strict=True
    ):
        layer._kernel.assign(other._kernel)
        assert getattr(parent, attribute) is layer
    plain.backbone.token_embedding.embeddings.assign(model.backbone.token_embedding.embeddings)
    return plain


def gradients(model, dora=False):
    """Loss and gradients of all A and B (and DoRA's magnitudes), B being random so that both have one."""
    gl.apply_lora(model, rank=3, alpha=5, targets="all-linear", dora=dora, seed=1)
    for i, layer in enumerate(lora.lora_layers(model)):
        layer.lora_b.assign(np.random.default_rng(i).normal(0, 0.1, layer.lora_b.shape))
    trained, frozen = model.backbone.trainable_variables, model.backbone.non_trainable_variables
    embedding = model.backbone.token_embedding

    def loss(values, frozen_values):
        hidden, _ = model.backbone.stateless_call(values, frozen_values, INPUTS)
        mapping = list(zip(frozen, frozen_values, strict=True))
        import keras

        with keras.StatelessScope(state_mapping=mapping):
            table = head_table(embedding)
        return chunked_cross_entropy(hidden, table, np.roll(IDS, -1, 1), np.ones(IDS.shape, "float32"), chunk_size=8)

    return jax.value_and_grad(loss)([v.value for v in trained], [v.value for v in frozen])


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scheme, double_quant", SCHEMES)
def test_a_packed_model_is_the_model_with_the_decoded_weights(scheme, double_quant, dora):
    model = qlora.quantize_base(tiny_gemma(), scheme, double_quant, block_size=16)
    plain = with_decoded_weights(model)
    np.testing.assert_allclose(model.backbone(INPUTS), plain.backbone(INPUTS), rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(tiny_gemma().backbone(INPUTS)) - np.asarray(plain.backbone(INPUTS))).max() > 1e-3
    loss, found = gradients(model, dora)
    right_loss, right = gradients(plain, dora)
    assert float(loss) == pytest.approx(float(right_loss), rel=1e-5)
    assert len(found) == len(right) == (3 if dora else 2) * 14
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2])
def test_gemma_1_and_2_are_packed_too(generation):
    model = qlora.quantize_base(tiny_gemma(generation), "int8")
    before = np.asarray(tiny_gemma(generation).backbone(INPUTS))
    after = np.asarray(model.backbone(INPUTS))
    assert 0 < np.abs(after - before).max() < 0.2 * np.abs(before).max()
    assert len(qlora.packed_layers(model)) == 14
    logits = model.backbone.token_embedding(after, reverse=True)
    right = tiny_gemma(generation).backbone.token_embedding(after, reverse=True)
    assert np.abs(np.asarray(logits) - np.asarray(right)).max() < 0.05 * np.abs(np.asarray(right)).max()


def test_what_is_frozen_and_what_is_counted():
    model = qlora.quantize_base(tiny_gemma(), "nf4", double_quant=True, block_size=16)
    gl.apply_lora(model, rank=2)
    assert {v.name for v in model.trainable_variables} == {"lora_a", "lora_b"}
    assert not any("kernel" in v.path for v in model.variables)
    counted = qlora.weight_bytes(model)
    layers = qlora.packed_layers(model)
    numbers = sum(np.prod(layer.encoding.shape) for layer in layers)
    assert len(layers) == 14 and counted["linear_bits"] * numbers / 8 == pytest.approx(counted["linear_bytes"])
    assert counted["embedding_bytes"] == 300 * 16 + 300 * 4
    tables = model.backbone.token_embedding.variables
    assert [(v.name, v.dtype) for v in tables] == [("row_codes", "int8"), ("row_scales", "float32")]


@pytest.fixture
def small(tokenizer):
    def make(scheme="nf4", dora=False):
        model = qlora.quantize_base(tiny_gemma(), scheme, block_size=16)
        model.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)
        return gl.apply_lora(model, rank=4, targets="all-linear", dora=dora)

    return make


LINES = [{"prompt": f"a{i}", "response": f"b{i % 7}"} for i in range(24)]
PLAIN = Template(prompt="{prompt}=", response="{response}")


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("more", [{"remat": True}, {"mixed_precision": True, "accumulate": 2}], ids=str)
def test_fine_tuner_lowers_the_loss_and_leaves_the_codes(small, more, dora):
    model = small(dora=dora)
    before = [np.asarray(v).copy() for v in model.non_trainable_variables]
    tuner = gl.FineTuner(model, learning_rate=2e-2, rows=1, row_length=24, **more)
    tuner.fit(gl.load_dataset(LINES, template=PLAIN), epochs=6, verbose=0)
    losses = [row["loss"] for row in tuner.log.rows]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert all(np.array_equal(a, v) for a, v in zip(before, model.non_trainable_variables, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_remat_gives_the_same_losses(small, dora):
    runs = []
    for remat in (False, True):
        tuner = gl.FineTuner(small(dora=dora), learning_rate=1e-2, rows=1, row_length=24, remat=remat)
        tuner.fit(gl.load_dataset(LINES, template=PLAIN), verbose=0)
        runs.append([row["loss"] for row in tuner.log.rows])
    np.testing.assert_allclose(*runs, rtol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_other_encodings_are_refused(small, tmp_path):
    def run(model, **named):
        tuner = gl.FineTuner(model, tmp_path, learning_rate=1e-2, rows=1, row_length=24, checkpoint_seconds=0)
        tuner.fit(gl.load_dataset(LINES, template=PLAIN), verbose=0, **named)

    run(small())
    run(small())  # finished: nothing to do
    with pytest.raises(gl.GemmaLoraError, match="other settings.*encodings"):
        run(small("int8"))
    with pytest.raises(gl.GemmaLoraError, match="other settings.*dora"):
        run(small(dora=True))


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_generation_is_that_of_the_decoded_model(small, tokenizer, dora):
    model = small(dora=dora)
    for i, layer in enumerate(lora.lora_layers(model)):
        layer.lora_b.assign(np.random.default_rng(i).normal(0, 0.2, layer.lora_b.shape))
    found = gl.generate(model, ["a1", "a23"], PLAIN, max_new_tokens=12)
    qlora.dequantize_base(model)
    assert gl.generate(model, ["a1", "a23"], PLAIN, max_new_tokens=12) == found


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_goes_to_a_folder_and_back(small, tmp_path, dora):
    model = small(dora=dora)
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(np.random.default_rng(0).normal(0, 0.2, layer.lora_b.shape))
    tuned = np.asarray(model.backbone(INPUTS))
    gl.save_adapter(model, tmp_path)
    other = gl.load_adapter(qlora.quantize_base(tiny_gemma(), "nf4", block_size=16), tmp_path)
    np.testing.assert_allclose(other.backbone(INPUTS), tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_merging_asks_for_plain_weights_and_is_then_exact(small, dora):
    model = small("int4", dora)
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(np.random.default_rng(0).normal(0, 0.2, layer.lora_b.shape))
    tuned = np.asarray(model.backbone(INPUTS))
    with pytest.raises(gl.GemmaLoraError, match="dequantize_base"):
        gl.merge_lora(model)
    errors = qlora.merging_error(model)
    assert len(errors) == 14 and all(0.01 < share < 10 for share in errors.values())
    assert qlora.dequantize_base(model) is model and not qlora.packed_layers(model)
    np.testing.assert_allclose(model.backbone(INPUTS), tuned, rtol=1e-4, atol=1e-4)
    gl.merge_lora(model)
    np.testing.assert_allclose(model.backbone(INPUTS), tuned, rtol=1e-4, atol=1e-4)
    with pytest.raises(gl.GemmaLoraError, match="no packed layers"):
        qlora.dequantize_base(model)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_merging_error_is_the_rounding_of_the_sum(small, dora):
    model = small("int8", dora)
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(np.random.default_rng(0).normal(0, 0.2, layer.lora_b.shape))
    layer = lora.lora_layers(model)[3]
    plain = np.asarray(layer.base.matrix())
    whole = plain + np.asarray(layer.delta())
    if dora:  # the magnitude is as at the start, the plain norms
        whole *= np.linalg.norm(plain, axis=0) / np.linalg.norm(whole, axis=0)
    step = np.abs(whole).max(axis=0) / 127
    error = np.linalg.norm(np.rint(whole / step) * step - whole) / np.linalg.norm(whole - plain)
    assert qlora.merging_error(model)[f"3 {layer.name}"] == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "named", [{"scheme": "nf5"}, {"scheme": "int8", "double_quant": True}, {"scheme": "int4", "double_quant": True}]
)
def test_bad_schemes_are_named(named):
    with pytest.raises(ValueError, match="scheme"):
        qlora.quantize_base(tiny_gemma(), **named)


@pytest.mark.slow
def test_a_second_quantization_and_one_after_lora_are_refused():
    model = qlora.quantize_base(tiny_gemma(), "int8")
    with pytest.raises(gl.GemmaLoraError, match="already"):
        qlora.quantize_base(model, "nf4")
    with pytest.raises(gl.GemmaLoraError, match="already"):
        qlora.quantize_base(gl.apply_lora(tiny_gemma(), rank=2), "nf4")


def test_a_plain_keras_model_is_packed():
    import keras

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(24, activation="relu", name="first")
            self.second = keras.layers.Dense(3, name="second")

        def call(self, x):
            return self.second(self.first(x))

    net, x = Net(), np.random.default_rng(0).normal(size=(5, 16)).astype("float32")
    before = np.asarray(net(x))
    net.first.bias.assign(np.ones(24))
    before = np.asarray(net(x))
    qlora.quantize_base(net, "int8")
    assert 0 < np.abs(np.asarray(net(x)) - before).max() < 0.02 * np.abs(before).max()
    qlora.dequantize_base(net)
    assert type(net.first) is keras.layers.Dense and np.abs(np.asarray(net(x)) - before).max() > 0


# --- the real Gemma -------------------------------------------------------------------------------------------------


def test_the_files_own_blocks_give_the_decoded_models_hidden_states(real_gemma):
    ids = np.array([[2, 818, 5279, 529, 7001, 563]], "int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    kept = gl.load_gemma(quantization="gguf")
    right = np.asarray(real_gemma.backbone(inputs))
    np.testing.assert_allclose(kept.backbone(inputs), right, atol=2e-3 * np.abs(right).max())
    kinds = {layer.encoding.kind for layer in qlora.packed_layers(kept)}
    assert kinds <= set(packed.GGUF_KINDS) and len(kinds) >= 2
    assert 4.5 < qlora.weight_bytes(kept)["linear_bits"] < 8.5


def test_loading_packed_is_packing_after_loading(real_gemma):
    model = gl.load_gemma(quantization="nf4", double_quant=True)
    layers = qlora.packed_layers(model)
    assert len(layers) == 126 and qlora.weight_bytes(model)["linear_bits"] <= 4.13
    plain = real_gemma.backbone.transformer_layers[5].ffw_linear._kernel
    found = model.backbone.transformer_layers[5].ffw_linear
    right = found.encoding.encode(np.ascontiguousarray(np.asarray(plain).T))
    for name, part in right.items():
        np.testing.assert_array_equal(np.asarray(found.parts[name]), part)


@pytest.mark.real
def test_a_file_of_floats_cannot_keep_its_blocks(monkeypatch):
    from gemma_lora.gemma import gguf as ours

    monkeypatch.setattr(ours, "read_blocks", lambda index, name: ("F16", np.zeros((4, 4), np.uint8)))
    with pytest.raises(gl.GemmaLoraError, match="F16.*Q8_0"):
        gl.load_gemma(quantization="gguf")


@pytest.mark.parametrize("named", [{"quantization": "int3"}, {"quantization": "int8", "double_quant": True}])
def test_bad_arguments_of_loading_are_named(named):
    with pytest.raises(ValueError, match="quant"):
        gl.load_gemma(**named)
