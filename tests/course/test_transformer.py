"""Gemma from scratch equals KerasHub's, on a tiny random model and on the real weights; and what its parts promise."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.course import transformer

LONG = [2, 17, 40, 5, 299, 8, 8, 120, 33, 7, 61, 250]  # twice the tiny model's window of 6


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def weights(gemma):
    return transformer.weights_of(gemma.backbone)


def block_by_block(backbone, ids):
    """KerasHub's hidden states (T, D): embeddings, after each block, after the last norm."""
    ids = np.array([ids])
    x = backbone.token_embedding(ids) * float(np.sqrt(backbone.hidden_dim))
    states = [x[0]]
    for layer in backbone.transformer_layers:
        x = layer(x, padding_mask=np.ones_like(ids))
        states.append(x[0])
    return [*states, backbone.layer_norm(x)[0]]


def keras_attention(layer, x):
    """KerasHub's attention weights (N, T, T): with the unit matrix for values, the mixture is the weights."""
    attention, length = layer.attention, len(x)
    normed = layer.pre_attention_norm(x[None])
    query = attention.rope_layer(attention.query_norm(attention.query_dense(normed)))
    key = attention.rope_layer(attention.key_norm(attention.key_dense(normed)))
    unit = np.zeros((1, length, attention.num_key_value_heads, attention.head_dim), "float32")
    unit[0, range(length), :, range(length)] = 1
    mask = np.tril(np.ones((1, length, length), bool))
    mixed = type(attention)._compute_attention(attention, query, key, jnp.asarray(unit), mask)
    return np.moveaxis(np.asarray(mixed)[0, :, :, :length], 1, 0)


def assert_same_model(model, ids, tolerance):
    backbone = model.backbone
    output = transformer.gemma(ids, transformer.weights_of(backbone))
    expected = block_by_block(backbone, ids)
    assert len(output.hidden_states) == len(expected) - 1 == len(output.attention) + 1
    for ours, theirs in zip(output.hidden_states, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(jnp.abs(theirs).max()))
    batch = np.array([ids])
    whole = backbone({"token_ids": batch, "padding_mask": np.ones_like(batch)})
    logits = backbone.token_embedding(whole, reverse=True)[0]
    np.testing.assert_allclose(output.logits, logits, rtol=0, atol=tolerance * float(jnp.abs(logits).max()))
    return output, expected


# --- equal to KerasHub -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tiny_model_is_kerashubs(gemma):
    assert_same_model(gemma, LONG, 2e-6)


@pytest.mark.slow
def test_the_tiny_models_attention_is_kerashubs(gemma):
    short = LONG[:8]  # the unit matrix must fit into the head's 8 numbers; still longer than the window
    output, states = assert_same_model(gemma, short, 2e-6)
    for layer, ours, x in zip(gemma.backbone.transformer_layers, output.attention, states, strict=False):
        np.testing.assert_allclose(ours, keras_attention(layer, x), atol=2e-6)


@pytest.mark.slow
def test_a_global_block_sees_everything_and_turns_slower():
    import keras

    from gemma_lora.gemma.load import import_keras_hub

    keras.utils.set_random_seed(4)
    backbone = import_keras_hub().models.Gemma3Backbone(
        vocabulary_size=50, image_size=16, num_layers=7, num_query_heads=4, num_key_value_heads=1, hidden_dim=16,
        intermediate_dim=24, head_dim=8, use_post_ffw_norm=True, use_post_attention_norm=True,
        use_sliding_window_attention=True, sliding_window_size=3, dtype="float32",
    )  # fmt: skip
    weights = transformer.weights_of(backbone)
    assert [block["window"] for block in weights["blocks"]] == [3, 3, 3, 3, 3, None, 3]
    assert [block["wavelength"] for block in weights["blocks"]] == [1e4] * 5 + [1e6, 1e4]
    ids = [i % 50 for i in LONG]
    output = transformer.gemma(ids, weights)
    for ours, theirs in zip(output.hidden_states, block_by_block(backbone, ids), strict=False):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert (output.attention[5][:, -1, 0] > 0).all() and (output.attention[6][:, -1, 0] == 0).all()


