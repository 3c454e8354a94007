"""chunked_cross_entropy against the loss written out, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.layers import loss
from gemma_lora.layers.loss import chunked_cross_entropy, token_scores
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


@pytest.mark.parametrize("shortcut", ["mixed_precision", "filter_gradient"])
@pytest.mark.parametrize("unsure", [0, 1, 16, 17, 100, 150])
def test_a_block_is_left_out_only_for_tokens_in_whose_softmax_it_has_no_share(monkeypatch, shortcut, unsure):
    """Four blocks of 16 entries: only the unsure among 150 tokens give those behind the first block a share."""
    monkeypatch.setattr(loss, "_BLOCK", 16)
    rng = np.random.default_rng(6)
    which = rng.permutation(150) < unsure
    hidden = 0.5 * rng.normal(size=(150, 8)).astype("float32")
    hidden[:, 0] = np.where(which, 0.0, 16.0)
    embeddings = rng.normal(size=(64, 8)).astype("float32")
    embeddings[:, 0] = np.where(np.arange(64) < 16, 0.0, -1.0)
    targets, weights = jnp.asarray(rng.integers(0, 16, 150)), np.ones(150, "float32")

    def gradient(negligible):
        monkeypatch.setattr(loss, "NEGLIGIBLE", negligible)
        return np.asarray(
            jax.grad(lambda h: chunked_cross_entropy(h, embeddings, targets, weights, 150, **{shortcut: True}))(hidden)
        )

    filtered, everything, nothing = gradient(loss.NEGLIGIBLE), gradient(0.0), gradient(2.0)
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
    monkeypatch.setattr(loss, "_BLOCK", block)
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
