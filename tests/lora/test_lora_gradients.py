"""The gradients that LoRA layers train with: against the formulas written out, finite differences and plain numpy."""

import jax
import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.layers import linear

TOKENS, D_IN, D_OUT, RANK, ALPHA = 5, 6, 8, 2, 3.0
SCALING = {False: ALPHA / RANK, True: ALPHA / np.sqrt(RANK)}


def dense_layer(rslora=False):
    base = keras.layers.Dense(D_OUT, use_bias=False)
    base.build((None, D_IN))
    return lora.LoRADense(base, rank=RANK, alpha=ALPHA, rslora=rslora, seed=1)


def einsum_layer(rslora=False):
    base = keras.layers.EinsumDense("btd,ndh->btnh", output_shape=(None, 2, D_OUT // 2))
    base.build((None, None, D_IN))
    return lora.LoRAEinsumDense(base, rank=RANK, alpha=ALPHA, rslora=rslora, seed=1)


def flat(layer, values, x):
    """The layer's output as (tokens, d_out), as a function of A and B."""
    shaped = x if isinstance(layer, lora.LoRADense) else x[None]
    frozen = [v.value for v in layer.non_trainable_variables]
    return layer.stateless_call(values, frozen, shaped)[0].reshape(TOKENS, D_OUT)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=(TOKENS, D_IN)), rng.normal(size=(TOKENS, D_OUT))
    a, b = rng.normal(size=(D_IN, RANK)), rng.normal(size=(RANK, D_OUT))
    return [array.astype("float32") for array in (x, target, a, b)]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [dense_layer, einsum_layer])
def test_gradients_are_the_formulas(make, rslora):
    layer = make(rslora)
    x, target, a, b = problem()
    kernel = np.asarray(linear.kernel_matrix(layer.base))
    gradients = jax.grad(lambda values: 0.5 * ((flat(layer, values, x) - target) ** 2).sum())([a, b])
    s = SCALING[rslora]
    dy = x @ kernel + s * x @ a @ b - target
    np.testing.assert_allclose(gradients[0], s * x.T @ (dy @ b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1], s * (x @ a).T @ dy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [dense_layer, einsum_layer])
def test_gradients_are_finite_differences(make):
    layer = make()
    x, target, a, b = problem(1)
    kernel = np.asarray(linear.kernel_matrix(layer.base), "float64")

    def loss(a, b):  # in float64, so that a difference of losses keeps its digits
        return 0.5 * ((x @ (kernel + ALPHA / RANK * a @ b) - target) ** 2).sum()

    gradients = jax.grad(lambda values: 0.5 * ((flat(layer, values, x) - target) ** 2).sum())([a, b])
    for which, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            losses = []
            for move in (1e-5, -1e-5):
                moved = [a.astype("float64"), b.astype("float64")]
                moved[which][place] += move
                losses.append(loss(*moved))
            assert abs((losses[0] - losses[1]) / 2e-5 - gradient[place]) < 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_first_step_moves_b_only_and_the_second_moves_a(optimizer):
    layer = dense_layer()
    x, target, _, _ = problem(2)
    a, b = np.asarray(layer.lora_a), np.asarray(layer.lora_b)
    kernel = np.asarray(layer.base.kernel)
    model = keras.Sequential([layer])
    model.compile(optimizer, loss="mse")
    model.train_on_batch(x, target)
    np.testing.assert_array_equal(layer.lora_a, a)
    assert np.all(np.asarray(layer.lora_b) != b)
    model.train_on_batch(x, target)
    assert np.any(np.asarray(layer.lora_a) != a)
    np.testing.assert_array_equal(layer.base.kernel, kernel)


def test_a_step_of_gradient_descent_is_the_full_gradient_projected_onto_a():
    layer = dense_layer()
    x, target, _, _ = problem(3)
    a, kernel = np.asarray(layer.lora_a), np.asarray(layer.base.kernel)
    dy = 2 * (x @ kernel - target) / target.size  # keras's mean squared error divides by all numbers
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    model.train_on_batch(x, target)
    projected = -0.1 * (ALPHA / RANK) ** 2 * a @ a.T @ (x.T @ dy)
    np.testing.assert_allclose(layer.delta(), projected, rtol=1e-4, atol=1e-6)
    assert np.linalg.matrix_rank(np.asarray(layer.delta()), tol=1e-6) == RANK
