"""KerasHub's Gemma blocks, changed in place: examples that share a row do not see each other, and a step is faster.

What they compute otherwise is what KerasHub computes. The layers keep their classes and their weights.
"""

from __future__ import annotations

import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp

from gemma_lora.base.keras_on_jax import ops


def enable_segments(backbone) -> None:
    """Lets a backbone's padding mask carry segment ids, so that several examples share a row; faster blocks.

    Where the mask holds 0 for padding and 1, 2, … for the row's examples, a token attends to earlier
    tokens of its own example only. Rotary positions are relative, so each example has the hidden states it has
    alone. A mask of zeros and ones means what it meant before. With a cache (generation) nothing changes.
    Norms and attention's softmax compute what they did, on arrays of two axes, rotations are constants, and the MLP's
    activation is `gated_gelu`. The inverse is `disable_segments`.

    Args:
        backbone: KerasHub's `GemmaBackbone` or `Gemma3Backbone`; changed in place.
    """

    def segment_mask(self, x, padding_mask, *rest, **named) -> Any:
        cache = named.get("cache", rest[-2] if len(rest) >= 2 else None)
        if cache is not None or padding_mask is None:
            return type(self)._compute_attention_mask(self, x, padding_mask, *rest, **named)
        segments = ops.cast(padding_mask, "int32")  # (B, T)
        length = ops.shape(x)[1]
        positions = ops.arange(length, dtype="int32")
        causal = positions[:, None] >= positions[None, :]  # (T, T)
        same = ops.equal(segments[:, :, None], segments[:, None, :])  # (B, T, T)
        return ops.logical_and(ops.logical_and(causal[None], same), segments[:, None, :] > 0)

    for block in backbone.transformer_layers:
        block._compute_attention_mask = types.MethodType(segment_mask, block)
        block.call = types.MethodType(_block, block)
        block.attention._compute_attention = types.MethodType(_attention, block.attention)
    rotations: dict[Any, Any] = {}
    for layer in backbone._flatten_layers():
        if type(layer).__name__ == "RMSNormalization":
            layer.call = types.MethodType(_norm_in_rows, layer)
        elif type(layer).__name__ == "RotaryEmbedding":
            layer._compute_cos_sin_embedding = functools.partial(_known_rotation, layer, rotations)


def disable_segments(backbone) -> None:
    """Gives a backbone KerasHub's own blocks back: the inverse of `enable_segments`, to compare with."""
    for block in backbone.transformer_layers:
        vars(block).pop("_compute_attention_mask", None)
        vars(block).pop("call", None)
        vars(block.attention).pop("_compute_attention", None)
    for layer in backbone._flatten_layers():
        if type(layer).__name__ == "RMSNormalization":
            vars(layer).pop("call", None)
        vars(layer).pop("_compute_cos_sin_embedding", None)


def _block(self, x, padding_mask=None, *rest, **named):
    """A decoder block's own `call` with `gated_gelu`; with a cache, images, dropout or float16 it is KerasHub's."""
    if self.dropout or x.dtype == "float16" or any(value is not None for value in (*rest, *named.values())):
        return type(self).call(self, x, padding_mask, *rest, **named)
    normalized = self.pre_attention_norm(x)
    attention = self.attention(normalized, attention_mask=self._compute_attention_mask(normalized, padding_mask))
    x = x + (self.post_attention_norm(attention) if self.use_post_attention_norm else attention)
    normalized = self.pre_ffw_norm(x)
    y = self.ffw_linear(gated_gelu(self.gating_ffw(normalized), self.gating_ffw_2(normalized)))
    return x + (self.post_ffw_norm(y) if self.use_post_ffw_norm else y)


_SLOPE, _CUBIC = 2.0 * math.sqrt(2.0 / math.pi), 0.044715  # GELU's approximation: x · sigmoid(slope · (x + cubic · x³))


@jax.custom_vjp
def gated_gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`gelu(gate) * up` with GELU's tanh approximation: between the MLP's matrices in Gemma's blocks.

    For the backward pass only `gate` and `up` are kept, where XLA with JAX's own gradient keeps tanh and its slope too:
    110 MB of the 490 that a step of 384 tokens of Gemma 3 270M holds.

    Args:
        gate, up: (…, d), of one shape and float dtype.

    Returns:
        (…, d), of the same dtype; computed in float32.

    Example:

    >>> gated_gelu(jnp.array([0.0, 30.0]), jnp.array([2.0, 2.0])).tolist()
    [0.0, 60.0]

    Reference: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units" (https://arxiv.org/abs/1606.08415), section 2;
    Shazeer 2020, "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202), section 2, GEGLU.
    """
    return (_gelu(gate)[0] * up.astype(jnp.float32)).astype(up.dtype)


def _gelu(x):
    """`(value, slope)` of GELU's tanh approximation at x, float32; 0.5 · (1 + tanh(z)) is sigmoid(2z)."""
    x = x.astype(jnp.float32)
    share = 1.0 / (1.0 + jnp.exp(-_SLOPE * (x + _CUBIC * x * x * x)))
    value = x * share
    return value, share + value * (1.0 - share) * _SLOPE * (1.0 + 3.0 * _CUBIC * x * x)


def _gated_forward(gate, up):
    return gated_gelu(gate, up), (gate, up)


def _gated_backward(inputs, gradient):
    gate, up = inputs
    # A term of zero that XLA cannot foresee, or it would keep the forward pass's sigmoid for this: see `recomputed`.
    value, slope = _gelu(gate + 0 * gradient[(0,) * gradient.ndim])
    gradient, up = gradient.astype(jnp.float32), up.astype(jnp.float32)
    return (gradient * up * slope).astype(gate.dtype), (gradient * value).astype(gate.dtype)


