"""packed.py: decoded matrices against numpy and the gguf library; the product's values, gradient and memory."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.quantization import integers as quantization
from gemma_lora.quantization import nf4, packed

SHAPES = [(6, 64), (5, 24), (3, 7), (64, 128)]
RNG = np.random.default_rng(0)


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype("float32")


def encodings(shape):
    return [
        packed.NF4(shape),
        packed.NF4(shape, double_quant=True),
        packed.NF4(shape, block_size=16),
        packed.Int8(shape),
        packed.Int4(shape),
        packed.Int4(shape, block_size=16),
    ]


def decoded_by_numpy(encoding, w):
    """The same codes and scales, put together by the numpy modules."""
    if isinstance(encoding, packed.NF4):
        return nf4.dequantize(nf4.quantize(w, encoding.block_size, encoding.double_quant))
    if isinstance(encoding, packed.Int8):
        return np.asarray(quantization.dequantize(quantization.quantize(w, bits=8, axis=0)))
    flat = quantization.quantize(w.reshape(1, -1), bits=4, block_size=encoding.block_size)
    return np.asarray(quantization.dequantize(flat)).reshape(w.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_is_numpys(shape):
    w = matrix(shape)
    for encoding in encodings(shape):
        found = np.asarray(encoding.decode(encoding.encode(w)))
        np.testing.assert_allclose(found, decoded_by_numpy(encoding, w), rtol=1e-6, atol=1e-7, err_msg=str(encoding))


@pytest.mark.parametrize(
    "bits, make",
    [(4.5, packed.NF4), (4.5, packed.Int4), (4.127, lambda shape: packed.NF4(shape, double_quant=True))],
)
def test_bits_a_weight(bits, make):
    encoding = make((256, 2048))
    parts = encoding.encode(matrix((256, 2048)))
    assert 8 * sum(part.nbytes for part in parts.values()) / (256 * 2048) == pytest.approx(bits, abs=2e-3)


# --- GGUF ---------------------------------------------------------------------------------------------------------


def blocks_of(kind, rows, columns, seed=0):
    """Random bytes with sane scales: every code, factor and sign occurs."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // numbers, size)).astype(np.uint8)
    scales = np.random.default_rng(seed + 1).uniform(-0.1, 0.1, (rows, columns // numbers, 2)).astype(np.float16)
    halves = scales.view(np.uint8).reshape(rows, columns // numbers, 4)
    if kind == "Q6_K":
        raw[..., 208:210] = halves[..., :2]
    else:
        raw[..., : 4 if kind == "Q4_K" else 2] = halves[..., : 4 if kind == "Q4_K" else 2]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", packed.GGUF_KINDS)
def test_gguf_blocks_are_decoded_as_by_the_gguf_library(kind):
    raw = blocks_of(kind, 5, 512)
    right = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    found = np.asarray(packed.GGUFBlocks((5, 512), kind).decode({"blocks": jnp.asarray(raw)}))
    np.testing.assert_array_equal(found, right)
    assert len(np.unique(right)) > 500


def test_gguf_blocks_are_not_made_here():
    with pytest.raises(ValueError, match="Q4_K"):
        packed.GGUFBlocks((1, 256), "Q4_K").encode(matrix((1, 256)))


# --- the product --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mixed, tolerance", [(False, 1e-5), (True, 2e-2)])
def test_product_and_gradient_are_those_of_the_decoded_matrix(mixed, tolerance):
    for encoding in encodings((24, 64)):
        parts = encoding.encode(matrix((24, 64)))
        x, g = matrix((7, 64), 1), matrix((7, 24), 2)
        decoded = decoded_by_numpy(encoding, matrix((24, 64)))
        y, pull = jax.vjp(lambda x, e=encoding, p=parts: packed.packed_product(x, p, e, mixed), jnp.asarray(x))
        (dx,) = pull(jnp.asarray(g))
        for found, right in ((y, x @ decoded.T), (dx, g @ decoded)):
            np.testing.assert_allclose(found, right, atol=tolerance * np.abs(right).max())


def test_gradient_is_that_of_finite_differences():
    encoding = packed.NF4((6, 64), double_quant=True)
    parts, x, g = encoding.encode(matrix((6, 64))), matrix((2, 64), 1), matrix((2, 6), 2)

    def loss(x):
        return float(jnp.sum(packed.packed_product(jnp.asarray(x, "float32"), parts, encoding) * g))

    gradient = jax.grad(lambda x: jnp.sum(packed.packed_product(x, parts, encoding) * g))(jnp.asarray(x))
    for place in [(0, 0), (0, 33), (1, 63)]:
        step = np.zeros_like(x)
        step[place] = 0.5  # the function is linear, so a large step has no error of its own
        assert gradient[place] == pytest.approx(loss(x + step) - loss(x - step), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("encoding", encodings((64, 128)), ids=str)
def test_nothing_decoded_is_kept_for_the_backward_pass(encoding):
    parts = jax.tree.map(jnp.asarray, encoding.encode(matrix((64, 128))))
    _, pull = jax.vjp(lambda x: packed.packed_product(x, parts, encoding), jnp.ones((2, 128)))
    kept = jax.tree.leaves(pull)
    assert kept and sum(leaf.nbytes for leaf in kept) <= sum(part.nbytes for part in parts.values()) < 4 * 64 * 128


def test_a_compiled_step_never_holds_many_decoded_matrices():
    """Twelve layers of 512 x 512, 1 MiB each decoded: forward and backward need one or two at a time."""
    encoding, layers = packed.NF4((512, 512)), 12
    stack = [jax.tree.map(jnp.asarray, encoding.encode(matrix((512, 512), i))) for i in range(layers)]

    def loss(x, stack):
        for parts in stack:
            x = jnp.tanh(packed.packed_product(x, parts, encoding))
        return jnp.sum(x)

    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    program = jax.jit(jax.grad(loss), compiler_options=options).lower(jnp.ones((4, 512)), stack).compile()
    assert program.memory_analysis().temp_size_in_bytes < 5 * 2**20


def test_inputs_in_bfloat16_give_bfloat16():
    encoding = packed.Int8((24, 64))
    assert packed.packed_product(jnp.ones((2, 64), "bfloat16"), encoding.encode(matrix((24, 64))), encoding).dtype == (
        jnp.bfloat16
    )


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_are_quantized_one_scale_each():
    table = matrix((50, 16)) * np.linspace(0.01, 3, 50)[:, None].astype("float32")
    rows = packed.Int8Rows.of(table, rows_at_once=7)
    assert rows.scales.shape == (50, 1) and rows.codes.dtype == np.int8
    assert np.all(np.abs(np.asarray(rows.decode()) - table) <= rows.scales / 2 + 1e-7)


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_slices_and_products_are_the_tables(groups):
    codes = RNG.integers(-127, 128, (50, 16)).astype(np.int8)
    rows = packed.Int8Rows(codes, RNG.uniform(0.1, 1, (50, groups)).astype(np.float16))
    whole = codes * np.repeat(rows.scales.astype(np.float32), 16 // groups, axis=1)
    np.testing.assert_allclose(rows.decode(), whole, rtol=1e-6)
    np.testing.assert_allclose(rows.slice(jnp.int32(7), 9).decode(), whole[7:16], rtol=1e-6)
    np.testing.assert_allclose(rows.take(jnp.array([[3, 3], [49, 0]])).decode(), whole[[[3, 3], [49, 0]]], rtol=1e-6)
    hidden = matrix((3, 16))
    for at_once in (7, 50, 4096):  # a block that does not divide 50, one that does, one that is larger
        np.testing.assert_allclose(rows.product(jnp.asarray(hidden), at_once), whole @ hidden.T, rtol=1e-4, atol=1e-3)
