"""bitnet.py against numpy, integer loops without a multiplication, JAX's own gradients and Keras's layers."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from gemma_lora.layers.bitnet import (
    BitLinear,
    NormLinear,
    PackedBitLinear,
    activation_fake_quantize,
    activation_quantize,
    freeze,
    freeze_model,
    ternary_fake_quantize,
    ternary_matmul,
    ternary_quantize,
    unpack_ternary,
)
from gemma_lora.quantization.integers import dequantize


def built(kind, d_in=24, units=10, seed=0):
    """A layer whose kernel and gain are random, and inputs (2, 7, d_in) of uneven size."""
    rng = np.random.default_rng(seed)
    layer = kind(units)
    layer.build((None, d_in))
    layer.set_weights([rng.normal(0, 0.3, (d_in, units)), rng.uniform(0.5, 2, d_in)])
    x = rng.normal(size=(2, 7, d_in)) * rng.uniform(0.01, 30, (2, 7, 1))
    return layer, x.astype("float32")


def norm_by_hand(x, gain, epsilon=1e-6):
    return x / np.sqrt(np.mean(x.astype(float) ** 2, axis=-1, keepdims=True) + epsilon) * gain


def layer_by_hand(x, gain, kernel):
    """BitLinear in float64, token by token."""
    scale = np.mean(np.abs(kernel))
    ternary = np.where(np.abs(kernel) > scale / 2, np.sign(kernel), 0)
    outputs = np.zeros((*x.shape[:-1], kernel.shape[1]))
    for index in np.ndindex(x.shape[:-1]):
        token = norm_by_hand(x[index], gain)
        step = np.max(np.abs(token)) / 127
        outputs[index] = (np.round(token / step) @ ternary) * step * scale
    return outputs


# --- the straight-through estimator ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "exact"), [(ternary_fake_quantize, ternary_quantize), (activation_fake_quantize, activation_quantize)]
)
def test_forward_is_the_quantized_value_and_backward_the_identity(fake, exact):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(6, 9)).astype("float32"), rng.normal(size=(6, 9)).astype("float32")
    assert np.allclose(fake(x), dequantize(exact(x)), rtol=1e-6, atol=0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(fake(x) * weights)))(x)
    assert np.array_equal(np.asarray(gradient), weights)


def test_a_clipped_weight_gets_its_gradient_too():
    kernel = jnp.array([[100.0, 0.1, -0.2, 0.0]])
    assert jax.grad(lambda w: ternary_fake_quantize(w).sum())(kernel).tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_at_most_three_values_come_out():
    kernel = np.random.default_rng(3).normal(size=(300, 200)).astype("float32")
    assert len(np.unique(np.asarray(ternary_fake_quantize(kernel)))) == 3


# --- the integer product -----------------------------------------------------------------------------------


def test_the_product_needs_additions_and_subtractions_only():
    rng = np.random.default_rng(1)
    x, kernel = rng.integers(-127, 128, (5, 40)).astype("int8"), rng.integers(-1, 2, (40, 6)).astype("int8")
    sums = np.zeros((5, 6), int)
    for token, i, j in np.ndindex(5, 40, 6):
        if kernel[i, j] == 1:
            sums[token, j] += x[token, i]
        elif kernel[i, j] == -1:
            sums[token, j] -= x[token, i]
    product = ternary_matmul(x, kernel)
    assert product.dtype == jnp.int32 and product.tolist() == sums.tolist()
    assert ternary_matmul(x[0], kernel).tolist() == sums[0].tolist()
    assert ternary_matmul(x[None], kernel).tolist() == [sums.tolist()]


def test_the_product_does_not_overflow_eight_bits():
    assert ternary_matmul(np.full(100_000, 127, "int8"), np.ones((100_000, 1), "int8")).tolist() == [12_700_000]


@pytest.mark.parametrize(
    ("x", "kernel", "said"),
    [
        (np.ones(3), np.ones((3, 1), "int8"), "`x_qvalue` must be int8.*float"),
        (np.ones(3, "int8"), np.ones((3, 1), "int32"), "`kernel_qvalue` must be int8.*int32"),
        (np.ones(3, "int8"), np.ones((4, 1), "int8"), r"`kernel_qvalue` must be \(d_in, d_out\).*\(4, 1\), \(3,\)"),
        (np.ones(3, "int8"), np.ones(3, "int8"), r"`kernel_qvalue` must be \(d_in, d_out\)"),
    ],
)
def test_operands_that_do_not_fit_are_named(x, kernel, said):
    with pytest.raises(ValueError, match=said):
        ternary_matmul(x, kernel)


# --- the layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_bit_linear_is_the_layer_by_hand(seed):
    layer, x = built(BitLinear, seed=seed)
    kernel, gain = (np.asarray(w, float) for w in layer.get_weights())
    assert np.allclose(layer(x), layer_by_hand(x, gain, kernel), rtol=1e-4, atol=1e-4)


def test_the_twin_is_kerass_norm_and_dense():
    layer, x = built(NormLinear)
    kernel, gain = layer.get_weights()
    norm, dense = keras.layers.RMSNormalization(), keras.layers.Dense(10, use_bias=False)
    norm.build(x.shape)
    dense.build(x.shape)
    norm.set_weights([gain])
    dense.set_weights([kernel])
    assert np.allclose(layer(x), dense(norm(x)), rtol=1e-5, atol=1e-5)
    assert np.allclose(layer(x), norm_by_hand(x, gain) @ kernel, rtol=1e-4, atol=1e-4)


def test_a_tokens_size_does_not_matter_and_its_neighbours_do_not():
    layer, x = built(BitLinear)
    alone = np.stack([np.asarray(layer(x[:, i])) for i in range(x.shape[1])], axis=1)
    assert np.allclose(layer(x), alone, rtol=1e-5, atol=1e-5)
    assert np.allclose(layer(1000 * x), layer(x), rtol=1e-2, atol=1e-2)  # epsilon matters a little


def test_the_kernels_gradient_is_the_rounded_inputs_times_the_outputs():
    layer, x = built(BitLinear)
    upstream = np.random.default_rng(5).normal(size=(2, 7, 10)).astype("float32")

    def loss(kernel):
        (out, _) = layer.stateless_call([kernel, layer.norm.scale.value], [], x)
        return jnp.sum(out * upstream)

    rounded = dequantize(activation_quantize(layer.norm(x)))
    wanted = np.einsum("bti,bto->io", rounded, upstream)
    assert np.allclose(jax.grad(loss)(layer.kernel.value), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_the_inputs_gradient_goes_through_the_ternary_kernel_and_the_norm():
    layer, x = built(BitLinear)
    fixed = dequantize(ternary_quantize(layer.kernel))
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(layer.norm(x) @ fixed)))  # what comes back through sin is not the same
    gradient = jax.grad(lambda x: jnp.sum(layer(x)))(x)
    plain = jax.grad(lambda x: jnp.sum(layer.norm(x) @ fixed))(x)
    assert np.allclose(gradient, plain, rtol=1e-4, atol=1e-4)
    assert not np.allclose(gradient, wanted(x), atol=1e-2)


def test_weights_of_the_twin_fit_and_no_bias_is_there():
    twin, _ = built(NormLinear)
    layer, x = built(BitLinear, seed=9)
    layer.set_weights(twin.get_weights())
    assert [w.path.split("/")[-1] for w in layer.weights] == ["kernel", "scale"]
    assert layer(np.zeros_like(x)).tolist() == np.zeros((2, 7, 10)).tolist()


def test_a_layer_is_made_again_from_its_configuration():
    layer, x = built(BitLinear)
    model = keras.Sequential([keras.Input((24,)), BitLinear(10, epsilon=1e-3, kernel_initializer="ones")])
    again = keras.Sequential.from_config(model.get_config())
    assert isinstance(again.layers[0], BitLinear) and again.layers[0].epsilon == 1e-3
    assert np.asarray(again.layers[0].kernel).min() == 1
    assert layer.compute_output_shape((2, 7, 24)) == (2, 7, 10)


@pytest.mark.parametrize("units", [0, 2.0, True])
def test_units_must_be_a_count(units):
    with pytest.raises(ValueError, match="`units` must be an integer"):
        BitLinear(units)


# --- the frozen form ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("d_in", "units"), [(24, 10), (7, 3), (1, 1), (33, 64)])
def test_the_frozen_layer_computes_what_the_trained_one_does(d_in, units):
    layer, x = built(BitLinear, d_in, units)
    before = np.asarray(layer(x))
    frozen = freeze(layer)
    assert np.allclose(frozen(x), before, rtol=1e-5, atol=1e-5)
    assert np.allclose(jax.jit(frozen)(x), before, rtol=1e-5, atol=1e-5)
    assert np.array_equal(layer(x), before)


def test_the_frozen_layer_holds_codes_and_a_scale_and_trains_nothing():
    layer, _ = built(BitLinear)
    frozen = freeze(layer)
    tensor = ternary_quantize(layer.kernel)
    assert not frozen.trainable_variables
    assert np.array_equal(unpack_ternary(np.asarray(frozen.packed), (24, 10)), tensor.qvalue)
    assert sum(v.value.nbytes for v in frozen.variables) == 48 + 4 + 24 * 4  # 240 codes, γ, the gain


def model_of(kind):
    x = inputs = keras.Input((5, 8))
    for units in (12, 8):
        x = kind(units)(x)
    return keras.Model(inputs, x + inputs)


@pytest.mark.slow
def test_a_model_is_frozen_saved_and_read_again(tmp_path):
    keras.utils.set_random_seed(0)  # a sum on the edge between two codes may be rounded either way
    model = model_of(BitLinear)
    x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype("float32")
    frozen = freeze_model(model)
    assert sum(isinstance(layer, PackedBitLinear) for layer in frozen.layers) == 2
    assert np.allclose(frozen(x), model(x), rtol=1e-5, atol=1e-5)
    frozen.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(again(x), frozen(x))


@pytest.mark.parametrize("layer", [BitLinear(3), NormLinear(3), keras.layers.Dense(3)])
def test_only_a_built_bit_linear_can_be_frozen(layer):
    if not isinstance(layer, BitLinear):
        layer.build((None, 4))
    with pytest.raises(ValueError, match="`layer` must be a BitLinear that is built. Received: "):
        freeze(layer)
