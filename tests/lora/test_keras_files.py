"""What Keras and KerasHub write of a model with LoRA: right weights when read again, or an error when it is written."""

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.exchange.peft import save_adapter, slots
from gemma_lora.gemma.forward import hidden_states
from gemma_lora.layers import linear
from tests.conftest import tiny_gemma

pytestmark = pytest.mark.slow
IDS = np.arange(10)[None] + 20
KINDS = [{"targets": "all-linear"}, {"targets": ("down",)}, {"targets": ("query", "up"), "dora": True}]


def states(model):
    return np.asarray(hidden_states(model, IDS))


def trained(kind, seed=0):
    model = lora.apply_lora(tiny_gemma(), rank=2, **kind)
    rng = np.random.default_rng(seed)
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
    return model


def merged_and_detached(model):
    lora.merge_lora(model)
    lora.detach_lora(model)


#: How a model may be when it is written; all but the last have the update.
WAYS = {
    "attached": lambda model: None,
    "merged": lora.merge_lora,
    "merged and detached": merged_and_detached,
    "detached": lora.detach_lora,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_keras_file_holds_what_the_model_gives(tmp_path, way, kind):
    model = trained(kind)
    WAYS[way](model)
    expected = states(model)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(states(again), expected, atol=2e-5)
    assert not lora.lora_layers(again) and all(variable.trainable for variable in again.backbone.variables)
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    np.testing.assert_allclose(again.backbone(x), expected, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_preset_holds_what_the_model_gives(tmp_path, way):
    from gemma_lora.gemma.load import import_keras_hub

    model = trained(KINDS[0])
    WAYS[way](model)
    model.backbone.save_to_preset(str(tmp_path / "preset"))
    again = import_keras_hub().models.Gemma3Backbone.from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(states(again), states(model), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_kerashubs_export_holds_the_update_or_is_refused(tmp_path, way, kind):
    model = trained(kind)
    WAYS[way](model)
    if way == "attached":
        with pytest.raises(GemmaLoraError, match=r"has LoRA beside its kernel.*merge_lora.*detach_lora"):
            model.backbone.export_to_transformers(str(tmp_path))
        assert not (tmp_path / "model.safetensors").exists()
        return
    model.backbone.export_to_transformers(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for slot in slots(model):
        layer = slot.layer
        expected = layer.whole_matrix() if isinstance(layer, lora.LoRALayer) else linear.kernel_matrix(layer)
        name = slot.module.removeprefix("model.")
        np.testing.assert_allclose(tensors[f"{name}.weight"], np.asarray(expected).T, atol=1e-6)


@pytest.mark.parametrize("scheme", [None, "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_model_with_lora_takes_back_its_weights(tmp_path, scheme, dora):
    def made(seed):
        model = tiny_gemma(seed=seed)
        if scheme:
            lora.qlora.quantize_base(model, scheme)
        lora.apply_lora(model, rank=2, targets=("query", "down"), dora=dora, seed=seed)
        for layer in lora.lora_layers(model):
            layer.lora_b.assign(np.random.default_rng(seed).normal(0, 0.3, layer.lora_b.shape))
        return model

    one, other = made(1), made(2)
    one.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(states(other), states(one))
    with pytest.raises(ValueError, match="objects could not be loaded"):
        lora.apply_lora(tiny_gemma(), rank=2, targets=("query", "down", "up")).load_weights(tmp_path / "m.weights.h5")


def test_a_packed_model_is_written_decoded(tmp_path):
    model = lora.qlora.quantize_base(tiny_gemma(), "nf4")
    lora.apply_lora(model, rank=2, targets=("query", "down"))
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(np.full(layer.lora_b.shape, 0.1))
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(states(again), states(model), atol=2e-5)
    for half in (model, lora.qlora.quantize_base(tiny_gemma(), "int8")):
        with pytest.raises(GemmaLoraError, match="dequantize_base"):
            half.backbone.export_to_transformers(str(tmp_path))


def test_keras_own_lora_under_ours_is_refused(tmp_path):
    model = trained({"targets": ("query", "down")})
    with pytest.raises(GemmaLoraError, match="'query' has gemma_lora's LoRA; Keras's `enable_lora`"):
        model.backbone.enable_lora(2, target_layer_names=["query"])
    model.backbone.enable_lora(2, target_layer_names=["value"])  # beside it
    with pytest.raises(GemmaLoraError, match="v_proj has Keras's own LoRA"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_keras_own_quantization_under_ours_is_refused(tmp_path, whole):
    model = trained({"targets": ("query", "down")})
    if whole:
        model.backbone.quantize("int8")
        with pytest.raises(GemmaLoraError, match=r"quantization \(int8\) is on the embedding"):
            states(model)
    else:
        model.backbone.quantize("int8", filters=lambda layer: layer.name in ("query", "ffw_linear"))
        assert np.isfinite(states(model)).all()  # Keras's numbers and our update
    for act in (lora.merge_lora, lambda model: model.save(tmp_path / "m.keras")):
        with pytest.raises(GemmaLoraError, match=r"has Keras's own quantization \(int8\) under gemma_lora's LoRA"):
            act(model)
    assert not any(layer.merged for layer in lora.lora_layers(model))
