"""The MLP's activation against JAX's: value, gradients, and what is kept for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.layers.gated_gelu import gated_gelu


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
