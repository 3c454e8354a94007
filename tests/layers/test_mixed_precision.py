"""The mixed-precision product against float64 on rounded factors, and LoRA's gradients against those in float32."""

import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.gemma.weights import collect
from gemma_lora.layers import linear
from gemma_lora.layers.mixed_precision import batched_product, frozen_product, low_rank_product
from gemma_lora.layers.products import Precision, Rounded, product_of
from gemma_lora.lora.qlora import quantize_base
from gemma_lora.training.tuner import FineTuner
from tests.conftest import tiny_gemma


def rounded(array):
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype("float64")


def test_value_and_gradient_are_those_of_rounded_factors():
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (rng.normal(size=shape).astype("float32") for shape in ((5, 40), (40, 7), (5, 7)))
    y, pullback = jax.vjp(frozen_product, jnp.asarray(x), jnp.asarray(kernel))
    d_x, d_kernel = pullback(jnp.asarray(cotangent))
    np.testing.assert_allclose(y, rounded(x) @ rounded(kernel), atol=1e-5)
    np.testing.assert_allclose(d_x, rounded(cotangent) @ rounded(kernel).T, atol=1e-5)
    assert y.dtype == jnp.float32 and not np.any(d_kernel)
    assert np.abs(np.asarray(y) - x @ kernel).max() > 1e-4  # it did round


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_batched_value_and_gradients_are_those_of_rounded_factors(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    a, b, cotangent = (
        rng.normal(size=shape).astype("float32") for shape in ((2, 3, 5, 40), (2, 3, 40, 7), (2, 3, 5, 7))
    )
    y, pullback = jax.vjp(batched_product, jnp.asarray(a), jnp.asarray(b))
    d_a, d_b = pullback(jnp.asarray(cotangent))
    np.testing.assert_allclose(y, rounded(a) @ rounded(b), atol=1e-5)
    np.testing.assert_allclose(d_a, rounded(cotangent) @ np.swapaxes(rounded(b), -1, -2), atol=1e-5)
    np.testing.assert_allclose(d_b, np.swapaxes(rounded(a), -1, -2) @ rounded(cotangent), atol=1e-5)
    assert y.dtype == jnp.float32 and np.abs(np.asarray(y) - a @ b).max() > 1e-4  # it did round


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("tokens", [5, 64])  # 64: matrices of 32 columns or more are transposed in blocks
@pytest.mark.parametrize(("d_in", "rank", "d_out"), [(40, 3, 70), (70, 3, 40), (2, 3, 4), (1, 1, 1), (40, 50, 33)])
def test_low_rank_value_and_gradients_are_those_of_rounded_factors(monkeypatch, backend, tokens, d_in, rank, d_out):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    shapes = ((tokens, d_in), (d_in, rank), (rank, d_out), (tokens, d_out))
    # Multiples of 1/128: sums of products of rounded ones are exact, and x @ a rounds as float64's does.
    x, a, b, cotangent = (np.round(rng.normal(size=shape) * 128).astype("float32") / 128 for shape in shapes)

    @jax.jit  # which is where XLA may move transpositions about
    def both(*factors):
        y, pullback = jax.vjp(low_rank_product, *factors)
        return y, pullback(jnp.asarray(cotangent))

    y, (d_x, d_a, d_b) = both(x, a, b)
    inner = rounded(rounded(x) @ rounded(a))
    d_inner = rounded(rounded(cotangent) @ rounded(b).T)
    np.testing.assert_allclose(y, inner @ rounded(b), atol=1e-3)
    np.testing.assert_allclose(d_x, d_inner @ rounded(a).T, atol=1e-3)
    np.testing.assert_allclose(d_a, rounded(x).T @ d_inner, atol=1e-3)
    np.testing.assert_allclose(d_b, inner.T @ rounded(cotangent), atol=1e-3)
    assert {v.dtype for v in (y, d_x, d_a, d_b)} == {np.dtype("float32")}


def gradients(model, mixed_precision, targets="all-linear"):
    """LoRA's gradients on one batch, read off an SGD step of rate 1."""
    lora.apply_lora(model, rank=2, targets=targets)
    for number, layer in enumerate(lora.lora_layers(model)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.1, layer.lora_b.shape))
    tuner = FineTuner(model, mixed_precision=mixed_precision)
    tuner.compile(keras.optimizers.SGD(1.0))
    before = [np.asarray(v) for v in tuner.trainable_variables]
    rng = np.random.default_rng(1)
    x = {"token_ids": rng.integers(5, 300, (2, 12)), "padding_mask": np.ones((2, 12), "int32")}
    tuner.train_on_batch(x, rng.integers(5, 300, (2, 12)))
    return np.concatenate([(a - np.asarray(b)).ravel() for a, b in zip(before, tuner.trainable_variables, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "targets"), [(2, "all-linear"), (3, "all-linear"), (3, ("query", "value"))])
def test_gradients_point_where_float32s_do(generation, targets):
    plain, mixed = (gradients(tiny_gemma(generation), flag, targets) for flag in (False, True))
    cosine = plain @ mixed / np.linalg.norm(plain) / np.linalg.norm(mixed)
    assert 0.999 < cosine < 1 - 1e-9  # close, and not the same computation
    assert np.linalg.norm(mixed) == pytest.approx(np.linalg.norm(plain), rel=0.02)


def test_outside_training_nothing_is_rounded(gemma):
    lora.apply_lora(gemma, rank=2)
    x = {"token_ids": np.arange(12)[None] + 5, "padding_mask": np.ones((1, 12), "int32")}
    before = np.asarray(gemma.backbone(x))
    FineTuner(gemma, mixed_precision=True)
    np.testing.assert_array_equal(gemma.backbone(x), before)


@pytest.mark.slow
def test_attention_rounds_while_training_only(gemma, monkeypatch):
    formed = []

    def product(a, b):
        formed.append(a.shape)
        return batched_product(a, b)

    monkeypatch.setattr("gemma_lora.gemma.attention.batched_product", product)
    lora.apply_lora(gemma, rank=2)
    x = {"token_ids": np.full((2, 12), 7), "padding_mask": np.ones((2, 12), "int32")}
    tuner = FineTuner(gemma, mixed_precision=True)
    tuner(x, training=False)
    assert not formed
    tuner(x, training=True)
    assert len(formed) == 2 * len(gemma.backbone.transformer_layers)  # scores, and values under them
    FineTuner(gemma, mixed_precision=False)(x, training=True)
    assert len(formed) == 2 * len(gemma.backbone.transformer_layers)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_updates_are_rounded_while_training_only(gemma, monkeypatch, packed):
    formed = []

    def product(x, a, b):
        formed.append(x.shape)
        return low_rank_product(x, a, b)

    monkeypatch.setattr("gemma_lora.lora.products.low_rank_product", product)
    if packed:
        quantize_base(gemma, "nf4")
    lora.apply_lora(gemma, rank=2, targets="all-linear")
    x = {"token_ids": np.full((2, 12), 7), "padding_mask": np.ones((2, 12), "int32")}
    tuner = FineTuner(gemma, mixed_precision=True)
    tuner(x, training=False)
    assert not formed
    tuner(x, training=True)
    assert len(formed) == len(lora.lora_layers(gemma))
    FineTuner(gemma, mixed_precision=False)(x, training=True)
    assert len(formed) == len(lora.lora_layers(gemma))


@pytest.mark.slow
def test_validation_is_in_float32_even_when_merged(gemma):
    """The loss that `evaluate` gives does not depend on how the model is trained."""
    lora.apply_lora(gemma, rank=2, targets="all-linear")
    for number, layer in enumerate(lora.lora_layers(gemma)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.1, layer.lora_b.shape))
    rng = np.random.default_rng(1)
    x = {"token_ids": rng.integers(5, 300, (2, 12)), "padding_mask": np.ones((2, 12), "int32")}
    y = rng.integers(5, 300, (2, 12))

    def losses(mixed_precision):
        tuner = FineTuner(gemma, mixed_precision=mixed_precision)
        tuner.compile(keras.optimizers.SGD(0.0))
        trained = np.asarray(tuner(x, training=True))
        plain = float(np.ravel(tuner.evaluate(x, y, verbose=0))[0])
        lora.merge_lora(gemma)
        merged = float(np.ravel(tuner.evaluate(x, y, verbose=0))[0])
        lora.unmerge_lora(gemma)
        return plain, merged, trained

    plain, mixed = losses(False), losses(True)
    assert mixed[0] == pytest.approx(plain[0], rel=1e-6)
    assert mixed[1] == pytest.approx(plain[0], rel=1e-5)  # the compiled program sees that it is merged
    assert np.abs(mixed[2] - plain[2]).max() > 1e-4  # training does round


