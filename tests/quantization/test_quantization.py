"""Quantization against Keras and against numpy written out; its promises as properties; the estimator's gradients."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from gemma_lora.quantization import calibration
from gemma_lora.quantization.calibration import _divergence, affine_parameters, code_range, symmetric_scale
from gemma_lora.quantization.integers import QuantizedTensor, calibrate, dequantize, fake_quantize, quantize

BITS = range(2, 9)
GROUPS = [{}, {"axis": 0}, {"axis": 1}, {"axis": -1}, {"block_size": 32}, {"block_size": 7}]


def samples(shape=(48, 64), seed=0, outliers=0, shift=0.0):
    """Float32 numbers like a kernel's; some ten times as large."""
    rng = np.random.default_rng(seed)
    x = rng.normal(shift, 0.04, shape).astype(np.float32)
    x.flat[rng.choice(x.size, outliers, replace=False)] *= 10
    return x


def wide(values, tensor):
    """A value a group, as a value a number, by hand."""
    if tensor.block_size is None:
        return np.broadcast_to(values, tensor.qvalue.shape)
    columns = np.arange(tensor.qvalue.shape[-1]) // tensor.block_size
    return values[..., columns]


# --- equal to Keras, and to numpy written out --------------------------------------------------------------


@pytest.mark.parametrize("ours, keras_axis", [({}, (0, 1)), ({"axis": 0}, 1), ({"axis": 1}, 0)])
def test_symmetric_int8_is_keras_abs_max_quantize(ours, keras_axis):
    x = samples(outliers=20)
    tensor = quantize(x, **ours)
    codes, scale = keras.quantizers.abs_max_quantize(x, axis=keras_axis, epsilon=0.0)
    np.testing.assert_array_equal(tensor.qvalue, np.asarray(codes))
    np.testing.assert_allclose(tensor.scale, 1 / np.asarray(scale), rtol=1e-6)  # Keras multiplies by its scale


