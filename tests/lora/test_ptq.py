"""Kernels as matrices against the layers' own outputs; what is rounded, what is not, and that it comes back."""

import jax
import keras
import ml_dtypes
import numpy as np
import pytest

from gemma_lora.lora import TARGETS, apply_lora, ptq
from gemma_lora.quantization import nf4

BLOCKS = 2  # of the tiny Gemma


def mlp(seed=0):
    """A network of two layers with weights that are not round in any format."""
    model = keras.Sequential([keras.layers.Input((128,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(3)])
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(0, 0.3, array.shape).astype(np.float32) for array in model.get_weights()])
    return model


def values(model):
    return {variable.path: np.asarray(variable.value) for variable in model.variables}


def changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


# --- kernels as matrices -----------------------------------------------------------------------------------


def test_a_row_of_the_matrix_gives_an_output_of_the_layer(any_gemma):
    found = [kernel for kernel in ptq.kernels(any_gemma) if kernel.kind in TARGETS]
    assert len(found) == 7 * BLOCKS
    rng = np.random.default_rng(0)
    for kernel in found:
        matrix = kernel.to_matrix(np.asarray(kernel.variable))  # (d_out, d_in)
        shape = (1, 5, 4, 8) if kernel.kind == "attention_output" else (1, 5, matrix.shape[1])
        x = rng.normal(size=shape).astype(np.float32)
        assert kernel.layer.activation is keras.activations.linear
        expected = np.asarray(kernel.layer(x)).reshape(5, -1)
        np.testing.assert_allclose(x.reshape(5, -1) @ matrix.T, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(kernel.to_kernel(matrix), np.asarray(kernel.variable))


def test_each_kernel_is_found_once_by_kind(gemma):
    found = ptq.kernels(gemma, ptq.KINDS)
    assert len({id(kernel.variable) for kernel in found}) == len(found) == 7 * BLOCKS + 1
    assert [kernel.kind for kernel in ptq.kernels(gemma, ["gate"])] == ["gate"] * BLOCKS
    (embedding,) = ptq.kernels(gemma, ["embedding"])
    assert embedding.to_matrix(np.asarray(embedding.variable)).shape == (300, 16)  # a row a token
    assert "embedding" not in {kernel.kind for kernel in ptq.kernels(gemma)}


def test_base_kernels_are_found_beside_lora(gemma):
    plain = {id(kernel.variable) for kernel in ptq.kernels(gemma)}
    apply_lora(gemma, rank=2)
    assert {id(kernel.variable) for kernel in ptq.kernels(gemma)} == plain


# --- rounding, and the way back ----------------------------------------------------------------------------


def by_hand(kernel, bits, group):
    """int per channel or per block of 64 inputs, written out for a Dense kernel (d_in, d_out)."""
    result, top = np.zeros_like(kernel), 2 ** (bits - 1) - 1
    for output in range(kernel.shape[1]):
        for first in range(0, len(kernel), group or len(kernel)):
            part = kernel[first : first + (group or len(kernel)), output]
            step = np.abs(part).max() / top
            result[first : first + len(part), output] = np.round(part / step) * step
    return result


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [None, 64])
def test_the_model_computes_with_decoded_kernels(bits, group):
    model = mlp()
    first, bias, second, last_bias = model.get_weights()
    x = np.random.default_rng(1).normal(size=(7, 128)).astype(np.float32)
    hidden = np.maximum(x @ by_hand(first, bits, group) + bias, 0)
    expected = hidden @ by_hand(second, bits, group) + last_bias
    options = {"block_size": group} if group else {"axis": 0}
    with ptq.quantize_kernels(model, ptq.integers(bits, **options)):
        np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_only_what_is_named_changes_and_comes_back_bit_by_bit(gemma):
    before = values(gemma)
    with ptq.quantize_kernels(gemma, ptq.integers(3), ["down", "embedding"]) as quantized:
        named = {kernel.variable.path for kernel in ptq.kernels(gemma, ["down", "embedding"])}
        assert changed(before, values(gemma)) == named and len(named) == BLOCKS + 1
        assert quantized.parameters == sum(before[path].size for path in named)
    assert not changed(before, values(gemma))
    done = ptq.quantize_kernels(gemma, ptq.integers(3))
    assert changed(before, values(gemma))
    done.restore()
    done.restore()
    assert not changed(before, values(gemma))


def test_the_model_is_itself_again_after_an_error():
    model = mlp()
    before, calls = values(model), []

    def fails_at_the_second(matrix):
        calls.append(matrix.shape)
        if len(calls) == 2:
            raise RuntimeError("no more")
        return 0 * matrix, 1

    with pytest.raises(RuntimeError, match="no more"):
        ptq.quantize_kernels(model, fails_at_the_second)
    assert len(calls) == 2 and not changed(before, values(model))
    with pytest.raises(KeyError), ptq.quantize_kernels(model, ptq.integers(2)):
        assert changed(before, values(model))
        raise KeyError
    assert not changed(before, values(model))


