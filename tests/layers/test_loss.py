"""chunked_cross_entropy against the loss written out, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.layers import loss, vocabulary
from gemma_lora.layers.loss import chunked_cross_entropy, fitting_chunk, token_scores
from gemma_lora.quantization.packed import Bfloat16Rows, Int8Rows


def problem(seed=0, dtype="float32", masked_rows=()):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(3, 17, 8)), dtype)
    embeddings = jnp.asarray(rng.normal(size=(50, 8)), dtype)
    targets = jnp.asarray(rng.integers(0, 50, (3, 17)))
    weights = (rng.random((3, 17)) > 0.6) * rng.choice([0.5, 1.0, 2.0], (3, 17))
    weights[list(masked_rows)] = 0
    return hidden, embeddings, targets, jnp.asarray(weights, "float32")


def full_loss(hidden, embeddings, targets, weights, soft_cap=None):
    logits = jnp.einsum("btd,vd->btv", hidden.astype("float32"), embeddings.astype("float32"))
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights) / jnp.sum(weights)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 51, 256])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_value_and_gradients_equal_the_full_loss(chunk_size, soft_cap, dtype, tolerance):
    hidden, embeddings, targets, weights = problem(dtype=dtype, masked_rows=(1,))

    def chunked(hidden, embeddings):
        return chunked_cross_entropy(hidden, embeddings, targets, weights, chunk_size, soft_cap, train_embeddings=True)

    def full(hidden, embeddings):
        return full_loss(hidden, embeddings, targets, weights, soft_cap)

    value, gradients = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, embeddings)
    expected, expected_gradients = jax.value_and_grad(full, (0, 1))(hidden, embeddings)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, "float32"), np.asarray(theirs, "float32"), atol=tolerance * np.abs(theirs).max()
        )


@pytest.mark.slow
def test_gradient_is_the_finite_difference():
    hidden, embeddings, targets, weights = problem(3)
    gradient = jax.grad(chunked_cross_entropy)(hidden, embeddings, targets, weights, 4)
    direction = jnp.asarray(np.random.default_rng(5).normal(size=hidden.shape), "float32")
    step = 1e-2
    ahead = full_loss(hidden + step * direction, embeddings, targets, weights)
    behind = full_loss(hidden - step * direction, embeddings, targets, weights)
    np.testing.assert_allclose(jnp.sum(gradient * direction), (ahead - behind) / (2 * step), rtol=1e-3)


def test_tokens_without_loss_change_nothing():
    hidden, embeddings, targets, weights = problem(1)
    noise = jnp.where(weights[..., None] > 0, hidden, 1e6)
    a = chunked_cross_entropy(hidden, embeddings, targets, weights)
    b = chunked_cross_entropy(noise, embeddings, targets, weights)
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_no_weight_at_all_is_zero_with_zero_gradient():
    hidden, embeddings, targets, weights = problem(2, masked_rows=(0, 1, 2))
    value, gradient = jax.value_and_grad(chunked_cross_entropy)(hidden, embeddings, targets, weights)
    assert value == 0 and not np.any(gradient)


WAYS = {
    "plain": {},
    "mixed": {"mixed_precision": True},
    "filtered": {"filter_gradient": True},
    "trained": {"train_embeddings": True},
    "trained in mixed precision": {"train_embeddings": True, "mixed_precision": True},
    "soft cap": {"soft_cap": 5.0},
    "normalizer": {"normalizer": 7.0},
}


def hidden_and_embedding_gradients(hidden, embeddings, targets, weights, **named):
    """`(loss, gradients)`; packed embeddings have no gradient."""
    which = (0, 1) if isinstance(embeddings, jax.Array) else (0,)

    def both(hidden, embeddings, targets, weights):
        return chunked_cross_entropy(hidden, embeddings, targets, weights, **named)

    return jax.jit(jax.value_and_grad(both, which))(hidden, embeddings, targets, weights)


@pytest.mark.parametrize(
    "way, table", [*((way, jnp.asarray) for way in WAYS), ("plain", Int8Rows.of), ("mixed", Bfloat16Rows.of)]
)
def test_a_masked_token_adds_nothing_whatever_it_holds(monkeypatch, way, table):
    monkeypatch.setattr(vocabulary, "_BLOCK", 16)
    named = WAYS[way] | {"chunk_size": 4}
    hidden, embeddings, targets, weights = problem(1, masked_rows=(1,))
    embeddings = table(embeddings)
    masked = np.asarray(weights) == 0
    assert masked.any() and (~masked).sum() % 4  # the last chunk has masked tokens too
    expected = hidden_and_embedding_gradients(hidden, embeddings, targets, weights, **named)
    spoilt, wild = np.array(hidden), np.array(targets)
    spoilt[masked] = np.resize([-np.inf, np.inf, np.nan, 1e38], (masked.sum(), 1))
    wild[masked] = np.resize([-100, 50, 2**31 - 1, -1], masked.sum())
    found = hidden_and_embedding_gradients(jnp.asarray(spoilt), embeddings, wild, weights, **named)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    d_hidden = np.asarray(jax.tree.leaves(found)[1])
    assert np.isfinite(d_hidden).all() and not d_hidden[masked].any() and d_hidden[~masked].any()


@pytest.mark.parametrize("way", ["plain", "filtered", "trained in mixed precision", "normalizer"])
def test_all_tokens_masked_is_zero_with_zero_gradients(way):
    hidden, embeddings, targets, weights = problem(2, masked_rows=(0, 1, 2))
    value, gradients = hidden_and_embedding_gradients(
        jnp.full_like(hidden, -jnp.inf), embeddings, targets - 100, weights, **WAYS[way]
    )
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


def test_gradients_with_spoilt_masked_tokens_are_the_finite_differences():
    """Of a plain log-softmax over the tokens that count, in float64."""
    hidden, embeddings, targets, weights = problem(3)
    counted = np.asarray(weights) != 0
    spoilt = jnp.where(counted[..., None], hidden, -jnp.inf)
    _, gradients = hidden_and_embedding_gradients(spoilt, embeddings, targets, weights, train_embeddings=True)

    def plain(hidden, embeddings):
        logits = hidden @ embeddings.T
        chosen = np.take_along_axis(logits, np.asarray(targets)[counted][:, None], axis=1)[:, 0]
        losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - chosen
        return losses @ np.asarray(weights, "float64")[counted] / np.asarray(weights, "float64").sum()

    at = [np.asarray(hidden, "float64")[counted], np.asarray(embeddings, "float64")]
    rng, step = np.random.default_rng(5), 1e-6
    ours = [np.asarray(gradients[0])[counted], np.asarray(gradients[1])]
    for which in (0, 1):
        direction = rng.normal(size=at[which].shape)
        ahead, behind = list(at), list(at)
        ahead[which], behind[which] = at[which] + step * direction, at[which] - step * direction
        difference = (plain(*ahead) - plain(*behind)) / (2 * step)
        np.testing.assert_allclose(np.sum(ours[which] * direction), difference, rtol=1e-4)


@pytest.mark.parametrize("wrong", [50, -1, -100, 2**31 - 1, 2**32 + 5])
def test_a_target_outside_the_vocabulary_is_an_error(wrong):
    hidden, embeddings, targets, weights = problem(1)
    targets = np.asarray(targets, "int64")
    place = tuple(np.argwhere(np.asarray(weights))[0])
    targets[place] = wrong
    for arguments in ((targets, weights), (targets.tolist(), np.asarray(weights).tolist())):
        with pytest.raises(ValueError, match=rf"`targets` must be in \[0, 50\).* targets {wrong} at 1 of 51"):
            chunked_cross_entropy(hidden, embeddings, *arguments)
    with pytest.raises(ValueError, match=rf"\[0, 50\).* targets {wrong} at"):
        token_scores(hidden.reshape(-1, 8), embeddings, targets.reshape(-1))
    with pytest.raises(ValueError, match="`targets`"):  # constants of a compiled program
        jax.jit(lambda h: chunked_cross_entropy(h, embeddings, targets, weights))(hidden)


@pytest.mark.parametrize(
    "way, dtype, wrong",
    [
        ("plain", "int32", 50),
        ("mixed", "int32", -1),
        ("filtered", "uint8", 255),
        ("soft cap", "int16", -100),
        ("normalizer", "uint32", 50),
    ],
)
def test_a_compiled_program_makes_the_loss_of_such_a_target_nan(way, dtype, wrong):
    hidden, embeddings, targets, weights = problem(1)
    targets = np.array(targets, dtype)
    compute = jax.jit(
        lambda h, t, w: jax.value_and_grad(lambda h: chunked_cross_entropy(h, embeddings, t, w, 8, **WAYS[way]))(h)
    )
    fine, _ = compute(hidden, targets, weights)
    assert np.isfinite(fine)
    counted = np.argwhere(np.asarray(weights))
    masked = np.argwhere(np.asarray(weights) == 0)
    targets[tuple(masked[0])] = wrong
    assert compute(hidden, targets, weights)[0] == fine
    targets[tuple(counted[-1])] = wrong
    value, gradient = compute(hidden, targets, weights)
    assert np.isnan(value)
    spoilt = np.isnan(np.asarray(gradient)).any(-1)
    np.testing.assert_array_equal(np.argwhere(spoilt), counted[-1:])  # and that token's gradient, no other's


def test_traced_token_scores_of_such_a_target_are_nan():
    hidden, embeddings, targets, _ = problem(4)
    hidden, targets = hidden.reshape(-1, 8), np.array(targets).reshape(-1)
    losses, likeliest = token_scores(hidden, embeddings, targets)
    targets[[3, 9]] = 50, -1
    found, found_likeliest = jax.jit(token_scores)(hidden, embeddings, targets)
    expected = np.array(losses)
    expected[[3, 9]] = np.nan
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not found_likeliest[3] and not found_likeliest[9]
    np.testing.assert_array_equal(np.delete(found_likeliest, [3, 9]), np.delete(likeliest, [3, 9]))


def test_a_weight_that_is_nan_is_not_a_loss_of_zero():
    hidden, embeddings, targets, weights = problem(1)
    assert np.isnan(chunked_cross_entropy(hidden, embeddings, targets, weights.at[0, 0].set(jnp.nan)))


def test_targets_that_are_no_integers_are_refused():
    hidden, embeddings, targets, weights = problem()
    with pytest.raises(ValueError, match="`targets` must be integers. Received: targets of dtype float32"):
        chunked_cross_entropy(hidden, embeddings, targets + 0.5, weights)


def test_fitting_chunks_are_the_fewest_of_at_most_256_and_equal():
    for tokens in range(1, 1100):
        size = fitting_chunk(tokens)
        chunks = -(-tokens // size)
        assert size % 16 == 0 and 16 <= size <= 256
        assert chunks == -(-tokens // 256)
        assert size == 16 or -(-tokens // (size - 16)) > chunks  # a smaller multiple would need one more
    assert fitting_chunk(0) == 16
    with pytest.raises(ValueError, match="`tokens` must be at least 0. Received: tokens=-1"):
        fitting_chunk(-1)


def test_no_chunk_size_is_the_one_that_fits_all_positions(monkeypatch):
    arguments = problem(1)
    asked = []
    monkeypatch.setattr(loss, "fitting_chunk", lambda tokens: asked.append(tokens) or 16)
    for by_default in (chunked_cross_entropy(*arguments), chunked_cross_entropy(*arguments, chunk_size=None)):
        assert by_default == chunked_cross_entropy(*arguments, chunk_size=16)
    assert asked == [51, 51]


def test_frozen_embeddings_get_no_gradient():
    hidden, embeddings, targets, weights = problem(2)
    gradient = jax.grad(chunked_cross_entropy, argnums=1)(hidden, embeddings, targets, weights)
    assert not np.any(gradient)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"targets": jnp.zeros((2, 2), int)}, "targets"),
        ({"embeddings": jnp.ones((4, 3))}, "agree"),
    ],
)
def test_bad_arguments_are_named(change, message):
    names = ("hidden", "embeddings", "targets", "weights")
    arguments = dict(zip(names, problem(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**arguments)


def test_the_filter_alone_rounds_nothing_and_can_be_left_out_of_mixed_precision():
    hidden, embeddings, targets, weights = problem(4)

    def both(**named):
        return jax.value_and_grad(lambda h: chunked_cross_entropy(h, embeddings, targets, weights, 16, **named))(hidden)

    (plain, plain_gradient), (filtered, gradient) = both(), both(filter_gradient=True)
    assert filtered == plain
    np.testing.assert_allclose(gradient, plain_gradient, atol=1e-4 * np.abs(plain_gradient).max())
    mixed, unfiltered = both(mixed_precision=True), both(mixed_precision=True, filter_gradient=False)
    assert mixed[0] == unfiltered[0] != plain


def test_mixed_precision_is_the_loss_of_rounded_factors():
    hidden, embeddings, targets, weights = problem(4)
    rounded = [x.astype("bfloat16").astype("float32") for x in (hidden, embeddings)]

    def mixed(hidden, embeddings):
        return chunked_cross_entropy(hidden, embeddings, targets, weights, 16, mixed_precision=True)

    value, gradient = jax.value_and_grad(mixed)(hidden, embeddings)
    expected, expected_gradient = jax.value_and_grad(full_loss)(*rounded, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert abs(float(value) - float(full_loss(hidden, embeddings, targets, weights))) > 1e-6  # it did round
    np.testing.assert_allclose(gradient, expected_gradient, atol=2**-7 * np.abs(expected_gradient).max())
    kept, kept_gradient = jax.value_and_grad(mixed)(hidden, Bfloat16Rows.of(embeddings))
    assert kept == value  # the table's bits, kept by who calls this often
    np.testing.assert_array_equal(kept_gradient, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["mixed_precision", "filter_gradient"])
@pytest.mark.parametrize("unsure", [0, 1, 16, 17, 100, 150])
def test_a_block_is_left_out_only_for_tokens_in_whose_softmax_it_has_no_share(monkeypatch, shortcut, unsure):
    """Four blocks of 16 entries: only the unsure among 150 tokens give those behind the first block a share."""
    monkeypatch.setattr(vocabulary, "_BLOCK", 16)
    rng = np.random.default_rng(6)
    which = rng.permutation(150) < unsure
    hidden = 0.5 * rng.normal(size=(150, 8)).astype("float32")
    hidden[:, 0] = np.where(which, 0.0, 16.0)
    embeddings = rng.normal(size=(64, 8)).astype("float32")
    embeddings[:, 0] = np.where(np.arange(64) < 16, 0.0, -1.0)
    targets, weights = jnp.asarray(rng.integers(0, 16, 150)), np.ones(150, "float32")

    def gradient(negligible):
        monkeypatch.setattr(vocabulary, "NEGLIGIBLE", negligible)
        return np.asarray(
            jax.grad(lambda h: chunked_cross_entropy(h, embeddings, targets, weights, 150, **{shortcut: True}))(hidden)
        )

    filtered, everything, nothing = gradient(vocabulary.NEGLIGIBLE), gradient(0.0), gradient(2.0)
    scale = np.abs(everything).max()
    # Products of fewer rows may be summed in another order; what was left out is at most 4 blocks of 2^-16.
    np.testing.assert_allclose(filtered[which], everything[which], atol=1e-6 * scale)
    np.testing.assert_allclose(filtered, everything, atol=1e-4 * scale)
    if unsure:
        assert np.abs(filtered - nothing)[which].max() > 0.1 * scale
    if unsure <= 128:  # above, a product for all of them costs no more
        assert not np.array_equal(filtered[~which], everything[~which])


@pytest.mark.parametrize("count, chunk_size", [(51, 7), (51, 51), (51, 256), (1, 4), (6, 3)])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("block", [16, 50, 1024])
def test_token_scores_are_those_of_the_logits_written_out(monkeypatch, count, chunk_size, soft_cap, block):
    monkeypatch.setattr(vocabulary, "_BLOCK", block)
    hidden, embeddings, targets, _ = problem(4)
    hidden, targets = hidden.reshape(-1, 8)[:count], targets.reshape(-1)[:count]
    logits = np.asarray(hidden, "float64") @ np.asarray(embeddings, "float64").T
    targets = targets.at[::3].set(logits.argmax(axis=1)[::3])  # some that are the likeliest
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    losses, likeliest = token_scores(hidden, embeddings, targets, chunk_size, soft_cap)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(count), targets]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(likeliest, logits.argmax(axis=1) == np.asarray(targets))
    assert likeliest[::3].all() and (count == 1 or not likeliest.all())


def test_token_scores_of_packed_embeddings_are_those_of_the_decoded_ones():
    hidden, embeddings, targets, _ = problem(5)
    hidden, targets = hidden.reshape(-1, 8), targets.reshape(-1)
    packed = Int8Rows.of(embeddings)
    for ours, theirs in zip(
        token_scores(hidden, packed, targets), token_scores(hidden, packed.decode(), targets), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_token_scores_name_what_does_not_fit():
    hidden, embeddings, targets, _ = problem()
    for wrong in ((hidden, embeddings, targets), (hidden[0], embeddings[:, :7], targets[0])):
        with pytest.raises(ValueError, match="`hidden` must be"):
            token_scores(*wrong)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1"):
        token_scores(hidden[0], embeddings, targets[0], chunk_size=0)
