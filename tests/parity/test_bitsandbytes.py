"""NF4, code by code and scale by scale, as bitsandbytes makes it: random matrices and Gemma's own."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from gemma_lora.gemma import gguf
from gemma_lora.gemma import load as gemma
from gemma_lora.quantization import nf4


def of_bitsandbytes(x: np.ndarray, block_size: int, double_quant: bool):
    """bitsandbytes' packed bytes and constants of an array, in C order."""
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return bnb.quantize_4bit(tensor, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


def test_the_codebook_is_bitsandbytes_to_the_last_bit():
    _, state = of_bitsandbytes(np.ones((1, 64)), 64, False)
    np.testing.assert_array_equal(state.code.numpy(), nf4.CODEBOOK)


def test_the_dynamic_code_is_bitsandbytes():
    _, state = of_bitsandbytes(np.random.default_rng(0).normal(size=(256, 64)), 64, True)
    np.testing.assert_allclose(state.state2.code.numpy(), nf4.DYNAMIC_CODE, rtol=1.5e-7)  # torch adds in float32


def gemmas(name: str) -> np.ndarray:
    return gguf.read_tensor(gguf.read_index(gemma.builtin_gguf()), name)


def matrices():
    rng = np.random.default_rng(0)
    yield "normal", rng.normal(size=(48, 640))
    yield "uniform", rng.uniform(-3, 3, (64, 256))
    yield "heavy tails", rng.standard_t(2, (64, 256)) * 1e-3
    yield "outlier", np.where(np.arange(64 * 256).reshape(64, 256) == 77, 500.0, rng.normal(size=(64, 256)))
    yield "a block of zeros", np.where(np.arange(64 * 64).reshape(64, 64) < 64, 0.0, rng.normal(size=(64, 64)))
    yield "Gemma's down", gemmas("blk.0.ffn_down.weight")
    yield "Gemma's query", gemmas("blk.9.attn_q.weight")


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_and_scales_are_bitsandbytes(block_size, double_quant):
    for name, x in matrices():
        packed, state = of_bitsandbytes(x, block_size, double_quant)
        ours = nf4.quantize(x, block_size, double_quant)
        np.testing.assert_array_equal(ours.packed, packed.numpy().ravel(), err_msg=name)
        if double_quant:
            second = state.state2
            assert ours.offset == pytest.approx(float(state.offset), rel=1e-6), name
            np.testing.assert_allclose(ours.scale_scales, second.absmax.numpy().ravel(), rtol=1e-5, err_msg=name)
            theirs = state.absmax.numpy().ravel()
            # They may differ only where a scale lies half-way between two levels, to float32's rounding.
            relative = (nf4.quantize(x, block_size).scales - ours.offset) / np.repeat(ours.scale_scales, 256)[
                : theirs.size
            ]
            off = [np.abs(relative - nf4.DYNAMIC_CODE[codes]) for codes in (ours.scales, theirs)]
            assert np.abs(off[0] - off[1]).max() < 1e-4 and np.mean(ours.scales == theirs) > 0.98, name
        else:
            np.testing.assert_array_equal(ours.scales, state.absmax.numpy().ravel(), err_msg=name)


@pytest.mark.parametrize("double_quant", [False, True])
def test_decoded_numbers_are_bitsandbytes(double_quant):
    for name, x in matrices():
        packed, state = of_bitsandbytes(x, 64, double_quant)
        theirs = bnb.dequantize_4bit(packed, state).numpy()
        tensor = nf4.quantize(x, 64, double_quant)
        ours = nf4.dequantize(tensor)
        # A scale that fell on the other side of a border is off by a step of the 8-bit type, at most 0.0142.
        tolerance = 0.0142 * tensor.scale_scales.max() if double_quant else 1e-6
        np.testing.assert_allclose(ours, theirs, atol=tolerance, err_msg=name)
        assert np.mean(np.abs(ours - theirs) <= 1e-6 * np.abs(x).max()) > 0.98, name
