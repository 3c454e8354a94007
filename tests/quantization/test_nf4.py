"""NF4 against the published numbers, a nearest-level search, the paper's arithmetic, and properties."""

import math

import numpy as np
import pytest

from gemma_lora.quantization import nf4

#: Dettmers et al. 2023, appendix E.
PUBLISHED = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""


@pytest.fixture
def weights():
    return np.random.default_rng(7).normal(0, 0.05, (96, 1280)).astype(np.float32)


def by_search(rows, levels):
    """The level nearest to each number by trying all of them: the lower in a tie."""
    return np.abs(rows[..., None] - levels).argmin(-1)


def test_the_codebook_is_the_papers_to_the_last_bit():
    assert np.array_equal(nf4.CODEBOOK, np.array(PUBLISHED.split(), np.float32))


def test_codes_say_more_than_int4s_do_on_normal_numbers(weights):
    from gemma_lora.quantization.integers import quantize

    def entropy(codes):
        shares = np.bincount(codes.ravel()) / codes.size
        return -np.sum(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares)))

    packed = nf4.quantize(weights).packed
    bits = entropy(np.concatenate([packed >> 4, packed & 15]))
    assert 3.8 < bits < 4  # codes are used about alike: 4 bits if exactly
    assert bits > entropy(quantize(weights, 4, block_size=64).qvalue + 8) + 0.1


def test_the_dynamic_code_is_symmetric_but_for_one_and_finest_near_zero():
    code = nf4.DYNAMIC_CODE
    assert code.shape == (256,) and np.all(np.diff(code) > 0) and {0.0, 1.0} <= set(code.tolist())
    assert np.array_equal(code[:127], -code[128:255][::-1])
    # The centres of 64 intervals between 0.1 and 1 are the largest ones: 0.9 / 64 apart, the last half of that below 1.
    assert np.allclose(np.diff(code[192:255]), 0.9 / 64, rtol=1e-4)
    assert math.isclose(code[254], 1 - 0.9 / 128, rel_tol=1e-6)
    assert math.isclose(code[128], 0.55e-6, rel_tol=1e-5)  # the smallest: the centre of 0.1 … 1 times 1e-6


@pytest.mark.parametrize("block_size", [64, 128])
def test_codes_are_the_nearest_levels_and_packed_high_nibble_first(weights, block_size):
    tensor = nf4.quantize(weights, block_size)
    rows = weights.reshape(-1, block_size)
    scales = np.abs(rows).max(1)
    assert np.array_equal(tensor.scales, scales)
    codes = by_search(rows * (1 / scales)[:, None], nf4.CODEBOOK).ravel()
    assert np.array_equal(tensor.packed >> 4, codes[0::2])
    assert np.array_equal(tensor.packed & 15, codes[1::2])
    expected = (nf4.CODEBOOK[codes].reshape(rows.shape) * scales[:, None]).reshape(weights.shape)
    assert np.array_equal(nf4.dequantize(tensor), expected)


def test_zero_and_the_largest_of_a_block_are_kept_and_the_rest_lies_within_half_a_gap(weights):
    weights[:, ::7] = 0
    back = nf4.dequantize(nf4.quantize(weights))
    assert np.all(back[:, ::7] == 0)
    rows, decoded = weights.reshape(-1, 64), back.reshape(-1, 64)
    largest = np.abs(rows).argmax(1)[:, None]
    assert np.array_equal(np.take_along_axis(rows, largest, 1), np.take_along_axis(decoded, largest, 1))
    half_gap = np.diff(nf4.CODEBOOK).max() / 2
    assert np.all(np.abs(rows - decoded) <= half_gap * np.abs(rows).max(1, keepdims=True) * 1.000001)


def test_double_quantization_takes_off_the_mean_and_keeps_scales_in_eight_bits(weights):
    plain, double = nf4.quantize(weights), nf4.quantize(weights, double_quant=True)
    assert np.array_equal(plain.packed, double.packed)
    assert double.scales.dtype == np.uint8 and double.double_quant and not plain.double_quant
    offset = plain.scales.mean()
    assert double.offset == pytest.approx(float(offset), rel=1e-6)
    for start in range(0, plain.scales.size, 256):
        centred = plain.scales[start : start + 256] - offset
        largest = np.abs(centred).max()
        assert double.scale_scales[start // 256] == pytest.approx(largest, rel=1e-5)
        codes = by_search(centred / largest, nf4.DYNAMIC_CODE)
        assert np.mean(codes == double.scales[start : start + 256]) > 0.995  # rounding may decide a tie otherwise
    error = np.abs(nf4.block_scales(double) - plain.scales)
    assert error.max() <= 0.5 * np.diff(nf4.DYNAMIC_CODE).max() * double.scale_scales.max() * 1.001
    assert error.max() < 0.01 * plain.scales.mean()


def test_bits_a_weight_are_the_papers():
    x = np.ones((256, 64, 64), np.float32)
    assert nf4.quantize(x).bits == 4 + 32 / 64
    expected = 4 + 8 / 64 + 32 / (64 * 256)
    assert nf4.quantize(x, double_quant=True).bits == pytest.approx(expected, abs=1e-4)  # and 4 bytes of offset
    assert round(expected, 3) == 4.127


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 43), (2, 65, 5)])
def test_any_length_even_where_bytes_and_blocks_are_not_filled(shape, double_quant):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    back = nf4.dequantize(nf4.quantize(x, double_quant=double_quant))
    assert back.shape == shape
    assert np.abs(back - x).max() <= 0.16 * np.abs(x).max()


def test_zeros_stay_zeros():
    for double_quant in (False, True):
        assert not nf4.dequantize(nf4.quantize(np.zeros((2, 64)), double_quant=double_quant)).any()


def test_it_errs_less_than_int4_with_the_same_blocks_on_normal_numbers(weights):
    from gemma_lora.quantization.integers import dequantize, quantize

    def error(back):
        return np.mean((back - weights) ** 2)

    assert error(nf4.dequantize(nf4.quantize(weights))) < 0.85 * error(dequantize(quantize(weights, 4, block_size=64)))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((np.float32(1),), "rank 1"),
        ((np.zeros(0),), "not empty"),
        ((np.array([1, np.nan]),), "finite"),
        ((np.ones(4), 63), "even integer"),
        ((np.ones(4), True), "even integer"),
        ((np.ones(4), 64.0), "64.0"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        nf4.quantize(*arguments)
