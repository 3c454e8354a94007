"""Gemma 3 from scratch in jax.numpy: small pure functions, from token ids to logits, equal to KerasHub's model.

Shapes are written with T tokens, width D, N query heads, K key/value heads, H numbers a head, F numbers inside the
MLP and V tokens in the vocabulary. One text at a time: there is no batch axis and no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Weights = Mapping[str, Any]


class GemmaOutput(NamedTuple):
    """What `gemma` computes on the way.

    Invariants: there is one more hidden state than there are blocks; each row of an attention matrix sums to 1 and
    is zero where the block's mask is False.
    """

    hidden_states: list[Array]  # (T, D) each: the scaled embeddings, then after block 0, 1, …
    attention: list[Array]  # (N, T, T) each, a block after the other: query head, reading token, token read
    logits: Array  # (T, V): row t scores the token after token t


def rms_norm(x: Any, scale: Any, epsilon: float = 1e-6) -> Array:
    """Divides each vector by its root mean square, then multiplies each coordinate by a learned number.

    y = x / √(mean(x²) + epsilon) · (1 + scale). Gemma stores the factor less 1, so a scale of zeros changes nothing.

    Args:
        x: (..., D).
        scale: (D,).
        epsilon: Float, keeps a vector of zeros from being divided by zero.

    Returns:
        (..., D), float32.

    Raises:
        ValueError: If `scale` has not one number for each coordinate.

    Example:

    >>> [f"{y:.3f}" for y in rms_norm([3.0, 4.0], [0.0, 1.0])]  # the root mean square is √12.5
    ['0.849', '2.263']

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; their gain is 1 + scale here.
    """
    x, scale = jnp.asarray(x, "float32"), jnp.asarray(scale, "float32")
    _require(scale.shape == x.shape[-1:], f"`scale` must have x's last axis, {x.shape[-1:]}", scale.shape)
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)  # (..., 1)
    return x / jnp.sqrt(mean_square + epsilon) * (1 + scale)


def rotary_embedding(x: Any, wavelength: float = 10_000.0, positions: Any = None) -> Array:
    """Rotates pairs of coordinates by an angle that grows with the token's position (RoPE).

    Coordinates i and i + H/2 are a pair. At position t it turns by t · wavelength^(−2i/H) radians: the first pair by
    a whole radian a token, the last by hardly more than 1/wavelength. Lengths stay as they are, and the dot
    product of two rotated vectors depends on the distance of their positions only.

    Args:
        x: (T, N, H), H even: queries or keys.
        wavelength: Float, above 1: 10,000 in Gemma 3's local blocks, 1,000,000 in its global ones.
        positions: (T,) numbers; 0, 1, … by default.

    Returns:
        (T, N, H), float32.

    Raises:
        ValueError: If `x` is not (T, N, H) with H even, there is not one position a token, or `wavelength` ≤ 1.

    Example:

    >>> [f"{y:.2f}" for y in rotary_embedding([[[1.0, 0.0]], [[1.0, 0.0]]])[1, 0]]  # one radian: cosine and sine
    ['0.54', '0.84']

    Reference: Su et al. 2021, arXiv:2104.09864, section 3.4.2, equation 34. They pair neighbours, Gemma pairs halves.
    """
    x = jnp.asarray(x, "float32")
    _require(x.ndim == 3 and x.shape[-1] % 2 == 0, "`x` must be (tokens, heads, an even number)", x.shape)
    _require(wavelength > 1, "`wavelength` must be above 1", wavelength)
    positions = jnp.arange(len(x)) if positions is None else jnp.asarray(positions)
    _require(positions.shape == x.shape[:1], f"`positions` must be of shape ({len(x)},)", positions.shape)
    half = x.shape[-1] // 2
    speeds = 1 / wavelength ** (jnp.arange(half) / half)  # (H/2,), radians a token
    angles = positions[:, None, None] * speeds  # (T, 1, H/2)
    first, second = x[..., :half], x[..., half:]  # (T, N, H/2) each
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_mask(length: int) -> Array:
    """Which token may read which: itself and the earlier ones.

    Args:
        length: Integer T, tokens.

    Returns:
        (T, T) booleans: row t, column s is True where token t may read token s.

    Raises:
        ValueError: If `length` is below 1.

    Example:

    >>> causal_mask(3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]

    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    """
    _require(length >= 1, "`length` must be at least 1", length)
    position = jnp.arange(length)
    return position[:, None] >= position[None, :]


def sliding_window_mask(length: int, window: int) -> Array:
    """The causal mask with the far past cut off: a token reads the last `window` tokens, itself among them.

    Args:
        length: Integer T, tokens.
        window: Integer, tokens: 512 in Gemma 3 270M.

    Returns:
        (T, T) booleans, as in `causal_mask`.

    Raises:
        ValueError: If `length` or `window` is below 1.

    Example:

    >>> sliding_window_mask(4, window=2).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]

    Reference: Beltagy et al. 2020, arXiv:2004.05150, section 3.1, here without the tokens to the right.
    """
    _require(window >= 1, "`window` must be at least 1", window)
    causal, position = causal_mask(length), jnp.arange(length)
    return causal & (position[:, None] - position[None, :] < window)


def grouped_query_attention(x: Any, weights: Weights, mask: Any, wavelength: float = 1e4) -> tuple[Array, Array]:
    """Lets each token collect from the tokens it may read, N heads in parallel, N/K of them sharing keys and values.

    For query head n and its key/value head k = ⌊n · K/N⌋, with RMS norm and RoPE on queries and keys:
    weights = softmax(q kᵀ / √H, masked), mixed = weights · v. The output sums the heads' mixtures through `output`.

    Args:
        x: (T, D), normalized hidden states.
        weights: `query` (N, D, H), `key` and `value` (K, D, H), `query_norm` and `key_norm` (H,), `output` (N, H, D).
        mask: (T, T) booleans, True where the row's token may read the column's.
        wavelength: Float, RoPE's.

    Returns:
        The output (T, D), and the attention weights (N, T, T), whose rows sum to 1.

    Raises:
        ValueError: If `mask` is not (T, T), a row of it allows nothing, or K does not divide N.

    Example:

    >>> names = {"query": (4, 6, 2), "key": (1, 6, 2), "value": (1, 6, 2), "output": (4, 2, 6)}
    >>> weights = {name: jnp.ones(shape) for name, shape in names.items()}
    >>> output, attention = grouped_query_attention(
    ...     jnp.ones((3, 6)), weights | {"query_norm": jnp.zeros(2), "key_norm": jnp.zeros(2)}, causal_mask(3))
    >>> output.shape, attention.shape, attention[0, 0].tolist()  # the first token can read only itself
    ((3, 6), (4, 3, 3), [1.0, 0.0, 0.0])

    Reference: Ainslie et al. 2023, arXiv:2305.13245, section 2.2; Gemma 3 report, section 2, for the norms.
    """
    x, mask = jnp.asarray(x), jnp.asarray(mask, bool)
    _require(mask.shape == (len(x), len(x)), f"`mask` must be ({len(x)}, {len(x)})", mask.shape)
    _require(mask.any(axis=-1).all(), "`mask` must have a True in every row", "a row without")
    heads, kv_heads = len(weights["query"]), len(weights["key"])
    _require(heads % kv_heads == 0, "`weights` must have query heads in multiples of key heads", (heads, kv_heads))
    query = jnp.einsum("td,ndh->tnh", x, weights["query"])  # (T, N, H)
    key = jnp.einsum("td,kdh->tkh", x, weights["key"])  # (T, K, H)
    value = jnp.einsum("td,kdh->tkh", x, weights["value"])  # (T, K, H)
    query = rotary_embedding(rms_norm(query, weights["query_norm"]), wavelength)
    key = rotary_embedding(rms_norm(key, weights["key_norm"]), wavelength)
    key, value = (jnp.repeat(part, heads // kv_heads, axis=1) for part in (key, value))  # (T, N, H)
    scores = jnp.einsum("tnh,snh->nts", query, key) * query.shape[-1] ** -0.5  # (N, T, T)
    attention = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("nts,snh->tnh", attention, value)  # (T, N, H)
    return jnp.einsum("tnh,nhd->td", mixed, weights["output"]), attention


def geglu(x: Any, gate: Any, up: Any, down: Any) -> Array:
    """Gemma's MLP: two projections, one of which opens or closes the other, and one back. Each token on its own.

    y = (GELU(x · gate) ⊙ (x · up)) · down, with GELU(z) ≈ z/2 · (1 + tanh(√(2/π) (z + 0.044715 z³))).

    Args:
        x, gate, up, down: (..., D), (D, F), (D, F) and (F, D).

    Returns:
        (..., D).

    Raises:
        ValueError: If `gate` or `up` is not (D, F), or `down` is not (F, D).

    Example:

    >>> float(geglu(jnp.array([10.0]), [[1.0]], [[2.0]], [[1.0]])[0])  # GELU(10) is 10
    200.0

    Reference: Shazeer 2020, arXiv:2002.05202, section 2; Hendrycks and Gimpel, arXiv:1606.08415, for the GELU.
    """
    x, gate, up, down = (jnp.asarray(part) for part in (x, gate, up, down))
    fits = gate.ndim == 2 and gate.shape == up.shape == down.shape[::-1] and len(gate) == x.shape[-1]
    wanted = f"`gate` and `up` must be (D, F), `down` (F, D), with D = {x.shape[-1]}"
    _require(fits, wanted, f"{gate.shape}, {up.shape} and {down.shape}")
    return (jax.nn.gelu(x @ gate, approximate=True) * (x @ up)) @ down


def gemma_block(x: Any, weights: Weights, mask: Any, wavelength: float) -> tuple[Array, Array]:
    """One block: attention, then the MLP, each normalized before and after and added to the residual stream.

    a = x + norm(attention(norm(x))), y = a + norm(geglu(norm(a))).

    Args and Returns as `grouped_query_attention`'s; x is the residual stream and `weights` a block of `weights_of`.

    Reference: Gemma 2 report, arXiv:2408.00118, section 2, for the norms on both sides.
    """
    normed = rms_norm(x, weights["pre_attention_norm"])
    mixed, attention = grouped_query_attention(normed, weights, mask, wavelength)
    x = x + rms_norm(mixed, weights["post_attention_norm"])
    hidden = geglu(rms_norm(x, weights["pre_mlp_norm"]), weights["gate"], weights["up"], weights["down"])
    return x + rms_norm(hidden, weights["post_mlp_norm"]), attention


def gemma(token_ids: Any, weights: Weights) -> GemmaOutput:
    """The whole model: embedding · √D, the blocks, a last norm, and the embedding again for the logits.

    Args:
        token_ids: (T,) integers in [0, V), `<bos>` first.
        weights: From `weights_of`.

    Returns:
        A `GemmaOutput`: hidden states, attention weights, logits.

    Raises:
        ValueError: If `token_ids` is not a nonempty row of integers in [0, V).

    Example:

    >>> output = gemma([2, 651, 5347], weights_of(backbone))  # doctest: +SKIP
    >>> len(output.hidden_states), output.logits.shape        # doctest: +SKIP
    (19, (3, 262144))

    Reference: Gemma 3 report, arXiv:2503.19786, section 2.
    """
    ids, embedding = jnp.asarray(token_ids), weights["embedding"]
    kind = f"{ids.dtype} of shape {ids.shape}"
    _require(ids.ndim == 1 and ids.size and ids.dtype.kind in "iu", "`token_ids` must be a row of integers", kind)
    inside = ids.min() >= 0 and ids.max() < len(embedding)  # jax would read the last row without a word
    _require(inside, f"`token_ids` must be in [0, {len(embedding)})", f"{ids.min()} to {ids.max()}")
    x = embedding[ids] * jnp.sqrt(jnp.float32(embedding.shape[1]))  # (T, D)
    hidden_states, attention = [x], []
    for block in weights["blocks"]:
        window = block["window"] or len(ids)
        x, rows = gemma_block(x, block, sliding_window_mask(len(ids), window), block["wavelength"])
        hidden_states.append(x)
        attention.append(rows)
    logits = rms_norm(x, weights["final_norm"]) @ embedding.T  # (T, V)
    return GemmaOutput(hidden_states, attention, logits)


def weights_of(backbone: Any) -> dict[str, Any]:
    """A KerasHub `Gemma3Backbone`'s weights as plain dictionaries of float32 arrays, not copied where they are float32.

    Args:
        backbone: KerasHub's `Gemma3Backbone`, text only.

    Returns:
        `embedding` (V, D), `final_norm` (D,), and `blocks`, a dictionary each: `query` (N, D, H), `key` and `value`
        (K, D, H), `output` (N, H, D), `gate` and `up` (D, F), `down` (F, D), the norms' scales, `window` (integer,
        or None in a global block) and `wavelength`.

    Raises:
        ValueError: If the backbone is no Gemma 3, or has a part that `gemma` has not.

    Example:

    >>> weights_of(gemma_lora.load_gemma().backbone)["blocks"][5]["window"] is None  # doctest: +SKIP
    True
    """
    missing = _what_is_not_here(backbone)
    _require(not missing, "`backbone` must be a text-only Gemma 3 as in 270M and 1B", missing)
    blocks = []
    for layer in backbone.transformer_layers:
        heads = layer.attention
        kernels = {"query": heads.query_dense, "key": heads.key_dense, "value": heads.value_dense}
        kernels |= {"output": heads.output_dense, "down": layer.ffw_linear}
        kernels |= {"gate": layer.gating_ffw, "up": layer.gating_ffw_2}
        norms = {"query_norm": heads.query_norm, "key_norm": heads.key_norm}
        norms |= {"pre_attention_norm": layer.pre_attention_norm, "post_attention_norm": layer.post_attention_norm}
        norms |= {"pre_mlp_norm": layer.pre_ffw_norm, "post_mlp_norm": layer.post_ffw_norm}
        block: dict[str, Any] = {name: _array(part.kernel) for name, part in kernels.items()}
        block |= {name: _array(part.scale) for name, part in norms.items()}
        block["window"] = heads.sliding_window_size if heads.use_sliding_window_attention else None
        blocks.append(block | {"wavelength": float(heads.rope_wavelength)})
    ends = {"embedding": backbone.token_embedding.embeddings, "final_norm": backbone.layer_norm.scale}
    return {name: _array(variable) for name, variable in ends.items()} | {"blocks": blocks}


def _require(fits: Any, expected: str, received: Any) -> None:
    if not fits:
        raise ValueError(f"{expected}. Received: {received}")


def _array(variable: Any) -> Array:
    return jnp.asarray(getattr(variable, "value", variable), "float32")


def _what_is_not_here(backbone: Any) -> str:
    """What `gemma` would compute wrongly without a word: Gemma 1 and 2, and the larger Gemma 3 with images."""
    if type(backbone).__name__ != "Gemma3Backbone":
        return f"the class {type(backbone).__name__}"
    wanted: dict[str, Any] = {"global_rope_scaling_factor": 1.0, "use_bidirectional_attention": False}
    wanted |= dict.fromkeys(("use_query_key_norm", "use_post_ffw_norm", "use_post_attention_norm"), True)
    wanted |= dict.fromkeys(("vision_encoder", "attention_logit_soft_cap", "final_logit_soft_cap"))
    values = {name: getattr(backbone, name, value) for name, value in wanted.items()}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value != wanted[name])