def test_the_real_model_is_kerashubs(real_gemma):
    tokenizer = real_gemma.preprocessor.tokenizer
    ids = [tokenizer.token_to_id("<bos>"), *tokenizer.tokenize("The capital of France is")]
    output, states = assert_same_model(real_gemma, ids, 1e-5)
    for layer, ours, x in zip(real_gemma.backbone.transformer_layers, output.attention, states, strict=False):
        np.testing.assert_allclose(ours, keras_attention(layer, x), atol=1e-4)
    last = transformer.rms_norm(output.hidden_states[-1], transformer.weights_of(real_gemma.backbone)["final_norm"])
    np.testing.assert_allclose(last, states[-1], rtol=0, atol=1e-5 * float(jnp.abs(states[-1]).max()))


# --- what the parts promise --------------------------------------------------------------------------------


def test_rms_norm_leaves_vectors_of_one_size(rng):
    x = rng.normal(0, 5, (7, 64))
    normed = transformer.rms_norm(x, np.zeros(64))
    np.testing.assert_allclose(np.mean(np.square(normed), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(transformer.rms_norm(100 * x, np.zeros(64)), normed, rtol=1e-5)
    np.testing.assert_allclose(transformer.rms_norm(x, np.full(64, 2.0)), 3 * normed, rtol=1e-5)
    assert (transformer.rms_norm(np.zeros(4), np.zeros(4)) == 0).all()


def test_rope_keeps_lengths_and_depends_on_distance_only(rng):
    query, key = rng.normal(size=(2, 1, 3, 8))
    rotated = transformer.rotary_embedding(np.repeat(query, 50, axis=0))
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.tile(np.linalg.norm(query, axis=-1), (50, 1)), 1e-5)
    assert np.array_equal(rotated[0], query[0].astype("float32"))  # position 0 does not turn

    def score(at, read):
        one = transformer.rotary_embedding(query, positions=[at])
        return np.sum(one * transformer.rotary_embedding(key, positions=[read]), axis=-1)

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=0, atol=1e-4)
    assert not np.allclose(score(9, 4), score(9, 5), atol=1e-2)
    assert not np.allclose(score(9, 4), score(4, 9), atol=1e-2)  # the direction counts


def test_a_longer_wavelength_turns_slower_but_for_the_first_pair():
    ones = np.ones((2, 1, 8))
    local, slow = (transformer.rotary_embedding(ones, wavelength)[1, 0] for wavelength in (1e4, 1e6))
    assert np.isclose(local[0], slow[0]) and (np.abs(slow - 1)[1:4] < np.abs(local - 1)[1:4]).all()


