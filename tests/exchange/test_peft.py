"""PEFT folders: written as PEFT writes them, read back, and refused with a reason."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template
from gemma_lora.exchange.peft import load_adapter, save_adapter
from tests.conftest import tiny_gemma

INPUTS = {"token_ids": np.arange(12)[None] + 5, "padding_mask": np.ones((1, 12), "int32")}


def trained(model, targets="all-linear", **named):
    lora.apply_lora(model, rank=3, targets=targets, **named)
    for number, layer in enumerate(lora.lora_layers(model)):
        rng = np.random.default_rng(number)
        layer.lora_b.assign(rng.normal(0, 0.2, layer.lora_b.shape))
        if layer.dora:
            layer.magnitude.assign(np.asarray(layer.magnitude) * rng.uniform(0.5, 1.5, layer.magnitude.shape))
    return model


@pytest.mark.parametrize("targets", [("query", "value"), ("down",), "all-linear"])
@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}], ids=str)
def test_round_trip(tmp_path, any_gemma, targets, kind):
    template = Template("Q: {prompt}\nA:", " {response}<eos>")
    trained(any_gemma, targets, alpha=5, **kind)
    expected = np.asarray(any_gemma.backbone(INPUTS))
    save_adapter(any_gemma, tmp_path / "adapter", template=template)
    lora.detach_lora(any_gemma)
    base = np.asarray(any_gemma.backbone(INPUTS))
    load_adapter(any_gemma, tmp_path / "adapter")
    np.testing.assert_allclose(any_gemma.backbone(INPUTS), expected, atol=1e-5)
    assert np.abs(expected - base).max() > 1e-3
    assert any_gemma.gemma_lora_template == template


@pytest.mark.parametrize("dora", [False, True])
def test_names_and_shapes_are_pefts(tmp_path, gemma, dora):
    """PEFT: base_model.model.<transformers' module>.lora_A.weight is (r, d_in), lora_B.weight is (d_out, r).

    DoRA's lora_magnitude_vector is (d_out,) and has no ".weight".
    """
    trained(gemma, dora=dora)
    save_adapter(gemma, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1."
    shapes = {name.removeprefix(prefix): t.shape for name, t in tensors.items() if name.startswith(prefix)}
    sizes = {
        "q": (16, 32),
        "k": (16, 16),
        "v": (16, 16),
        "o": (32, 16),
        "gate": (16, 24),
        "up": (16, 24),
        "down": (24, 16),
    }
    expected = {}
    for name, (d_in, d_out) in sizes.items():
        module = f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"
        expected |= {f"{module}.lora_A.weight": (3, d_in), f"{module}.lora_B.weight": (d_out, 3)}
        expected |= {f"{module}.lora_magnitude_vector": (d_out,)} if dora else {}
    assert shapes == expected
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["lora_alpha"] == 6
    assert config["use_dora"] is dora
    assert config["target_modules"] == sorted(f"{name}_proj" for name in sizes)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_swapped(tmp_path, gemma, dora):
    trained(gemma, ("query",), dora=dora)
    save_adapter(gemma, tmp_path / "a")
    first = np.asarray(gemma.backbone(INPUTS))
    for layer in lora.lora_layers(gemma):
        layer.lora_b.assign(-2 * layer.lora_b.value)
    save_adapter(gemma, tmp_path / "b")
    load_adapter(gemma, tmp_path / "a")
    np.testing.assert_allclose(gemma.backbone(INPUTS), first, atol=1e-6)
    lora.detach_lora(gemma)
    trained(gemma, dora=not dora)  # the other kind, on more layers, gives way too
    load_adapter(gemma, tmp_path / "a")
    np.testing.assert_allclose(gemma.backbone(INPUTS), first, atol=1e-6)
    assert [layer.dora for layer in lora.lora_layers(gemma)] == [dora] * 2


def test_a_dora_adapter_may_have_trained_the_magnitudes_only(tmp_path, gemma):
    lora.apply_lora(gemma, rank=2, dora=True)
    save_adapter(gemma, tmp_path)
    with pytest.raises(GemmaLoraError, match="changes nothing"):
        load_adapter(gemma, tmp_path)
    layer = lora.lora_layers(gemma)[1]
    layer.magnitude.assign(1.5 * layer.magnitude.value)
    expected = np.asarray(gemma.backbone(INPUTS))
    save_adapter(gemma, tmp_path)
    np.testing.assert_allclose(load_adapter(tiny_gemma(), tmp_path).backbone(INPUTS), expected, atol=1e-5)


def folder(tmp_path, model, dora=False):
    save_adapter(trained(model, dora=dora), tmp_path)
    lora.detach_lora(model)
    return tmp_path


def edit_config(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text()) | changes
    (path / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(path, change):
    file = path / "adapter_model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(file)).items()}, file)


SPOILERS = {
    "no such file": lambda p: (p / "adapter_config.json").unlink(),
    "no such file. PEFT": lambda p: (p / "adapter_model.safetensors").unlink(),
    "not JSON": lambda p: (p / "adapter_config.json").write_text("{"),
    "peft_type is 'IA3'": lambda p: edit_config(p, peft_type="IA3"),
    "lacks lora_magnitude_vector": lambda p: edit_config(p, use_dora=True),
    "lora_alpha": lambda p: edit_config(p, lora_alpha=None),
    "cannot be read": lambda p: (p / "adapter_model.safetensors").write_bytes(b"\x10" * 40),
    "another model": lambda p: edit_tensors(p, lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}),
    "needs A": lambda p: edit_tensors(p, lambda t: {k: v[..., :2] for k, v in t.items()}),
    "changes nothing": lambda p: edit_tensors(p, lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}),
    "lacks lora_A. Save": lambda p: edit_tensors(p, lambda t: dict(list(t.items())[1:])),
    "neither lora_A nor lora_B": lambda p: edit_tensors(p, lambda t: t | {"x.bias": np.ones(2, "float32")}),
}


#: Of a DoRA folder.
DORA_SPOILERS = {
    "is DoRA's, but use_dora is not true": lambda p: edit_config(p, use_dora=False),
    "lacks lora_B": lambda p: edit_tensors(
        p, lambda t: {k: v for k, v in t.items() if "0.mlp.up_proj.lora_B" not in k}
    ),
    "has a magnitude": lambda p: edit_tensors(p, lambda t: {k: v[:3] if "magnitude" in k else v for k, v in t.items()}),
}


@pytest.mark.parametrize("message", [*SPOILERS, *DORA_SPOILERS])
def test_a_bad_folder_is_refused_and_the_model_unchanged(tmp_path, gemma, message):
    path = folder(tmp_path, gemma, dora=message in DORA_SPOILERS)
    before = np.asarray(gemma.backbone(INPUTS))
    (SPOILERS | DORA_SPOILERS)[message](path)
    with pytest.raises(GemmaLoraError, match=message):
        load_adapter(gemma, path)
    np.testing.assert_array_equal(gemma.backbone(INPUTS), before)
    assert not lora.lora_layers(gemma)


def test_a_model_without_lora_is_not_saved(tmp_path):
    with pytest.raises(GemmaLoraError, match="no LoRA"):
        save_adapter(tiny_gemma(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
