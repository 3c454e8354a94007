"""DoRA against the paper's equation written out in float64: values, gradients, dropout, merging, dead columns."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.generation.engine import generate_tokens
from gemma_lora.layers import linear
from gemma_lora.lora import dora, qlora
from gemma_lora.training.tuner import FineTuner
from tests.conftest import tiny_gemma
from tests.lora.test_lora import CASES
from tests.lora.test_lora_gradients import ALPHA, D_IN, D_OUT, RANK, flat, problem

INPUTS = {"token_ids": np.arange(12)[None] + 5, "padding_mask": np.ones((1, 12), "int32")}


def filled(layer, seed=0):
    """Gives B and the magnitude values, so that both do something."""
    rng = np.random.default_rng(seed)
    layer.lora_b.assign(rng.normal(0, 0.1, layer.lora_b.shape))
    layer.magnitude.assign(np.asarray(layer.magnitude) * rng.uniform(0.5, 1.5, layer.magnitude.shape))
    return layer


def fill_all(model):
    for number, layer in enumerate(lora.lora_layers(model)):
        filled(layer, number)
    return model


def by_hand(kernel, a, b, magnitude, scaling):
    """Equation 5 in float64: (d_in, d_out)."""
    moved = np.asarray(kernel, "float64") + scaling * np.asarray(a, "float64") @ np.asarray(b, "float64")
    return np.asarray(magnitude, "float64") * moved / np.linalg.norm(moved, axis=0)


def matrix(layer):
    return np.asarray(linear.kernel_matrix(layer.base))


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_those_of_the_sum(size, dtype):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(40, 24)), dtype)
    a, b = rng.normal(size=(40, 3)).astype("float32"), size * rng.normal(size=(3, 24)).astype("float32")
    found = dora.column_norms(kernel, dora.column_squares(kernel), a, b, 1.7)
    right = np.linalg.norm(np.asarray(kernel, "float64") + 1.7 * a.astype("float64") @ b, axis=0)
    np.testing.assert_allclose(found, right, rtol=2e-6)


def test_an_update_that_takes_columns_away_leaves_no_negative_squares():
    """Rounding leaves what should be zero on either side of it."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)).astype("float32"), rng.normal(size=(3, 200)).astype("float32")
    kernel = jnp.asarray(a @ b)
    norms = np.asarray(dora.column_norms(kernel, dora.column_squares(kernel), a, -b, 1.0))
    assert np.all(norms < 2e-3 * np.linalg.norm(kernel, axis=0))  # not nan
    assert np.all(np.isfinite(dora.column_scale(jnp.zeros(200), norms)))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_einsum_output_is_the_equation_and_merging_and_back(case, rslora):
    base, shape = CASES[case]()
    layer = filled(lora.LoRAEinsumDense(base, rank=4, alpha=6, rslora=rslora, dora=True, seed=1))
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    kernel, before = matrix(layer), np.asarray(base.kernel)
    whole = by_hand(kernel, layer.lora_a, layer.lora_b, layer.magnitude, 6 / (np.sqrt(4) if rslora else 4))
    _, contracted, new, letters = linear.einsum_axes(base.equation)
    sizes = dict(zip(letters, before.shape, strict=True))
    stored = np.einsum(f"{contracted}{new}->{letters}", whole.reshape([sizes[a] for a in contracted + new]))
    expected = np.einsum(base.equation, x, stored)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    np.testing.assert_allclose(layer.whole_matrix(), whole, atol=1e-6)
    layer.merge()
    np.testing.assert_allclose(base.kernel, stored, atol=1e-6)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    np.testing.assert_allclose(layer.whole_matrix(), whole, atol=1e-6)
    layer.unmerge()
    np.testing.assert_allclose(base.kernel, before, atol=1e-6)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.slow
