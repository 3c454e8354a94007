"""PEFT folders: written as PEFT writes them, read back, and refused with a reason."""

import json
import shutil
from functools import partial

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template
from gemma_lora.exchange import peft
from gemma_lora.exchange.peft import load_adapter, save_adapter
from gemma_lora.exchange.peft_folder import read_folder
from gemma_lora.layers.surgery import replace
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def edit_config(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text()) | changes
    (path / "adapter_config.json").write_text(json.dumps(config))


def write_config(path, text):
    (path / "adapter_config.json").write_text(text)


def edit_text(path, old, new):
    text = (path / "adapter_config.json").read_text()
    assert text.count(old) == 1
    write_config(path, text.replace(old, new))


def edit_tensors(path, change):
    file = path / "adapter_model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(file)).items()}, file)


def on_module(path, module):
    """Puts the LoRA of one layer on another module, which the configuration then targets."""
    edit_config(path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", module])
    edit_config(path, layers_to_transform=None)
    old = "model.layers.1.mlp.down_proj"
    keep = lambda k: "mlp.down_proj" not in k or old in k  # noqa: E731
    edit_tensors(path, lambda t: {k.replace(old, module): v for k, v in t.items() if keep(k)})


SPOILERS = {
    "no such file": lambda p: (p / "adapter_config.json").unlink(),
    "no such file. PEFT": lambda p: (p / "adapter_model.safetensors").unlink(),
    "not JSON": lambda p: (p / "adapter_config.json").write_text("{"),
    "peft_type is 'IA3'": lambda p: edit_config(p, peft_type="IA3"),
    "lacks lora_magnitude_vector": lambda p: edit_config(p, use_dora=True),
    "lora_alpha": lambda p: edit_config(p, lora_alpha=None),
    "cannot be read": lambda p: (p / "adapter_model.safetensors").write_bytes(b"\x10" * 40),
    "another model": lambda p: (
        edit_config(p, layers_to_transform=None),
        edit_tensors(p, lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}),
    ),
    "does not target model.layers.7.mlp.down_proj": lambda p: edit_tensors(
        p, lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}
    ),
    "does not target model.layers.0.mlp.up_proj, which": lambda p: edit_config(p, exclude_modules="model.*up_proj"),
    "LoRA on .*vision_tower.*only text models are read": lambda p: on_module(
        p, "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    ),
    "LoRA on lm_head: the output table": lambda p: on_module(p, "lm_head"),
    "needs A": lambda p: edit_tensors(p, lambda t: {k: v[..., :2] for k, v in t.items()}),
    "changes nothing": lambda p: edit_tensors(p, lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}),
    "lacks lora_A. Save": lambda p: edit_tensors(p, lambda t: dict(list(t.items())[1:])),
    "neither lora_A nor lora_B": lambda p: edit_tensors(p, lambda t: t | {"x.bias": np.ones(2, "float32")}),
    "must hold an object, PEFT's LoraConfig. Received: list": lambda p: write_config(p, "[]"),
    "Received: NoneType": lambda p: write_config(p, "null"),
    "lora_alpha must be a number that is finite in float32. Received: inf": lambda p: edit_text(p, "6.0", "1e400"),
    "finite in float32. Received: nan": lambda p: edit_config(p, lora_alpha=float("nan")),
    "finite in float32. Received: 1e[+]300": lambda p: edit_config(p, lora_alpha=1e300),
    "finite in float32. Received: 1000": lambda p: edit_config(p, lora_alpha=10**400),
    "finite in float32. Received: True": lambda p: edit_config(p, lora_alpha=True),
    "finite in float32. Received: '6'": lambda p: edit_config(p, lora_alpha="6"),
    "alpha_pattern of 'q_proj' must be a number": lambda p: edit_config(p, alpha_pattern={"q_proj": "6"}),
    "rank_pattern of 'q_proj' must be an integer": lambda p: edit_config(p, rank_pattern={"q_proj": 0}),
    "rank_pattern must be an object. Received: list": lambda p: edit_config(p, rank_pattern=[3]),
    "has rank_pattern 'q_proj' with 5": lambda p: edit_config(p, rank_pattern={"q_proj": 5}),
    "q_[(]proj.*is no regular expression": lambda p: edit_config(p, alpha_pattern={"q_(proj": 5}),
    "target_modules must be null, one or a list of str": lambda p: edit_config(p, target_modules=[1]),
    "gguf_sha256 and gguf_type must be text": lambda p: (p / "base.json").write_text('{"gguf_sha256": 1}'),
    "base.json: must hold an object": lambda p: (p / "base.json").write_text("[]"),
    "tensors of several adapters .None, sales": lambda p: edit_tensors(
        p, lambda t: {k.replace("A.weight", "A.sales.weight") if "1.mlp.up" in k else k: v for k, v in t.items()}
    ),
    "lora_alpha is 0": lambda p: edit_config(p, lora_alpha=0),
    "lora_dropout must be a number in .0, 1.. Received: None": lambda p: edit_config(p, lora_dropout=None),
    "lora_dropout must be .* Received: 1": lambda p: edit_config(p, lora_dropout=1),
    "lora_dropout must be .* Received: -0.1": lambda p: edit_config(p, lora_dropout=-0.1),
    "lora_dropout must be .* Received: nan": lambda p: edit_config(p, lora_dropout=float("nan")),
    "lora_dropout must be .* Received: False": lambda p: edit_config(p, lora_dropout=False),
    "r must be an integer of at least 1. Received: 0": lambda p: edit_config(p, r=0),
    "r must be .* Received: None": lambda p: edit_config(p, r=None),
    "r must be .* Received: 3.0": lambda p: edit_config(p, r=3.0),
    "r must be .* Received: True": lambda p: edit_config(p, r=True),
    "has lora_A of rank 3, but adapter_config.json has r = 4": lambda p: edit_config(p, r=4),
    "use_rslora must be true or false. Received: 'no'": lambda p: edit_config(p, use_rslora="no"),
    "use_dora must be true or false. Received: 0": lambda p: edit_config(p, use_dora=0),
    **{
        f"init_lora_weights is '{start}', which is not supported: it changes": partial(
            edit_config, init_lora_weights=start
        )
        for start in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    },
    "alora_invocation_tokens is .1, 2.": lambda p: edit_config(p, alora_invocation_tokens=[1, 2]),
    "fan_in_fan_out is True": lambda p: edit_config(p, fan_in_fan_out=True),
    "lora_bias is True": lambda p: edit_config(p, lora_bias=True),
    "kasa_config is .'beta': 1": lambda p: edit_config(p, kasa_config={"beta": 1}),
    "trainable_token_indices is .5": lambda p: edit_config(p, trainable_token_indices=[5]),
    "target_parameters is": lambda p: edit_config(p, target_parameters=["experts.up_proj"]),
    "not finite": lambda p: edit_tensors(
        p, lambda t: {k: v * (np.inf if "1.mlp.up" in k else 1) for k, v in t.items()}
    ),
    "holds lora_A of .* twice": lambda p: edit_tensors(
        p, lambda t: t | {k.replace("model.model.", "model.model.language_model."): v for k, v in t.items()}
    ),
    "not a template": lambda p: (p / "template.json").write_text('{"prompt": 1}'),
}