def test_affine_blocks_are_keras_grouped_quantization():
    x = samples((64, 48), outliers=20)
    codes, scale, zero_point = keras.quantizers.abs_max_quantize_grouped_with_zero_point(
        x, block_size=16, epsilon=0.0, to_numpy=True
    )
    ours = quantize(x.T, bits=4, symmetric=False, block_size=16)  # Keras's blocks go down the first axis
    np.testing.assert_allclose(ours.scale, np.asarray(scale).T, rtol=1e-6)
    np.testing.assert_array_equal(ours.zero_point.astype(int) - 8, np.asarray(zero_point).T)  # Keras's are signed
    np.testing.assert_array_equal(ours.qvalue.astype(int) - 8, np.asarray(codes).T)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_written_out(bits):
    x = samples()
    step = np.abs(x).max() / (2 ** (bits - 1) - 1)
    tensor = quantize(x, bits)
    assert tensor.signed and tensor.zero_point is None and tensor.qvalue.dtype == np.int8
    np.testing.assert_array_equal(tensor.qvalue, np.round(x / step))
    np.testing.assert_allclose(dequantize(tensor), np.round(x / step) * step, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_affine_written_out(bits):
    x = samples(shift=0.1)
    step = (x.max() - x.min()) / (2**bits - 1)
    zero = np.round(-x.min() / step)
    tensor = quantize(x, bits, symmetric=False)
    assert not tensor.signed and tensor.qvalue.dtype == tensor.zero_point.dtype == np.uint8
    np.testing.assert_array_equal(tensor.zero_point, zero)
    np.testing.assert_array_equal(tensor.qvalue, np.clip(np.round(x / step) + zero, 0, 2**bits - 1))
    np.testing.assert_allclose(dequantize(tensor), (tensor.qvalue - zero) * step, rtol=1e-5, atol=1e-7)


def test_each_channel_and_each_block_is_quantized_as_if_alone():
    x = samples((6, 64), outliers=9)
    for symmetric in (True, False):
        rows = quantize(x, 4, symmetric, axis=0)
        blocks = quantize(x, 4, symmetric, block_size=16)
        assert rows.scale.shape == (6, 1) and blocks.scale.shape == (6, 4)
        for i in range(6):
            alone = quantize(x[i], 4, symmetric)
            np.testing.assert_array_equal(rows.qvalue[i], alone.qvalue)
            for b in range(4):
                part = slice(16 * b, 16 * b + 16)
                np.testing.assert_array_equal(blocks.qvalue[i, part], quantize(x[i, part], 4, symmetric).qvalue)


@pytest.mark.parametrize(
    "low, high, scale, zero_point, x, code",
    [(0, 1000, 1000 / 255, 0, 250, 64), (-20, 1000, 4.0, 5, -20, 0), (-20, 1000, 4.0, 5, 1000, 255)],
)
def test_the_examples_of_the_notes(low, high, scale, zero_point, x, code):
    tensor = quantize(np.array([low, x, high], np.float32), symmetric=False)
    assert float(tensor.scale[0]) == pytest.approx(scale)
    assert (int(tensor.zero_point[0]), int(tensor.qvalue[1])) == (zero_point, code)


#: Root mean square error over root mean square of `samples((256, 512), outliers=100)`, in per cent.
GOLDEN = {
    (8, True, "tensor"): 6.851,
    (8, True, "channel"): 1.533,
    (8, True, "block"): 0.617,
    (8, False, "tensor"): 6.358,
    (8, False, "channel"): 1.034,
    (8, False, "block"): 0.497,
    (4, True, "tensor"): 92.162,
    (4, True, "channel"): 26.244,
    (4, True, "block"): 11.056,
    (4, False, "tensor"): 88.364,
    (4, False, "channel"): 17.710,
    (4, False, "block"): 8.486,
    (2, True, "tensor"): 98.261,
    (2, True, "channel"): 84.830,
    (2, True, "block"): 63.873,
    (2, False, "tensor"): 97.111,
    (2, False, "channel"): 65.316,
    (2, False, "block"): 40.351,
}


def relative_error(x, **options):
    return 100 * float(np.sqrt(np.mean((x - dequantize(quantize(x, **options))) ** 2) / np.mean(x**2)))


@pytest.mark.parametrize("bits, symmetric, kind", GOLDEN)
def test_golden_errors(bits, symmetric, kind):
    groups = {"tensor": {}, "channel": {"axis": 0}, "block": {"block_size": 32}}[kind]
    error = relative_error(samples((256, 512), outliers=100), bits=bits, symmetric=symmetric, **groups)
    assert error == pytest.approx(GOLDEN[bits, symmetric, kind], rel=2e-3)


# --- properties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_the_error_is_at_most_half_a_step(bits, symmetric, groups):
    for seed, shift in ((0, 0.0), (1, 0.3), (2, -0.3)):
        x = samples(seed=seed, outliers=40, shift=shift)
        tensor = quantize(x, bits, symmetric, **groups)
        half = wide(tensor.scale, tensor) / 2
        assert (np.abs(x - dequantize(tensor)) <= half * (1 + 1e-5) + 1e-7).all()
        qmin, qmax = code_range(bits, symmetric)
        assert qmin <= tensor.qvalue.min() and tensor.qvalue.max() <= qmax
        assert (tensor.scale > 0).all() and tensor.scale.dtype == np.float32 and tensor.scale.ndim == x.ndim


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_zero_comes_back_exactly(groups):
    for symmetric in (True, False):
        x = samples(shift=0.5)
        x[::3, ::5] = 0.0
        assert (dequantize(quantize(x, 4, symmetric, **groups))[::3, ::5] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_finer_groups_have_smaller_errors_where_there_are_outliers(bits, symmetric):
    x = samples((64, 256), outliers=30)
    kinds = [{}, {"axis": 0}, {"block_size": 64}, {"block_size": 16}]
    errors = [relative_error(x, bits=bits, symmetric=symmetric, **kind) for kind in kinds]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.2 * errors[-1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-30])
def test_a_constant_tensor_comes_back(value, symmetric):
    x = np.full((3, 8), value, np.float32)
    for groups in GROUPS:
        tensor = quantize(x, 8, symmetric, **groups)
        assert (tensor.scale > 0).all()
        np.testing.assert_allclose(dequantize(tensor), x, rtol=1e-6)
    assert float(symmetric_scale(0.0, 0.0, 8)) == float(affine_parameters(0.0, 0.0, 8)[0]) == 1.0


def test_a_minus_sign_changes_the_symmetric_code_only_in_sign():
    x = samples()
    np.testing.assert_array_equal(quantize(-x, 4).qvalue, -quantize(x, 4).qvalue)


def test_bytes_are_packed_codes_scales_and_zero_points():
    x = samples((10, 33))
    assert quantize(x, 8).nbytes == 330 + 4
    assert quantize(x, 4, axis=0).nbytes == 165 + 4 * 10
    assert quantize(x, 3, symmetric=False, axis=1).nbytes == 124 + (4 + 1) * 33  # 990 bits fill 124 bytes
    assert quantize(x, 4, symmetric=False, block_size=16).nbytes == 165 + (4 + 1) * 10 * 3


def test_values_outside_a_given_range_are_clipped():
    x = np.array([-5.0, -1.0, 0.3, 1.0, 5.0], np.float32)
    np.testing.assert_allclose(dequantize(quantize(x, value_range=(-1, 1))), [-1, -1, 0.3, 1, 1], atol=0.5 / 127)
    np.testing.assert_allclose(dequantize(quantize(x, 8, False, value_range=(0, 1))), [0, 0, 0.3, 1, 1], atol=0.5 / 255)


def test_a_range_for_each_channel():
    x = samples((2, 8))
    tensor = quantize(x, axis=0, value_range=(np.array([[-1.0], [-2.0]]), np.array([[1.0], [2.0]])))
    np.testing.assert_allclose(tensor.scale, [[1 / 127], [2 / 127]], rtol=1e-6)


def test_other_kinds_of_arrays_are_taken():
    x = samples((4, 8))
    half = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(quantize(half).qvalue, quantize(np.asarray(half, np.float32)).qvalue)
    assert quantize([1, 2, -4]).qvalue.tolist() == [32, 64, -127]


# --- fake quantization -------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [*GROUPS, {"value_range": (-0.05, 0.06)}], ids=str)
def test_fake_quantization_is_there_and_back(symmetric, groups):
    x = samples(outliers=10)
    for bits in (2, 4, 8):
        expected = dequantize(quantize(x, bits, symmetric, **groups))
        np.testing.assert_allclose(fake_quantize(x, bits, symmetric, **groups), expected, rtol=1e-6, atol=1e-8)
    traced = jax.jit(lambda x: fake_quantize(x, 4, symmetric, **groups))(x)
    assert float(jnp.mean(jnp.abs(traced - dequantize(quantize(x, 4, symmetric, **groups))) > 1e-6)) < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [*GROUPS, {"value_range": (-0.05, 0.06)}], ids=str)