def test_the_masks():
    assert np.array_equal(transformer.causal_mask(9), np.tri(9, dtype=bool))
    window = np.asarray(transformer.sliding_window_mask(9, 4))
    assert window.sum(axis=1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert window.diagonal().all() and not np.triu(window, 1).any()
    assert np.array_equal(transformer.sliding_window_mask(9, 9), transformer.causal_mask(9))


def test_a_later_token_changes_nothing_before_it(weights):
    one, other = transformer.gemma(LONG, weights), transformer.gemma([*LONG[:8], 111, *LONG[9:]], weights)
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        assert np.array_equal(a[:8], b[:8]) and not np.allclose(a[8], b[8])
    assert not np.allclose(one.logits[9], other.logits[9])


def test_past_the_window_a_token_is_out_of_sight(weights):
    """Two blocks of window 6 reach back 2 · 5 tokens: the last of 12 does not see the first."""
    one, other = transformer.gemma(LONG, weights), transformer.gemma([111, *LONG[1:]], weights)
    assert np.array_equal(one.hidden_states[1][6:], other.hidden_states[1][6:])
    assert not np.allclose(one.hidden_states[2][6], other.hidden_states[2][6])
    assert np.array_equal(one.logits[11], other.logits[11])


def test_rows_of_attention_sum_to_one(weights):
    for block, rows in zip(weights["blocks"], transformer.gemma(LONG, weights).attention, strict=True):
        np.testing.assert_allclose(rows.sum(axis=-1), 1, atol=1e-5)
        assert (rows[:, ~transformer.sliding_window_mask(len(LONG), block["window"])] == 0).all()


@pytest.mark.slow
def test_a_key_head_is_shared_by_its_group(weights, rng):
    block, x, mask = weights["blocks"][0], rng.normal(size=(5, 16)), transformer.causal_mask(5)
    output, rows = transformer.grouped_query_attention(x, block, mask)
    spread = {name: jnp.repeat(block[name], 2, axis=0) for name in ("key", "value")}  # a head each
    own, own_rows = transformer.grouped_query_attention(x, block | spread, mask)
    np.testing.assert_allclose(output, own, atol=1e-4)
    np.testing.assert_allclose(rows, own_rows, atol=1e-5)
    _, changed = transformer.grouped_query_attention(x, block | {"key": block["key"].at[1].set(0.3)}, mask)
    assert np.array_equal(changed[:2], rows[:2]) and not np.allclose(changed[2:], rows[2:])


def test_the_mlp_works_on_each_token_alone(weights, rng):
    kernels = [weights["blocks"][0][name] for name in ("gate", "up", "down")]
    x, order = rng.normal(size=(6, 16)).astype("float32"), rng.permutation(6)
    np.testing.assert_allclose(transformer.geglu(x[order], *kernels), transformer.geglu(x, *kernels)[order], atol=1e-5)
    np.testing.assert_allclose(transformer.geglu(x[2], *kernels), transformer.geglu(x, *kernels)[2], atol=1e-5)


def test_geglu_is_the_tanh_formula(rng):
    x, gate, up, down = (rng.normal(size=shape) for shape in ((3, 4), (4, 5), (4, 5), (5, 4)))
    z = x @ gate
    gelu = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    np.testing.assert_allclose(transformer.geglu(x, gate, up, down), gelu * (x @ up) @ down, rtol=1e-4, atol=1e-5)


def test_float32_weights_are_not_copied(gemma):
    embeddings = gemma.backbone.token_embedding.embeddings.value
    assert transformer.weights_of(gemma.backbone)["embedding"] is embeddings


# --- bad input ---------------------------------------------------------------------------------------------

ONES = np.ones((3, 2, 4))
HEADS = {"query": np.ones((3, 4, 2)), "key": np.ones((2, 4, 2))}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: transformer.rms_norm(ONES, np.ones(3)), "`scale`.*(4,).*(3,)"),
        (lambda: transformer.rotary_embedding(ONES[..., :3]), "`x`.*even.*(3, 2, 3)"),
        (lambda: transformer.rotary_embedding(ONES[0]), "`x`"),
        (lambda: transformer.rotary_embedding(ONES, wavelength=1), "`wavelength`.*above 1.*1"),
        (lambda: transformer.rotary_embedding(ONES, positions=[0, 1]), "`positions`.*(3,).*(2,)"),
        (lambda: transformer.causal_mask(0), "`length`.*Received: 0"),
        (lambda: transformer.sliding_window_mask(3, 0), "`window`.*Received: 0"),
        (lambda: transformer.grouped_query_attention(ONES[:, 0], HEADS, np.ones((3, 2))), "`mask`.*(3, 2)"),
        (lambda: transformer.grouped_query_attention(ONES[:, 0], HEADS, np.zeros((3, 3))), "`mask`.*every row"),
        (lambda: transformer.grouped_query_attention(ONES[:, 0], HEADS, np.ones((3, 3))), "multiples.*(3, 2)"),
        (lambda: transformer.geglu(np.ones(4), np.ones((4, 5)), np.ones((4, 6)), np.ones((5, 4))), "`up`.*(4, 6)"),
        (lambda: transformer.geglu(np.ones(3), np.ones((4, 5)), np.ones((4, 5)), np.ones((5, 4))), "D = 3"),
        (lambda: transformer.gemma([1, 3], {"embedding": np.ones((3, 4))}), "`token_ids`.*1 to 3"),
        (lambda: transformer.gemma([-1], {"embedding": np.ones((3, 4))}), "`token_ids`.*-1"),
        (lambda: transformer.gemma([1.0], {"embedding": np.ones((3, 4))}), "`token_ids`.*integers"),
        (lambda: transformer.gemma([[1]], {"embedding": np.ones((3, 4))}), "`token_ids`.*(1, 1)"),
        (lambda: transformer.weights_of(object()), "`backbone`.*Gemma 3.*class object"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named.replace("(", r"\(").replace(")", r"\)")):
        call()


@pytest.mark.parametrize(("name", "value"), [("final_logit_soft_cap", 3.0), ("global_rope_scaling_factor", 8.0)])
def test_a_part_that_is_not_here_is_refused(gemma, name, value):
    setattr(gemma.backbone, name, value)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        transformer.weights_of(gemma.backbone)