#: Of a DoRA folder.
DORA_SPOILERS = {
    "is DoRA's, but use_dora is not true": lambda p: edit_config(p, use_dora=False),
    "lacks lora_B": lambda p: edit_tensors(
        p, lambda t: {k: v for k, v in t.items() if "0.mlp.up_proj.lora_B" not in k}
    ),
    "has a magnitude": lambda p: edit_tensors(p, lambda t: {k: v[:3] if "magnitude" in k else v for k, v in t.items()}),
}


def state_of(model):
    """Everything that a refused adapter must leave alone."""
    return {
        "layers": [id(layer) for layer in model._flatten_layers()],
        "activations": [getattr(layer, "activation", None) for layer in model._flatten_layers()],
        "variables": [id(variable) for variable in model.variables],
        "trainable": [variable.trainable for variable in model.variables],
        "values": [np.asarray(variable.value).tobytes() for variable in model.variables],
        "template": getattr(model, "gemma_lora_template", None),
        "outputs": np.asarray(model.backbone(INPUTS)).tobytes(),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LoRA's folder and a DoRA's."""
    found = {}
    for dora in (False, True):
        found[dora] = tmp_path_factory.mktemp(f"dora_{dora}")
        save_adapter(trained(tiny_gemma(), dora=dora), found[dora])
    return found


@pytest.fixture(scope="module")
def with_lora():
    """A model with LoRA and a template, which every refusal must leave as it is."""
    model = lora.apply_lora(tiny_gemma(), rank=2, alpha=6, targets=("query", "down"), dropout=0.5)
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(np.full(layer.lora_b.shape, 0.1))
    model.gemma_lora_template = Template("Q: {prompt}", "{response}<eos>")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("message", [*SPOILERS, *DORA_SPOILERS])
def test_a_bad_folder_is_refused_and_the_model_unchanged(tmp_path, folders, with_lora, message):
    path = shutil.copytree(folders[message in DORA_SPOILERS], tmp_path / "adapter")
    before = state_of(with_lora)
    (SPOILERS | DORA_SPOILERS)[message](path)
    with pytest.raises(GemmaLoraError, match=message):
        load_adapter(with_lora, path)
    assert state_of(with_lora) == before
    assert len(lora.lora_layers(with_lora)) == 4


def test_a_bad_folder_gives_a_model_without_lora_none(folders, gemma, tmp_path):
    path = shutil.copytree(folders[False], tmp_path / "adapter")
    edit_config(path, lora_dropout=None)
    for variable in gemma.variables[::2]:
        variable.trainable = False
    before = state_of(gemma)
    with pytest.raises(GemmaLoraError, match="lora_dropout"):
        load_adapter(gemma, path)
    assert state_of(gemma) == before


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_load_that_is_cut_short_is_undone(monkeypatch, folders, with_lora, error):
    before, made = state_of(with_lora), []
    real = peft._new_layer

    def cut_short(*arguments):
        if len(made) == 4:
            raise error
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(peft, "_new_layer", cut_short)
    with pytest.raises(error):
        load_adapter(with_lora, folders[False])
    assert len(made) == 4 and state_of(with_lora) == before


def test_what_a_configuration_leaves_out_is_pefts_default(folders, tmp_path):
    path = shutil.copytree(folders[False], tmp_path / "adapter")
    write_config(path, '{"peft_type": "LORA", "lora_alpha": 6}')
    expected = np.asarray(load_adapter(tiny_gemma(), folders[False]).backbone(INPUTS))
    model = load_adapter(tiny_gemma(), path)
    np.testing.assert_array_equal(model.backbone(INPUTS), expected)
    assert {(layer.rank, layer.dropout_rate, layer.rslora, layer.dora) for layer in lora.lora_layers(model)} == {
        (3, 0.0, False, False)
    }


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_read(folders, tmp_path, start):
    path = shutil.copytree(folders[False], tmp_path / "adapter")
    edit_config(path, init_lora_weights=start)
    assert read_folder(path).modules.keys() == read_folder(folders[False]).modules.keys()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.replace(".weight", ".default.weight").replace("_vector", "_vector.default.weight"),
        lambda k: k.replace("magnitude_vector", "magnitude_vector.default"),
        lambda k: f"_orig_mod.{k}",
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: k.replace("layers.1.", "layers.1._orig_mod.").replace("q_proj.", "q_proj._orig_mod."),
        lambda k: k.replace("layers.", "_fsdp_wrapped_module.layers.").replace("1.mlp", "1._fsdp_wrapped_module.mlp"),
        lambda k: f"_fsdp_wrapped_module.{k}",
        lambda k: f"base_model.model.{k}",
        lambda k: k.replace("model.layers", "model.language_model.layers"),
        lambda k: k.replace("model.layers", "language_model.model.layers"),
        lambda k: k.removeprefix("base_model.model."),
        lambda k: f"module.{k}",
    ],
    ids=[
        "default", "magnitude.default", "compiled", "base compiled", "blocks compiled", "fsdp", "all fsdp", "doubled",
        "language_model", "older language_model", "no prefix", "data parallel",
    ],
)  # fmt: skip
def test_other_names_of_the_same_tensors(folders, tmp_path, dora, change):
    expected = read_folder(folders[dora])
    path = shutil.copytree(folders[dora], tmp_path / "adapter")
    edit_tensors(path, lambda t: {change(k): v for k, v in t.items()})
    found = read_folder(path)
    assert found.modules.keys() == expected.modules.keys()
    for module, numbers in found.modules.items():
        np.testing.assert_array_equal(numbers.lora_a, expected.modules[module].lora_a)
        np.testing.assert_array_equal(numbers.lora_b, expected.modules[module].lora_b)
        np.testing.assert_array_equal(numbers.magnitude, expected.modules[module].magnitude)


def differing(model, **kind):
    """LoRA whose rank and alpha differ from layer to layer, on some layers only."""
    chosen = {"model.layers.0.self_attn.q_proj": (1, 2.0), "model.layers.1.mlp.down_proj": (4, 3.0)}
    chosen["model.layers.1.self_attn.q_proj"] = (1, 5.0)
    for slot in peft.slots(model):
        if slot.module in chosen:
            rank, alpha = chosen[slot.module]
            cls = lora.LoRADense if isinstance(slot.layer, keras.layers.Dense) else lora.LoRAEinsumDense
            layer = cls(slot.layer, rank, alpha=alpha, **kind)
            layer.lora_b.assign(np.random.default_rng(rank).normal(0, 0.3, layer.lora_b.shape))
            replace(slot.parent, slot.attribute, layer)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"rslora": True, "dora": True}], ids=str)
def test_rank_and_alpha_of_each_layer_are_kept(tmp_path, gemma, kind):
    differing(gemma, **kind)
    expected = np.asarray(gemma.backbone(INPUTS))
    save_adapter(gemma, tmp_path / "one")
    model = load_adapter(tiny_gemma(), tmp_path / "one")
    found = sorted((layer.rank, layer.alpha) for layer in lora.lora_layers(model))
    assert found == [(1, 2.0), (1, 5.0), (4, 3.0)]
    np.testing.assert_allclose(model.backbone(INPUTS), expected, atol=1e-6)
    save_adapter(model, tmp_path / "two")
    one, two = ((tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two"))
    assert one == two
    assert json.loads(one)["rank_pattern"] == {"layers.1.mlp.down_proj": 4}


@pytest.mark.slow
def test_mixed_scalings_are_written_as_one_kind(tmp_path, gemma):
    trained(gemma, ("query", "down"), alpha=5)
    query = gemma.backbone.transformer_layers[0].attention.query_dense
    other = lora.LoRAEinsumDense(query.base, 4, alpha=7, rslora=True)
    other.lora_b.assign(np.full(other.lora_b.shape, 0.1))
    replace(gemma.backbone.transformer_layers[0].attention, "query_dense", other)
    expected = np.asarray(gemma.backbone(INPUTS))
    save_adapter(gemma, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is False
    np.testing.assert_allclose(load_adapter(tiny_gemma(), tmp_path).backbone(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, gemma, bad):
    trained(gemma, ("query",))
    layer = lora.lora_layers(gemma)[1]
    layer.lora_a.assign(np.where(np.arange(layer.lora_a.shape[1]) == 1, bad, layer.lora_a))
    with pytest.raises(
        GemmaLoraError, match=r"layers\.\d\.self_attn\.q_proj\.lora_A\.weight holds numbers that are not finite"
    ):
        save_adapter(gemma, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_without_lora_is_not_saved(tmp_path):
    with pytest.raises(GemmaLoraError, match="no LoRA"):
        save_adapter(tiny_gemma(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
