"""LoRA layers against a dense update, on plain Keras layers and inside Gemma."""

import itertools

import keras
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.layers import linear


def filled(layer, seed=0):
    """Gives B values, so that the layer does something."""
    rng = np.random.default_rng(seed)
    layer.lora_b.assign(rng.normal(0, 0.1, layer.lora_b.shape))
    return layer


def einsum_layer(equation="btd,ndh->btnh", output_shape=(None, 3, 5), width=7):
    layer = keras.layers.EinsumDense(equation, output_shape=output_shape)
    layer.build((None, None, width) if equation.startswith("btd") else (None, None, 3, 5))
    return layer


CASES = {
    "query": lambda: (einsum_layer(), (2, 4, 7)),
    "output": lambda: (einsum_layer("btnh,nhd->btd", (None, 7)), (2, 4, 3, 5)),
    "mlp": lambda: (einsum_layer("btd,df->btf", (None, 9)), (2, 4, 7)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_einsum_update_is_a_dense_update(case, rslora):
    base, shape = CASES[case]()
    kernel = np.asarray(base.kernel)
    layer = filled(lora.LoRAEinsumDense(base, rank=4, alpha=6, rslora=rslora, seed=1))
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    # By hand: scaling * A B as a matrix, brought to the kernel's axes by einsum's own letters.
    scaling = 6 / (np.sqrt(4) if rslora else 4)
    matrix = scaling * np.asarray(layer.lora_a) @ np.asarray(layer.lora_b)
    _, contracted, new, letters = linear.einsum_axes(base.equation)
    sizes = dict(zip(letters, kernel.shape, strict=True))
    update = np.einsum(f"{contracted}{new}->{letters}", matrix.reshape([sizes[a] for a in contracted + new]))
    expected = np.einsum(base.equation, x, kernel + update)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    layer.merge()
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    np.testing.assert_allclose(base.kernel, kernel + update, atol=1e-6)
    layer.unmerge()
    np.testing.assert_allclose(base.kernel, kernel, atol=1e-6)
    np.testing.assert_allclose(layer.to_matrix(linear.stored(base, matrix)), matrix)


def test_dense_keeps_bias_and_activation():
    dense = keras.layers.Dense(4, activation="relu", bias_initializer="ones")
    dense.build((None, 3))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    kernel = np.asarray(dense.kernel)
    layer = filled(lora.LoRADense(dense, rank=2, alpha=2))
    expected = np.maximum(x @ (kernel + np.asarray(layer.lora_a) @ np.asarray(layer.lora_b)) + 1, 0)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_a_new_layer_changes_nothing_and_trains_only_a_and_b():
    dense = keras.layers.Dense(4)
    dense.build((None, 3))
    x = np.ones((2, 3), "float32")
    before = np.asarray(dense(x))
    layer = lora.LoRADense(dense, rank=2)
    np.testing.assert_array_equal(layer(x), before)
    assert [v.name for v in layer.trainable_variables] == ["lora_a", "lora_b"]


def test_start_of_a_is_pefts():
    dense = keras.layers.Dense(64)
    dense.build((None, 400))
    a = np.asarray(lora.LoRADense(dense, rank=32, seed=0).lora_a)
    assert abs(a).max() <= 1 / 20 and abs(a.std() - 1 / 20 / np.sqrt(3)) < 2e-3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dora", [False, True])
def test_float64_arrays_are_computed_in_float32(dora):
    base, shape = CASES["query"]()
    layer = filled(lora.LoRAEinsumDense(base, rank=2, alpha=2, dora=dora))
    x = np.random.default_rng(0).normal(size=shape)
    weights = ([v.value for v in variables] for variables in (layer.trainable_variables, layer.non_trainable_variables))
    output, _ = layer.stateless_call(*weights, x)  # as it is, without the conversion in `layer(x)`
    np.testing.assert_array_equal(output, layer(x.astype("float32")))
    assert output.dtype == "float32"


def test_dropout_only_while_training():
    dense = keras.layers.Dense(4)
    dense.build((None, 50))
    layer = filled(lora.LoRADense(dense, rank=2, dropout=0.5, seed=0))
    x = np.ones((1, 50), "float32")
    still = np.asarray(layer(x, training=False))
    np.testing.assert_array_equal(layer(x, training=False), still)
    assert np.abs(np.asarray(layer(x, training=True)) - still).max() > 1e-3


@pytest.mark.parametrize("equation", ["btd,bdh->bth", "btd,dh->bht", "btd,hd->tbh"])
def test_equations_without_a_matrix_are_refused(equation):
    with pytest.raises(ValueError, match="matrix product"):
        linear.einsum_axes(equation)


SUBSETS = [s for n in (1, 2, 7) for s in itertools.combinations(lora.TARGETS, n)][::4]


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_any_subset_of_targets(gemma, targets):
    x = {"token_ids": np.arange(12)[None] + 5, "padding_mask": np.ones((1, 12), "int32")}
    before = np.asarray(gemma.backbone(x))
    lora.apply_lora(gemma, rank=2, targets=targets)
    layers = lora.lora_layers(gemma)
    assert len(layers) == 2 * len(targets)
    assert len(gemma.trainable_variables) == 2 * len(layers)
    np.testing.assert_allclose(gemma.backbone(x), before, atol=1e-5)
    for number, layer in enumerate(layers):
        filled(layer, number)
    with_adapter = np.asarray(gemma.backbone(x))
    assert np.abs(with_adapter - before).max() > 1e-3
    lora.merge_lora(gemma)
    np.testing.assert_allclose(gemma.backbone(x), with_adapter, atol=2e-4)
    lora.unmerge_lora(gemma)
    lora.detach_lora(gemma)
    assert not lora.lora_layers(gemma)
    np.testing.assert_allclose(gemma.backbone(x), before, atol=2e-4)


def test_works_on_every_gemma(any_gemma):
    lora.apply_lora(any_gemma, rank=2, targets="all-linear")
    assert len(lora.lora_layers(any_gemma)) == 14


@pytest.mark.parametrize("targets", ["querry", (), ("query", "nonsense")])
def test_unknown_targets_are_named(gemma, targets):
    with pytest.raises(ValueError, match="targets"):
        lora.apply_lora(gemma, targets=targets)
    assert not lora.lora_layers(gemma)


def test_a_second_apply_is_refused(gemma):
    lora.apply_lora(gemma, rank=2)
    with pytest.raises(ValueError, match="already"):
        lora.apply_lora(gemma, rank=2)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_bad_ranks_are_named(rank):
    dense = keras.layers.Dense(4)
    dense.build((None, 3))
    with pytest.raises(ValueError, match="rank"):
        lora.LoRADense(dense, rank=rank)