def test_rounded_copies_are_variables_of_the_tuner(gemma):
    """As variables they are arguments of the compiled step; as constants they would be compiled into it."""
    lora.apply_lora(gemma, rank=2, targets="all-linear")
    tuner = FineTuner(gemma, mixed_precision=True)
    held = {id(v) for v in tuner.non_trainable_variables}
    assert len(tuner.copies) == 2 * 7 + 1 and {id(v) for v in tuner.copies} <= held
    assert [v.dtype for v in tuner.copies] == ["bfloat16"] * 14 + ["uint16"]  # the table: its bits
    assert not FineTuner(gemma, mixed_precision=False).copies


@pytest.mark.slow
def test_a_kernel_that_is_assigned_to_is_rounded_anew(gemma):
    lora.apply_lora(gemma, rank=2)
    tuner = FineTuner(gemma, mixed_precision=True)
    tuner.compile(keras.optimizers.SGD(0.0))
    x = {"token_ids": np.full((2, 12), 7), "padding_mask": np.ones((2, 12), "int32")}
    before = tuner.train_on_batch(x, np.full((2, 12), 9))
    kernel = gemma.backbone.transformer_layers[0].gating_ffw.base.kernel
    kernel.assign(-kernel)
    assert tuner.train_on_batch(x, np.full((2, 12), 9)) != pytest.approx(before)