def test_bytes_are_codes_and_scales():
    model = mlp()  # 128 x 6 and 6 x 3
    sizes = {
        "tensor": (ptq.integers(8), 768 + 4 + 18 + 4),
        "channel": (ptq.integers(4, axis=0), 384 + 4 * 6 + 9 + 4 * 3),
        "block": (ptq.integers(4, block_size=64), 384 + 4 * 12 + 9 + 4 * 3),
        "affine": (ptq.integers(8, symmetric=False), 768 + 5 + 18 + 5),
        "bfloat16": (ptq.floats("bfloat16"), 2 * 786),
    }
    for quantizer, expected in sizes.values():
        with ptq.quantize_kernels(model, quantizer) as quantized:
            assert quantized.nbytes == expected and quantized.parameters == 786
            assert quantized.bits_a_weight == pytest.approx(8 * expected / 786)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_are_ml_dtypes(dtype):
    x = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    decoded, size = ptq.floats(dtype)(x)
    short = x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    np.testing.assert_array_equal(decoded, short.astype(np.float32))
    assert size == short.nbytes and decoded.dtype == np.float32


def test_nf4_takes_the_nearest_level_of_each_block():
    x = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    decoded, size = ptq.nf4_blocks()(x)
    blocks = x.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - nf4.CODEBOOK).argmin(axis=-1)
    np.testing.assert_allclose(decoded, (nf4.CODEBOOK[nearest] * largest).reshape(x.shape), rtol=1e-5, atol=1e-7)
    assert size == x.size // 2 + 4 * 6
    assert ptq.nf4_blocks(double_quant=True)(x)[1] < size + 6


def test_a_kernel_keeps_its_dtype():
    half = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, dtype="bfloat16")])
    before = values(half)
    with ptq.quantize_kernels(half, ptq.integers(2)):
        assert half.layers[0].kernel.dtype == "bfloat16"
    assert not changed(before, values(half))


# --- inputs ------------------------------------------------------------------------------------------------


def test_inputs_are_watched_and_changed():
    model, seen = mlp(), []
    x = np.random.default_rng(1).normal(size=(4, 128)).astype(np.float32)
    plain = np.asarray(model(x))
    first, bias, second, last_bias = model.get_weights()

    def halve(kernel, inputs):
        seen.append((kernel.variable.path, np.asarray(inputs)))
        return inputs / 2

    with ptq.mapped_inputs(model, halve):
        halved = np.asarray(model(x))
    hidden = np.maximum(x / 2 @ first + bias, 0)
    np.testing.assert_allclose(halved, hidden / 2 @ second + last_bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen[0][1], x)
    np.testing.assert_allclose(seen[1][1], hidden, rtol=1e-4, atol=1e-5)
    assert [path for path, _ in seen] == [layer.kernel.path for layer in model.layers]
    np.testing.assert_array_equal(model(x), plain)


def test_inputs_are_themselves_again_after_an_error():
    model = mlp()
    x = np.ones((2, 128), np.float32)
    plain = np.asarray(model(x))
    with pytest.raises(KeyError), ptq.mapped_inputs(model, lambda kernel, inputs: 0 * inputs):
        assert not np.allclose(model(x), plain)
        raise KeyError
    np.testing.assert_array_equal(model(x), plain)


@pytest.mark.slow
def test_every_linear_layer_of_a_gemma_has_its_input_mapped_under_jit(gemma):
    tokens = {"token_ids": np.arange(12).reshape(2, 6), "padding_mask": np.ones((2, 6), np.int32)}
    seen = []

    def watch(kernel, inputs):
        seen.append(kernel.kind)
        return inputs

    plain = np.asarray(gemma.backbone(tokens))
    with ptq.mapped_inputs(gemma, watch):
        traced = jax.jit(gemma.backbone)(tokens)
    np.testing.assert_allclose(traced, plain, rtol=1e-4, atol=1e-4)
    assert sorted(seen) == sorted([*TARGETS] * BLOCKS)


# --- bad input ---------------------------------------------------------------------------------------------


def test_bad_kinds_are_named(gemma):
    for kinds in (["head"], [], ["query", "head"]):
        with pytest.raises(ValueError, match="`kinds` must name some layers among query, .*embedding. Received"):
            ptq.kernels(gemma, kinds)
    with pytest.raises(ValueError, match="no linear layer of kind gate"):
        ptq.kernels(mlp(), ["gate"])
    with pytest.raises(ValueError, match="no linear layer of kind Dense"):
        ptq.quantize_kernels(keras.Sequential([keras.layers.Input((3,)), keras.layers.ReLU()]), ptq.integers(8))
    with pytest.raises(ValueError, match="must not name embedding"), ptq.mapped_inputs(gemma, None, ["embedding"]):
        pass


def test_a_quantizer_that_changes_the_shape_is_refused():
    model = mlp()
    before = values(model)
    with pytest.raises(ValueError, match=r"`quantizer` must keep the shape \(6, 128\). Received: \(128, 6\)"):
        ptq.quantize_kernels(model, lambda matrix: (matrix.T, 1))
    assert not changed(before, values(model))
