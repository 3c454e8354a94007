"""Our attention against KerasHub's own, of every Gemma: grouped heads, soft-cap, sliding window, one token."""

import numpy as np
import pytest


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("length, keys, start", [(9, 9, 0), (1, 12, 7), (4, 12, 3)])
def test_equals_keras_hubs(any_gemma, block, length, keys, start):
    attention = any_gemma.backbone.transformer_layers[block].attention
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, length, 4, 8)).astype("float32")
    k, v = rng.normal(size=(2, 2, keys, 2, 8)).astype("float32")
    causal = start + np.arange(length)[:, None] >= np.arange(keys)[None]
    mask = causal[None] & (rng.random((2, length, keys)) > 0.2) | (np.arange(keys) == start)[None, None]
    ours = attention._compute_attention(q, k, v, mask, cache_update_index=start)
    theirs = type(attention)._compute_attention(attention, q, k, v, mask, cache_update_index=start)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours.shape == (2, length, 4, 8)


def test_a_changed_mask_changes_the_result(gemma):
    attention = gemma.backbone.transformer_layers[0].attention
    rng = np.random.default_rng(4)
    q = rng.normal(size=(1, 3, 4, 8)).astype("float32")
    k, v = rng.normal(size=(2, 1, 3, 2, 8)).astype("float32")
    mask = np.tril(np.ones((1, 3, 3), bool))
    before = np.asarray(attention._compute_attention(q, k, v, mask))
    mask[0, 2, 0] = False
    after = np.asarray(attention._compute_attention(q, k, v, mask))
    assert np.abs(after[0, 2] - before[0, 2]).max() > 1e-3
    np.testing.assert_array_equal(after[0, :2], before[0, :2])