def test_layers_that_are_trained_do_not_round(gemma):
    def rounding(**named):
        tuner = FineTuner(gemma, mixed_precision=True)
        weights = collect(gemma, tuner._precision(True), True)
        return {name for block in weights.blocks for name, matrix in block.linear.items() if type(matrix) is Rounded}

    assert rounding() == set()  # everything is trained
    for block in gemma.backbone.transformer_layers:
        block.gating_ffw.trainable = False
    assert rounding() == {"gate"}


LAYERS = {
    "dense": lambda: (keras.layers.Dense(7, use_bias=False), (2, 5, 40)),
    "query": lambda: (keras.layers.EinsumDense("btd,ndh->btnh", (None, 3, 4)), (2, 5, 40)),
    "output": lambda: (keras.layers.EinsumDense("btnh,nhd->btd", (None, 6)), (2, 5, 4, 10)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("copied", [False, True])
def test_a_frozen_layer_rounds_both_factors(kind, copied):
    layer, shape = LAYERS[kind]()
    layer.build(shape)
    layer.trainable = False
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    copy = keras.ops.cast(linear.kernel_matrix(layer), "bfloat16")
    precision = Precision(True, {id(layer): copy} if copied else {})
    ours = linear.in_rows(layer, x, product_of(layer, precision).multiply)
    before = np.asarray(layer(x))
    layer.kernel.assign(rounded(layer.kernel))
    np.testing.assert_allclose(ours, layer(rounded(x).astype("float32")), atol=1e-5)
    assert np.abs(np.asarray(ours) - before).max() > 1e-4
