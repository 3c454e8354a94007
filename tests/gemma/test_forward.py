"""The one forward pass against KerasHub's own model: every Gemma, every kind of weights; attention piece by piece."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.gemma import attention as attention_module
from gemma_lora.gemma.architectures import architecture_of
from gemma_lora.gemma.attention import Keys, attention, in_window, packed_rows
from gemma_lora.gemma.forward import forward, hidden_states
from gemma_lora.gemma.weights import collect
from gemma_lora.lora import qlora
from tests.conftest import tiny_gemma

IDS = np.random.default_rng(0).integers(6, 300, (2, 13)).astype("int32")
MASK = np.ones_like(IDS)
MASK[1, 9:] = 0


def trained_lora(model, **named):
    lora.apply_lora(model, **({"rank": 2, "targets": "all-linear"} | named))
    for number, layer in enumerate(lora.lora_layers(model)):
        rng = np.random.default_rng(number)
        layer.lora_b.assign(rng.normal(0, 0.2, layer.lora_b.shape))
        if layer.dora:
            layer.magnitude.assign(layer.magnitude * (1 + 0.1 * rng.normal(size=layer.magnitude.shape)))
    return model


def merged(model):
    lora.merge_lora(trained_lora(model))
    return model


KINDS = {
    "plain": lambda model: model,
    "LoRA": trained_lora,
    "LoRA on two targets": lambda model: trained_lora(model, targets=("key", "down")),
    "rsLoRA": lambda model: trained_lora(model, rslora=True),
    "DoRA": lambda model: trained_lora(model, dora=True),
    "merged": merged,
    "merged DoRA": lambda model: (trained_lora(model, dora=True), lora.merge_lora(model))[0],
    "NF4": lambda model: qlora.quantize_base(model, "nf4", double_quant=True),
    "LoRA on int8": lambda model: trained_lora(qlora.quantize_base(model, "int8")),
    "DoRA on int4": lambda model: trained_lora(qlora.quantize_base(model, "int4"), dora=True),
}


def theirs(model):
    return np.asarray(model.backbone({"token_ids": IDS, "padding_mask": MASK}))[MASK > 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_keras_hubs(any_gemma, kind):
    plain = theirs(any_gemma)
    model = KINDS[kind](any_gemma)
    ours = np.asarray(hidden_states(model, IDS, MASK))[MASK > 0]
    np.testing.assert_allclose(ours, theirs(model), atol=2e-5)
    if kind != "plain":
        assert np.abs(ours - plain).max() > 1e-3  # the kind of weights matters


@pytest.mark.slow
def test_settled_weights_give_what_the_others_give(any_gemma):
    architecture = architecture_of(any_gemma.backbone)
    for kind in ("LoRA", "DoRA", "DoRA on int4"):
        model = KINDS[kind](tiny_gemma(3))
        attend = packed_rows(architecture_of(model.backbone), MASK)
        named = (IDS, np.arange(13)[None], attend)
        one = forward(architecture_of(model.backbone), collect(model), *named)
        other = forward(architecture_of(model.backbone), collect(model).settled(), *named)
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert hash(architecture) == hash(architecture_of(any_gemma.backbone))


@pytest.mark.slow
def test_bfloat16_computes_as_keras_hub_does():
    model = tiny_gemma(3)
    config = model.backbone.get_config() | {"dtype": "bfloat16", "name": None}
    short = type(model.backbone)(**config)
    for new, old in zip(short.variables, model.backbone.variables, strict=True):
        new.assign(old)
    ours = np.asarray(hidden_states(short, IDS, MASK), "float32")[MASK > 0]
    other = np.asarray(short({"token_ids": IDS, "padding_mask": MASK}), "float32")[MASK > 0]
    assert np.abs(ours - other).max() < 0.06 * np.abs(other).max()  # a few roundings of 2^-8
    assert hidden_states(short, IDS).dtype == "bfloat16"


@pytest.mark.slow
def test_remat_and_the_plain_pass_have_the_same_gradients(gemma):
    model = trained_lora(gemma, dora=True)
    architecture, weights = architecture_of(model.backbone), collect(model)

    @jax.jit
    def both(weights):
        def loss(weights, remat):
            attend = packed_rows(architecture, MASK)
            return jnp.sum(jnp.sin(forward(architecture, weights, IDS, np.arange(13)[None], attend, remat)))

        return [jax.value_and_grad(loss, allow_int=True)(weights, remat) for remat in (False, True)]

    (one, gradient), (other, again) = both(weights)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient.blocks), jax.tree.leaves(again.blocks), strict=True):
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(a).max())))


def test_rotations_of_constant_positions_are_constants(gemma):
    architecture, weights = architecture_of(gemma.backbone), collect(gemma)

    def program(positions):
        attend = packed_rows(architecture, MASK)
        return str(jax.make_jaxpr(lambda w, p: forward(architecture, w, IDS, p, attend))(weights, positions))

    def constant(weights):
        return forward(architecture, weights, IDS, np.arange(13)[None], packed_rows(architecture, MASK))

    assert "cos" not in str(jax.make_jaxpr(constant)(weights))
    assert " cos " in program(jnp.arange(13)[None])


def test_only_differences_of_positions_count(gemma):
    architecture, weights = architecture_of(gemma.backbone), collect(gemma)
    attend = packed_rows(architecture, MASK)
    one, other = (forward(architecture, weights, IDS, np.arange(13)[None] + n, attend) for n in (0, 40))
    np.testing.assert_allclose(one, other, atol=2e-5)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_not_computed_is_refused_by_name(gemma):
    with pytest.raises(GemmaLoraError, match="Sequential; gemma_lora computes GemmaBackbone"):
        architecture_of(keras.Sequential([keras.layers.Dense(2)]))
    small = gemma.backbone.get_config() | {"name": None}
    cls = type(gemma.backbone)
    for change, named in [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"dtype": "float16"}, "float16"),
    ]:
        with pytest.raises(GemmaLoraError, match=named):
            architecture_of(cls(**(small | change)))


# --- attention ---------------------------------------------------------------------------------------------


def queries_keys_values(length, keys):
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, length, 4, 8)).astype("float32")
    k, v = rng.normal(size=(2, 2, keys, 2, 8)).astype("float32")
    return q, k, v


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("length, keys, start", [(9, 9, 0), (1, 12, 7), (4, 12, 3), (40, 40, 0)])
@pytest.mark.parametrize("cuts", [(), (5,), (0, 3)])
def test_attention_equals_keras_hubs_however_keys_are_cut(any_gemma, block, length, keys, start, cuts):
    layer, architecture = any_gemma.backbone.transformer_layers[block].attention, architecture_of(any_gemma.backbone)
    q, k, v = queries_keys_values(length, keys)
    distance = start + np.arange(length)[:, None] - np.arange(keys)[None]
    rng = np.random.default_rng(4)
    mask = (distance >= 0)[None] & (rng.random((2, length, keys)) > 0.2) | (np.arange(keys) == start)[None, None]
    expected = layer._compute_attention(q, k, v, mask, cache_update_index=start)
    seen = mask & np.asarray(in_window(architecture.blocks[block], jnp.asarray(distance)))
    ends = [0, *cuts, keys]
    pieces = [
        Keys(*(np.swapaxes(part, 1, 2)[:, :, a:b] for part in (k, v))) for a, b in zip(ends, ends[1:], strict=False)
    ]
    ours = attention(architecture, jnp.asarray(q), pieces, jnp.asarray(seen))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_changed_mask_changes_the_result(gemma):
    architecture = architecture_of(gemma.backbone)
    q, k, v = queries_keys_values(3, 3)
    keys = [Keys(np.swapaxes(k, 1, 2), np.swapaxes(v, 1, 2))]
    mask = np.tril(np.ones((1, 3, 3), bool))
    before = np.asarray(attention(architecture, jnp.asarray(q), keys, jnp.asarray(mask)))
    mask[0, 2, 0] = False
    after = np.asarray(attention(architecture, jnp.asarray(q), keys, jnp.asarray(mask)))
    assert np.abs(after[0, 2] - before[0, 2]).max() > 1e-3
    np.testing.assert_array_equal(after[0, :2], before[0, :2])


@pytest.mark.slow
@pytest.mark.parametrize("length", [401, 770])
def test_stretches_change_nothing(gemma, length, monkeypatch):
    architecture = architecture_of(gemma.backbone)
    q, k, v = (jnp.asarray(part) for part in queries_keys_values(length, length))
    segments = np.sort(np.random.default_rng(5).integers(0, 4, (2, length)), axis=1)[:, ::-1]
    ours = packed_rows(architecture, segments)(0, q, k, v)
    monkeypatch.setattr(attention_module, "_stretches", lambda length: [(0, length)])
    whole = packed_rows(architecture, segments)(0, q, k, v)
    np.testing.assert_allclose(np.asarray(ours)[segments > 0], np.asarray(whole)[segments > 0], atol=1e-5)


@pytest.mark.parametrize("length, count", [(1, 1), (383, 1), (384, 2), (577, 3), (770, 4), (5000, 4)])
def test_stretches_hold_every_position_once(length, count):
    stretches = attention_module._stretches(length)
    assert len(stretches) == count
    assert [p for start, end in stretches for p in range(start, end)] == list(range(length))
