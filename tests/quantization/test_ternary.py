"""ternary.py against exact fractions, Keras's quantizer and the package's own at two bits."""

from fractions import Fraction

import keras
import numpy as np
import pytest

from gemma_lora.quantization.integers import dequantize, quantize
from gemma_lora.quantization.ternary import (
    activation_quantize,
    pack_ternary,
    pack_two_bits,
    ternary_quantize,
    unpack_ternary,
    unpack_two_bits,
)

SEEDS = range(8)


def exact_codes(kernel):
    """Absmean in fractions: |w| / γ rounded, ties to the even number, and clipped."""
    rows = [[Fraction(int(w)) for w in row] for row in kernel]
    numbers = [abs(w) for row in rows for w in row]
    scale = sum(numbers) / len(numbers)
    return [[max(-1, min(1, round(w / scale))) for w in row] for row in rows], scale


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_codes_are_those_of_exact_fractions(seed):
    rng = np.random.default_rng(seed)
    kernel = rng.integers(-9, 10, rng.integers(1, 9, 2))
    kernel[0, 0] = 3  # not all zeros
    tensor = ternary_quantize(kernel)
    codes, scale = exact_codes(kernel)
    assert tensor.qvalue.tolist() == codes and tensor.qvalue.dtype == np.int8
    assert np.isclose(float(tensor.scale[0, 0]), float(scale)) and tensor.scale.shape == (1, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_the_symmetric_quantizer_at_two_bits_with_another_range(seed):
    kernel = np.random.default_rng(seed).normal(0, 0.05, (40, 30)).astype("float32")
    mean = float(np.abs(kernel).mean())
    tensor, other = ternary_quantize(kernel), quantize(kernel, bits=2, value_range=(-mean, mean))
    assert np.array_equal(tensor.qvalue, other.qvalue) and np.allclose(tensor.scale, other.scale)
    assert np.allclose(dequantize(tensor), dequantize(other)) and tensor.nbytes == other.nbytes


def test_the_thresholds_lie_at_half_of_the_mean():
    kernel = np.array([[2.0, -2.0, 0.99, -0.99, 1.01, -1.01, 4.0, 4.0]])  # γ = 2
    assert np.isclose(np.abs(kernel).mean(), 2.0)
    assert ternary_quantize(kernel).qvalue.tolist() == [[1, -1, 0, 0, 1, -1, 1, 1]]


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_a_factor_goes_into_the_scale_alone(factor):
    kernel = np.random.default_rng(1).normal(size=(16, 16))
    one, other = ternary_quantize(kernel), ternary_quantize(factor * kernel)
    assert np.array_equal(one.qvalue, other.qvalue)
    assert np.allclose(other.scale, factor * one.scale)


def test_of_normal_weights_the_expected_share_becomes_zero():
    kernel = np.random.default_rng(0).normal(size=(1000, 400))
    # mean |w| = √(2/π) σ, so the share is P(|w| ≤ √(2/π)/2 σ) = erf(1/(2√π)) = 0.3101
    assert abs(np.mean(ternary_quantize(kernel).qvalue == 0) - 0.3101) < 0.003


def test_zeros_stay_zeros():
    tensor = ternary_quantize(np.zeros((3, 2)))
    assert not tensor.qvalue.any() and not dequantize(tensor).any() and tensor.scale[0, 0] > 0


# --- activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 33), (2, 3, 17)])
def test_activations_are_what_keras_makes_of_them(shape):
    x = np.random.default_rng(2).normal(size=shape).astype("float32") * 10.0 ** np.arange(shape[-1] % 5 + 1).max()
    codes, inverse = keras.quantizers.abs_max_quantize(x, axis=-1, to_numpy=True)  # Keras divides by our scale
    tensor = activation_quantize(x)
    assert np.array_equal(tensor.qvalue, codes)
    assert np.allclose(tensor.scale, 1 / np.asarray(inverse), rtol=1e-5)
    assert np.abs(dequantize(tensor) - x).max() <= tensor.scale.max() / 2 * (1 + 1e-5)


def test_each_token_has_a_scale_of_its_own():
    x = np.array([[[1.0, -0.25], [100.0, 25.0]], [[1e-3, 0.0], [0.0, 0.0]]])
    tensor = activation_quantize(x)
    assert tensor.scale.shape == (2, 2, 1)
    assert np.allclose(127 * tensor.scale[0, :, 0], [1, 100])
    assert tensor.qvalue.tolist() == [[[127, -32], [127, 32]], [[127, 0], [0, 0]]]


# --- packing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4, 5, 6, 19, 20, 21, 1000])
@pytest.mark.parametrize(
    ("pack", "unpack", "a_byte"), [(pack_ternary, unpack_ternary, 5), (pack_two_bits, unpack_two_bits, 4)]
)
def test_packing_loses_nothing_and_takes_the_bytes_it_says(pack, unpack, a_byte, size):
    codes = np.random.default_rng(size).integers(-1, 2, size).astype("int8")
    packed = pack(codes)
    assert packed.dtype == np.uint8 and packed.shape == (-(-size // a_byte),)
    assert np.array_equal(unpack(packed, (size,)), codes)
    if size % 2 == 0:
        assert np.array_equal(unpack(packed, (2, size // 2)), codes.reshape(2, -1))


def test_all_243_groups_of_five_have_a_byte_of_their_own():
    groups = np.array(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij")).reshape(5, -1).T  # (243, 5)
    packed = pack_ternary(groups)
    assert sorted(packed.tolist()) == list(range(243))
    written = ["".join(str(c + 1) for c in group[::-1]) for group in groups]  # the first code is the last digit
    assert packed.tolist() == [int(digits, 3) for digits in written]


def test_two_bits_are_read_by_shifts():
    codes = np.random.default_rng(0).integers(-1, 2, 40)
    packed = pack_two_bits(codes)
    assert [(int(byte) >> shift & 3) - 1 for byte in packed for shift in (0, 2, 4, 6)] == codes.tolist()


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ternary_quantize([1.0, 2.0]), r"`kernel` must be a matrix.*\(2,\)"),
        (lambda: ternary_quantize([[1.0, np.nan]]), "`kernel` must hold finite numbers.*1 not finite"),
        (lambda: ternary_quantize(np.zeros((0, 3))), r"`kernel` must hold finite numbers.*\(0, 3\)"),
        (lambda: activation_quantize(np.inf), "`x` must hold finite numbers"),
        (lambda: activation_quantize([np.inf]), "`x` must hold finite numbers"),
        (lambda: pack_ternary([0, 2]), "`qvalue` must hold −1, 0 and 1.*2"),
        (lambda: pack_two_bits([0.5]), "`qvalue` must hold −1, 0 and 1.*0.5"),
        (lambda: unpack_ternary(np.zeros(2, "uint8"), (11,)), r"`packed` must be 3 bytes.*\(11,\).*\(2,\)"),
        (lambda: unpack_ternary(np.array([243], "uint8"), (5,)), "`packed` must hold bytes of packed.*243"),
        (lambda: unpack_two_bits(np.array([3], "uint8"), (4,)), "`packed` must hold bytes of packed.*3"),
    ],
)
def test_bad_input_is_named_with_what_was_expected_and_what_came(call, said):
    with pytest.raises(ValueError, match=said):
        call()