gated_gelu.defvjp(_gated_forward, _gated_backward)


def _norm_in_rows(self, x):
    """A norm's own `call` on (tokens, width).

    XLA on the CPU (jax 0.10.2) takes up to 25 times as long for the sum of a product over the last axis, which the
    gradient needs, where the first axis is 1: a batch of one row.
    """
    return ops.reshape(type(self).call(self, ops.reshape(x, (-1, x.shape[-1]))), x.shape)


def _known_rotation(self, known: dict[Any, Any], inputs, start_index=0, positions=None):
    """A rotary layer's cosines and sines: constants of the program where it starts at position 0, as in training.

    XLA on the CPU (jax 0.10.2) otherwise computes them anew for every row, head and gradient that they meet.

    Args:
        known: What layers of one backbone have computed already; changed.
        inputs, start_index, positions: As in KerasHub's `_compute_cos_sin_embedding`.
    """

    def own(inputs):
        return type(self)._compute_cos_sin_embedding(self, inputs, start_index, positions)

    from_zero = isinstance(start_index, int) and start_index == 0 and positions is None
    if not from_zero or jax.default_backend() != "cpu":
        return own(inputs)
    kind = (self.max_wavelength, self.scaling_factor, self.compute_dtype, inputs.shape[1:])
    if kind not in known:
        with jax.ensure_compile_time_eval():
            known[kind] = own(jax.numpy.zeros((1, *inputs.shape[1:])))
    return known[kind]


def attention_scale(layer) -> float:
    """What a KerasHub attention layer multiplies its queries by."""
    return (layer.head_dim if layer.query_head_dim_normalize else layer.hidden_dim // layer.num_query_heads) ** -0.5


def _attention(self, q, k, v, attention_mask, training=False, cache_update_index=0):
    """KerasHub's `_compute_attention` with the query's axes left in their order, and without most unseen keys.

    q is (B, T, heads, H), k and v are (B, S, kv_heads, H), the result is (B, T, heads, H). KerasHub forms
    (B, kv_heads, groups, T, S); with T before the groups, and one kv head as in Gemma 3 270M, nothing has to be
    transposed. Where queries and keys are of the same positions, queries are taken in up to four stretches, each with
    the keys up to its own last position: later ones are masked. Fused kernels (GPU, TPU) and dropout take KerasHub's
    own way. While training, `self.rounded_product` forms the products if `FineTuner` has set it.
    """
    if self._use_fused_attention_op() or self.dropout or attention_mask is None:
        return type(self)._compute_attention(self, q, k, v, attention_mask, training, cache_update_index)
    if self.use_sliding_window_attention:
        attention_mask = self._mask_sliding_window(attention_mask, cache_update_index=cache_update_index)
    seen = ops.cast(attention_mask, "bool")  # (B, T, S)
    batch, length, heads, size = q.shape
    kv_heads, groups, keys = self.num_key_value_heads, heads // self.num_key_value_heads, k.shape[1]
    q = ops.reshape(q * ops.cast(attention_scale(self), q.dtype), (batch, length, kv_heads, groups, size))
    q = ops.transpose(q, (0, 2, 1, 3, 4))  # (B, kv_heads, T, groups, H)
    k, v = ops.transpose(k, (0, 2, 1, 3)), ops.transpose(v, (0, 2, 1, 3))  # (B, kv_heads, S, H)
    rounded = getattr(self, "rounded_product", None) if training and q.dtype == "float32" else None
    results = []
    for start, end in _stretches(length) if keys == length else [(0, length)]:
        last = end if keys == length else keys
        seen_here, keys_here, values_here = seen[:, start:end, :last], k[:, :, :last], v[:, :, :last]
        results.append(_attended(self, q[:, :, start:end], keys_here, values_here, seen_here, rounded or ops.matmul))
    result = results[0] if len(results) == 1 else ops.concatenate(results, axis=2)
    return ops.reshape(ops.transpose(result, (0, 2, 1, 3, 4)), (batch, length, heads, size))


def _stretches(length: int) -> list[tuple[int, int]]:
    """`(start, end)` of up to four stretches of positions, each of at least 192.

    With n stretches (n + 1) / 2n of the products are left. On two cores three of 128 positions were no faster than two
    of 192, and two of 128 no faster than one of 256.
    """
    size = -(-length // max(1, min(4, length // 192)))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attended(layer, q, k, v, seen, product):
    """Attention of scaled queries (B, kv_heads, T, groups, H) to k and v (B, kv_heads, S, H) where `seen` (B, T, S)."""
    batch, kv_heads, length, groups, size = q.shape
    keys = k.shape[2]
    q = ops.reshape(q, (batch, kv_heads, length * groups, size))
    if length == 1:  # one token beside a long cache: XLA transposes the right factor, so let that be the query
        logits = ops.swapaxes(ops.matmul(k, ops.swapaxes(q, 2, 3)), 2, 3)
    else:
        logits = product(q, ops.swapaxes(k, 2, 3))
    if layer.logit_soft_cap is not None:
        logits = ops.tanh(logits / layer.logit_soft_cap) * layer.logit_soft_cap
    split = ops.cast(ops.reshape(logits, (batch, kv_heads, length, groups, keys)), "float32")
    rows = ops.reshape(ops.where(seen[:, None, :, None, :], split, -1e9), (-1, keys))  # see `_norm_in_rows`
    weights = ops.reshape(ops.cast(layer.softmax(rows), logits.dtype), (batch, kv_heads, length * groups, keys))
    return ops.reshape(product(weights, v), (batch, kv_heads, length, groups, size))