def test_dense_scales_neither_bias_nor_after_the_activation():
    dense = keras.layers.Dense(4, activation="relu", bias_initializer="ones")
    dense.build((None, 3))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    before = np.asarray(dense(x))
    layer = lora.LoRADense(dense, rank=2, alpha=2, dora=True)
    np.testing.assert_allclose(layer(x), before, atol=1e-6)
    filled(layer)
    whole = by_hand(matrix(layer), layer.lora_a, layer.lora_b, layer.magnitude, 1)
    np.testing.assert_allclose(layer(x), np.maximum(x @ whole + 1, 0), atol=1e-5)
    layer.merge()
    np.testing.assert_allclose(layer(x), np.maximum(x @ whole + 1, 0), atol=1e-5)


def test_an_einsum_bias_over_heads_is_not_scaled():
    base = keras.layers.EinsumDense("btd,ndh->btnh", (None, 3, 5), bias_axes="nh", bias_initializer="ones")
    base.build((None, None, 7))
    layer = filled(lora.LoRAEinsumDense(base, rank=2, alpha=2, dora=True))
    x = np.random.default_rng(0).normal(size=(2, 4, 7)).astype("float32")
    whole = by_hand(matrix(layer), layer.lora_a, layer.lora_b, layer.magnitude, 1)
    np.testing.assert_allclose(layer(x), (x @ whole).reshape(2, 4, 3, 5) + 1, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_layer_changes_no_bit_and_trains_three_arrays(dtype):
    dense = keras.layers.Dense(40, use_bias=False, dtype=dtype)
    dense.build((None, 30))
    x = np.random.default_rng(0).normal(size=(7, 30)).astype("float32")
    before = np.asarray(dense(x))
    layer = lora.LoRADense(dense, rank=2, dora=True)
    np.testing.assert_array_equal(layer(x), before)
    assert layer(x).dtype == dtype
    assert [v.name for v in layer.trainable_variables] == ["lora_a", "lora_b", "magnitude"]
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    np.testing.assert_allclose(layer.magnitude, np.linalg.norm(matrix(layer).astype("float64"), axis=0), rtol=1e-6)


@pytest.mark.slow
def test_a_gemma_begins_as_it_was_and_is_left_as_it_was(any_gemma):
    before = np.asarray(any_gemma.backbone(INPUTS))
    lora.apply_lora(any_gemma, rank=2, targets="all-linear", dora=True)
    assert all(layer.dora for layer in lora.lora_layers(any_gemma))
    np.testing.assert_allclose(any_gemma.backbone(INPUTS), before, atol=1e-6 * np.abs(before).max())
    tuned = np.asarray(fill_all(any_gemma).backbone(INPUTS))
    assert np.abs(tuned - before).max() > 1e-2
    lora.merge_lora(any_gemma)
    np.testing.assert_allclose(any_gemma.backbone(INPUTS), tuned, atol=2e-4)
    lora.unmerge_lora(any_gemma)
    np.testing.assert_allclose(any_gemma.backbone(INPUTS), tuned, atol=2e-4)
    lora.detach_lora(any_gemma)
    np.testing.assert_allclose(any_gemma.backbone(INPUTS), before, atol=2e-4)


def test_a_merged_update_stays_when_the_layers_go(gemma):
    lora.apply_lora(gemma, rank=2, targets="all-linear", dora=True)
    tuned = np.asarray(fill_all(gemma).backbone(INPUTS))
    lora.merge_lora(gemma)
    lora.detach_lora(gemma)
    np.testing.assert_allclose(gemma.backbone(INPUTS), tuned, atol=2e-4)


@pytest.mark.slow
def test_dead_columns_stay_dead_and_come_back_from_a_merge():
    """A column of zeros, and one whose magnitude is zero: nothing is divided by zero, nothing is lost."""
    dense = keras.layers.Dense(4, use_bias=False)
    dense.build((None, 6))
    kernel = np.asarray(dense.kernel).copy()
    kernel[:, 1] = 0
    dense.kernel.assign(kernel)
    layer = lora.LoRADense(dense, rank=2, dora=True)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    np.testing.assert_array_equal(layer(x), dense(x))
    values = [v.value for v in layer.trainable_variables]
    frozen = [v.value for v in layer.non_trainable_variables]
    gradients = jax.grad(lambda values: (layer.stateless_call(values, frozen, x)[0] ** 2).sum())(values)
    assert all(np.isfinite(g).all() for g in gradients)
    layer.lora_b.assign(np.random.default_rng(1).normal(size=(2, 4)))
    layer.magnitude.assign([2.0, 1.0, 0.0, 1e-30])
    expected = np.asarray(layer(x))
    assert not expected[:, 2].any()
    layer.merge()
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    layer.unmerge()
    np.testing.assert_allclose(dense.kernel, kernel, atol=1e-6)


def test_its_configuration_makes_the_same_layer():
    dense = keras.layers.Dense(4, activation="relu")
    dense.build((None, 3))
    layer = lora.LoRADense(dense, rank=2, alpha=3, dora=True, name="mlp")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.dora and again.get_config()["dora"] is True
    for new, old in zip(again.variables, filled(layer).variables, strict=True):
        assert new.name == old.name
        new.assign(old)
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(again(x), layer(x))


# --- gradients ------------------------------------------------------------------------------------------------------


def dense_layer():
    base = keras.layers.Dense(D_OUT, use_bias=False)
    base.build((None, D_IN))
    return lora.LoRADense(base, rank=RANK, alpha=ALPHA, dora=True, seed=1)


def einsum_layer():
    base = keras.layers.EinsumDense("btd,ndh->btnh", output_shape=(None, 2, D_OUT // 2))
    base.build((None, None, D_IN))
    return lora.LoRAEinsumDense(base, rank=RANK, alpha=ALPHA, dora=True, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense_layer, einsum_layer])
def test_gradients_are_finite_differences_at_a_constant_norm(make):
    layer = make()
    x, target, a, b = problem(1)
    kernel = matrix(layer).astype("float64")
    magnitude = np.random.default_rng(2).uniform(0.5, 2, D_OUT).astype("float32")
    values = [array.astype("float64") for array in (a, b, magnitude)]
    norms = np.linalg.norm(kernel + ALPHA / RANK * values[0] @ values[1], axis=0)

    def loss(a, b, magnitude):
        return 0.5 * ((magnitude / norms * (x @ (kernel + ALPHA / RANK * a @ b)) - target) ** 2).sum()

    gradients = jax.grad(lambda values: 0.5 * ((flat(layer, values, x) - target) ** 2).sum())([a, b, magnitude])
    for which, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            losses = []
            for move in (1e-5, -1e-5):
                moved = [array.copy() for array in values]
                moved[which][place] += move
                losses.append(loss(*moved))
            assert abs((losses[0] - losses[1]) / 2e-5 - gradient[place]) < 1e-3
    assert all(np.abs(gradient).max() > 0.1 for gradient in gradients)


def test_with_dropout_the_kernels_product_takes_the_dropped_inputs_in_what_dora_changes():
    """PEFT's formula: x W + (g - 1) d W + g s d A B, with d = dropout(x)."""
    layer = filled(dense_layer())
    x, *_ = problem()
    dropped = x * np.random.default_rng(3).choice([0.0, 2.0], x.shape).astype("float32")
    layer.dropout = lambda inputs, training: jnp.asarray(dropped) if training else inputs
    kernel, delta = matrix(layer), ALPHA / RANK * np.asarray(layer.lora_a) @ np.asarray(layer.lora_b)
    scale = np.asarray(layer.magnitude) / np.linalg.norm(kernel + delta, axis=0)
    expected = x @ kernel + (scale - 1) * (dropped @ kernel) + scale * (dropped @ delta)
    np.testing.assert_allclose(layer(x, training=True), expected, atol=1e-5)
    np.testing.assert_allclose(layer(x), x @ (scale * (kernel + delta)), atol=1e-5)


@pytest.mark.slow
def test_keras_dropout_drops_while_training_only():
    dense = keras.layers.Dense(4)
    dense.build((None, 50))
    layer = filled(lora.LoRADense(dense, rank=2, dropout=0.5, dora=True, seed=0))
    x = np.ones((1, 50), "float32")
    np.testing.assert_array_equal(layer(x, training=False), layer(x, training=False))
    assert np.abs(np.asarray(layer(x, training=True)) - np.asarray(layer(x))).max() > 1e-3


@pytest.mark.slow
def test_no_kernel_is_kept_for_the_backward_pass():
    """Besides the kernel itself, which the product's gradient needs, nothing of its size is kept."""
    for packs in (False, True):
        base = keras.layers.Dense(128, use_bias=False, name="dense")
        base.build((None, 256))
        if packs:
            encoding = qlora.encoding_for("nf4", (128, 256))
            parts = encoding.encode(np.ascontiguousarray(np.asarray(base.kernel).T))
            plain, base = base, qlora.PackedDense.from_config(base.get_config())
            base.pack(plain, encoding, parts)
        layer = filled(lora.LoRADense(base, rank=2, dora=True))
        frozen = [v.value for v in layer.non_trainable_variables]
        _, pull = jax.vjp(
            lambda values, x, layer=layer, frozen=frozen: layer.stateless_call(values, frozen, x)[0],
            [v.value for v in layer.trainable_variables],
            jnp.ones((4, 256)),
        )
        large = [leaf for leaf in jax.tree.leaves(pull) if leaf.nbytes >= 4 * 128 * 256]
        assert len(large) == (0 if packs else 1)


# --- training and generating ----------------------------------------------------------------------------------------


def one_step(model, **named):
    """Loss and what an SGD step of rate 1 adds to each trained array."""
    lora.apply_lora(model, rank=2, targets="all-linear", dora=True)
    fill_all(model)
    tuner = FineTuner(model, **named)
    tuner.compile(keras.optimizers.SGD(1.0))
    before = [np.asarray(v) for v in tuner.trainable_variables]
    rng = np.random.default_rng(1)
    x = {"token_ids": rng.integers(5, 300, (2, 12)), "padding_mask": np.ones((2, 12), "int32")}
    loss = float(np.ravel(tuner.train_on_batch(x, rng.integers(5, 300, (2, 12))))[0])
    return loss, [np.asarray(v) - old for v, old in zip(tuner.trainable_variables, before, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_remat_changes_nothing(generation):
    (loss, steps), (again, recomputed) = (one_step(tiny_gemma(generation), remat=flag) for flag in (False, True))
    assert again == pytest.approx(loss, rel=1e-5) and len(steps) == 3 * 14
    for one, other in zip(recomputed, steps, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(np.abs(other).max(), 1))


@pytest.mark.slow
def test_mixed_precision_points_where_float32_does(gemma):
    (loss, steps), (again, mixed) = one_step(tiny_gemma()), one_step(gemma, mixed_precision=True)
    assert again == pytest.approx(loss, rel=1e-2) and again != loss
    one, other = (np.concatenate([step.ravel() for step in group]) for group in (steps, mixed))
    assert 0.999 < one @ other / np.linalg.norm(one) / np.linalg.norm(other) < 1 - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_generation_is_that_of_the_merged_model(generation):
    model = tiny_gemma(generation)
    prompts = [np.array([5, 9, 11], "int32"), np.array([40, 41, 42, 43, 44], "int32")]
    base = generate_tokens(model, prompts, [1], 9)
    fill_all(lora.apply_lora(model, rank=2, targets="all-linear", dora=True))
    found = generate_tokens(model, prompts, [1], 9)
    lora.merge_lora(model)
    merged = generate_tokens(model, prompts, [1], 9)
    assert [list(row) for row in found] == [list(row) for row in merged] != [list(row) for row in base]