def test_the_value_is_the_same_while_a_gradient_is_asked_for(symmetric, groups):
    x = samples(outliers=10)
    value, _ = jax.vjp(lambda x: fake_quantize(x, 4, symmetric, **groups), jnp.asarray(x))
    np.testing.assert_allclose(value, dequantize(quantize(x, 4, symmetric, **groups)), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_one_inside_and_zero_outside(symmetric):
    x = jnp.array([-9.0, -2.1, -1.9, 0.0, 0.37, 1.9, 2.1, 9.0])
    weights = jnp.arange(1.0, 9.0)
    gradient = jax.grad(lambda x: (weights * fake_quantize(x, 8, symmetric, value_range=(-2.0, 2.0))).sum())(x)
    np.testing.assert_array_equal(gradient, weights * jnp.array([0, 0, 1, 1, 1, 1, 0, 0]))
    keras_gradient = jax.grad(
        lambda x: (weights * keras.quantizers.fake_quant_with_min_max_vars(x, -2.0, 2.0, num_bits=8)).sum()
    )(x)
    np.testing.assert_array_equal(gradient, keras_gradient)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_nothing_is_clipped_by_minmax_so_every_gradient_is_one(groups):
    for symmetric in (True, False):
        gradient = jax.grad(lambda x: fake_quantize(x, 4, symmetric, **groups).sum())(jnp.asarray(samples()))  # noqa: B023
        np.testing.assert_array_equal(gradient, 1.0)


@pytest.mark.slow
def test_training_learns_through_fake_quantization():
    target = fake_quantize(samples((8,), seed=3), 4, value_range=(-0.1, 0.1))

    def loss(weights):
        return jnp.sum((fake_quantize(weights, 4, value_range=(-0.1, 0.1)) - target) ** 2)

    weights = jnp.zeros(8)
    for _ in range(200):
        weights -= 0.1 * jax.grad(loss)(weights)
    assert float(loss(jnp.zeros(8))) > 1e-3 and float(loss(weights)) < 1e-6


# --- calibration -------------------------------------------------------------------------------------------


def test_minmax_is_the_range():
    x = np.array([-3.0, 0.5, 7.0], np.float32)
    assert calibrate(x, symmetric=False) == (-3.0, 7.0) and calibrate(x) == (-7.0, 7.0)
    assert calibrate(x + 4, symmetric=False) == (0.0, 11.0)  # 0 always belongs to it
    assert calibrate(x - 8, symmetric=False) == (-11.0, 0.0)


@pytest.mark.parametrize("percentile", [90, 99, 100])
def test_a_percentile_leaves_its_share_outside(percentile):
    x = samples((100, 100), outliers=50)
    low, high = calibrate(x, "percentile", percentile=percentile)
    assert low == -high and np.mean(np.abs(x) > high) == pytest.approx(1 - percentile / 100, abs=2e-4)
    low, high = calibrate(x, "percentile", symmetric=False, percentile=percentile)
    assert np.mean(x > high) == pytest.approx(1 - percentile / 100, abs=2e-4) == np.mean(x < low)


def test_a_percentiles_range_holds_zero():
    x = np.abs(samples()) + 1
    assert calibrate(x, "percentile", symmetric=False)[0] == 0 == calibrate(-x, "percentile", symmetric=False)[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_the_best_of_every_range_tried_by_hand(bits, symmetric):
    x = samples((40, 50), outliers=6, shift=0.01)
    low, high = calibrate(x, "mse", bits, symmetric)
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1

    def error(low, high):
        if symmetric:
            step = max(-low, high) / top
            back = np.array([min(max(round(v / step), -top), top) * step for v in x.ravel().tolist()])
        else:
            step = (high - low) / top
            zero = round(-low / step)
            back = np.array([(min(max(round(v / step) + zero, 0), top) - zero) * step for v in x.ravel().tolist()])
        return np.mean((x.ravel() - back) ** 2)

    wide_low, wide_high = calibrate(x, "minmax", symmetric=symmetric)
    tried = [error(wide_low * k / 100, wide_high * k / 100) for k in range(1, 101)]
    assert error(low, high) == pytest.approx(min(tried), rel=1e-3)
    assert high / wide_high == pytest.approx(low / wide_low) and high < wide_high


def divergence_by_hand(counts, bins, levels):
    """Bin by bin, in plain Python."""
    p = [float(c) for c in counts[:bins]]
    p[-1] += float(sum(counts[bins:]))
    q = [0.0] * bins
    for level in range(levels):
        members = [b for b in range(bins) if b * levels // bins == level]
        filled = [b for b in members if counts[b] > 0]
        for b in filled:
            q[b] = sum(counts[m] for m in members) / len(filled)
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            if b == 0:
                return float("inf")
            total += a / sum(p) * np.log(a / sum(p) / (b / sum(q)))
    return total


def test_entropys_divergence_is_the_one_by_hand():
    rng = np.random.default_rng(0)
    for bins in (8, 13, 20):
        counts = rng.integers(0, 9, 30).astype(float)
        counts[bins - 1] = 3
        assert _divergence(counts, bins, 8) == pytest.approx(divergence_by_hand(counts, bins, 8))
    counts[12] = 0
    assert _divergence(counts, 13, 8) == divergence_by_hand(counts, 13, 8) == np.inf


@pytest.mark.parametrize("symmetric, levels", [(True, 8), (False, 16)])
def test_entropys_range_is_the_best_of_every_threshold_by_hand(symmetric, levels, monkeypatch):
    monkeypatch.setattr(calibration, "_BINS", 64)
    for seed in range(5):
        x = np.abs(samples((60, 60), seed=seed, outliers=5))
        counts, edges = np.histogram(x, 64, (0, float(x.max())))
        tried = {bins: divergence_by_hand(counts.astype(float), bins, levels) for bins in range(levels, 65)}
        low, high = calibrate(x, "entropy", 4, symmetric)
        assert high == pytest.approx(edges[min(tried, key=tried.get)]) and high < x.max()
        assert low == (-high if symmetric else 0)


def test_entropy_of_two_sided_data_and_of_zeros():
    x = samples((50, 50), outliers=8)
    low, high = calibrate(x, "entropy", symmetric=False)
    assert x.min() <= low < 0 < high <= x.max() and calibrate(x, "entropy") == (-max(-low, high), max(-low, high))
    for method in ("minmax", "percentile", "mse", "entropy"):
        assert calibrate(np.zeros(5), method) == (0, 0)


def test_methods_that_clip_beat_minmax_on_outliers():
    x = samples((200, 200), outliers=20)
    errors = {
        method: relative_error(x, bits=4, value_range=calibrate(x, method, 4))
        for method in ("minmax", "percentile", "mse", "entropy")
    }
    assert errors["mse"] == min(errors.values()) and errors["minmax"] == max(errors.values())


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize(
    "x, options, said",
    [
        (np.ones(4), {"bits": 1}, "`bits` must be an integer from 2 to 8. Received: bits=1"),
        (np.ones(4), {"bits": 9}, "bits=9"),
        (np.ones(4), {"bits": 4.0}, "bits=4.0"),
        (np.ones(4), {"bits": True}, "bits=True"),
        (np.ones(0), {}, r"`x` must have rank 1 or more .* shape=\(0,\)"),
        (np.float32(3), {}, r"shape=\(\)"),
        (np.ones((2, 2)), {"axis": 2}, "`axis` must be an axis of x, which has rank 2. Received: axis=2"),
        (np.ones((2, 2)), {"axis": -3}, "axis=-3"),
        (np.ones((2, 2)), {"axis": 0, "block_size": 2}, "not both. Received: axis=0, block_size=2"),
        (np.ones((2, 2)), {"block_size": 0}, "`block_size` must be an integer of at least 1"),
        (np.ones((2, 2)), {"block_size": 1.5}, "block_size=1.5"),
        (np.ones((2, 2)), {"value_range": (1,)}, "`value_range` must be a pair"),
    ],
)
def test_bad_arguments_are_named(function, x, options, said):
    with pytest.raises(ValueError, match=said):
        function(x, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite. Received: 1 of 3 numbers are not"):
        quantize(np.array([1.0, bad, 2.0]))
    with pytest.raises(ValueError, match="finite"):
        calibrate(np.array([1.0, bad, 2.0]))


def test_bad_ranges_and_methods_are_named():
    with pytest.raises(ValueError, match="low ≤ high"):
        quantize(np.ones(3), value_range=(1.0, -1.0))
    with pytest.raises(ValueError, match="'minmax', 'percentile', 'mse' or 'entropy'. Received: method='max'"):
        calibrate(np.ones(3), "max")
    with pytest.raises(ValueError, match=r"`percentile` must be in \(50, 100\]. Received: percentile=50"):
        calibrate(np.ones(3), "percentile", percentile=50)
    with pytest.raises(ValueError, match="at least one"):
        calibrate(np.ones(0))
    with pytest.raises(ValueError, match="bits=12"):
        calibrate(np.ones(3), bits=12)


def test_the_fields_are_those_the_docstring_names():
    tensor = quantize(samples((4, 8)), 4, symmetric=False, block_size=4)
    assert isinstance(tensor, QuantizedTensor)
    assert (tensor.bits, tensor.axis, tensor.block_size) == (4, None, 4)
    assert tensor.zero_point.shape == tensor.scale.shape == (4, 2)
