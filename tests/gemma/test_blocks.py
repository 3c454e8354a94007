"""Our attention against KerasHub's own, of every Gemma: grouped heads, soft-cap, sliding window, one token, stretches;
the MLP's activation against JAX's. The blocks as a whole are compared in `test_packing.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.gemma.blocks import _stretches, gated_gelu


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("length, keys, start", [(9, 9, 0), (1, 12, 7), (4, 12, 3), (401, 401, 0), (770, 770, 0)])
def test_equals_keras_hubs(any_gemma, block, length, keys, start):
    attention = any_gemma.backbone.transformer_layers[block].attention
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, length, 4, 8)).astype("float32")
    k, v = rng.normal(size=(2, 2, keys, 2, 8)).astype("float32")
    causal = start + np.arange(length)[:, None] >= np.arange(keys)[None]
    mask = causal[None] & (rng.random((2, length, keys)) > 0.2) | (np.arange(keys) == start)[None, None]
    ours = attention._compute_attention(q, k, v, mask, cache_update_index=start)
    theirs = type(attention)._compute_attention(attention, q, k, v, mask, cache_update_index=start)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours.shape == (2, length, 4, 8)


def test_a_changed_mask_changes_the_result(gemma):
    attention = gemma.backbone.transformer_layers[0].attention
    rng = np.random.default_rng(4)
    q = rng.normal(size=(1, 3, 4, 8)).astype("float32")
    k, v = rng.normal(size=(2, 1, 3, 2, 8)).astype("float32")
    mask = np.tril(np.ones((1, 3, 3), bool))
    before = np.asarray(attention._compute_attention(q, k, v, mask))
    mask[0, 2, 0] = False
    after = np.asarray(attention._compute_attention(q, k, v, mask))
    assert np.abs(after[0, 2] - before[0, 2]).max() > 1e-3
    np.testing.assert_array_equal(after[0, :2], before[0, :2])


@pytest.mark.parametrize("length, count", [(1, 1), (383, 1), (384, 2), (577, 3), (770, 4), (5000, 4)])
def test_stretches_hold_every_position_once(length, count):
    stretches = _stretches(length)
    assert len(stretches) == count
    assert [p for start, end in stretches for p in range(start, end)] == list(range(length))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_gated_gelu_and_its_gradients_are_jaxs(dtype, tolerance):
    rng = np.random.default_rng(5)
    gate = jnp.asarray(np.concatenate([np.linspace(-12, 12, 400), [-200.0, -60.0, 0.0, 60.0, 200.0]]), dtype)[None]
    up, pull = (jnp.asarray(rng.normal(size=gate.shape), dtype) for _ in range(2))

    def plain(gate, up):
        return jax.nn.gelu(gate.astype("float32"), approximate=True) * up.astype("float32")

    value, back = jax.vjp(gated_gelu, gate, up)
    expected, back_plain = jax.vjp(plain, gate, up)
    assert value.dtype == gate.dtype
    for ours, theirs in zip((value, *back(pull)), (expected, *back_plain(pull.astype("float32"))), strict=True):
        scale = 1.0 + np.abs(np.asarray(theirs, "float32"))
        assert (np.abs(np.asarray(ours, "float32") - np.asarray(theirs, "float32")) / scale).max() < tolerance


def test_gated_gelu_keeps_its_two_inputs_and_no_more():
    def kept(function):
        _, back = jax.vjp(function, jnp.ones((4, 6)), jnp.ones((4, 6)))
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    assert kept(gated_gelu) == 2 * 24 < kept(lambda gate, up: jax.nn.gelu(gate, approximate=True) * up)
