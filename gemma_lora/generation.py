"""Batched greedy generation with a key-value cache, for a Gemma with or without an adapter.

KerasHub's `generate` compiles anew for every input shape. Here prompts are sorted by length and a batch
starts at its shortest prompt: rows that still have prompt tokens are fed those, the others their own. No
padding stands inside a row, so positions are exact for every Gemma. What all prompts begin with (a few-shot prompt's
examples) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.backend import require_jax

require_jax()

import keras  # noqa: E402

_BUCKET = 16  # prefill lengths are multiples of this, so that few shapes are compiled
_MIN_PREFIX = 32  # a shared beginning shorter than this is not worth its own pass


def generate(
    model: keras.Model,
    prompts: str | Sequence[str],
    template: Any = None,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answers prompts greedily.

    Args:
        model: A KerasHub Gemma `CausalLM`, with an adapter or without.
        prompts: A string or a list of strings, as a user writes them (without the template's text).
        template: A `Template`; defaults to the adapter's, else Gemma's chat template.
        max_new_tokens: Integer, the most tokens of an answer.
        batch_size: Integer, prompts answered together.
        on_progress: Called with (answered, all) after each batch.

    Returns:
        The answers, in the prompts' order, without the stop token, stripped of outer white space.

    Raises:
        ValueError: If `max_new_tokens` or `batch_size` is below 1.
    """
    from gemma_lora.data import Template, encode_prompt

    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            "`max_new_tokens` and `batch_size` must be at least 1. "
            f"Received: max_new_tokens={max_new_tokens}, batch_size={batch_size}"
        )
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    template = template or getattr(model, "gemma_lora_template", None) or Template.gemma_chat()
    tokenizer = model.preprocessor.tokenizer
    stops = sorted({tokenizer.token_to_id(token) for token in (*template.stop, "<eos>")})
    encoded = [np.asarray(encode_prompt(text, tokenizer, template), np.int32) for text in prompts]
    rows = generate_tokens(model, encoded, stops, max_new_tokens, batch_size, on_progress)
    return [tokenizer.detokenize([int(i) for i in row]).strip() if len(row) else "" for row in rows]


def generate_tokens(
    model: keras.Model,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Greedy continuations of token sequences; see `generate`.

    Returns:
        One int32 array a prompt: the new tokens before the first stop token.
    """
    if not prompts:
        return []
    engine = _Engine(model)
    prefix = _shared_prefix(prompts) if len(prompts) > 1 else 0
    caches = engine.prefix_caches(prompts[0][:prefix]) if prefix else None
    order = np.argsort([len(p) for p in prompts], kind="stable")
    batch_size = min(batch_size, len(prompts))
    answers = [np.zeros(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first prompt: one compiled shape serves all.
        filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])
        rows = engine.answer([prompts[i] for i in filled], caches, prefix, stop_ids, max_new_tokens)
        for index, row in zip(chosen, rows, strict=False):
            answers[index] = row
        if on_progress is not None:
            on_progress(min(start + batch_size, len(order)), len(order))
    return answers


def _shared_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Number of tokens all prompts begin with, leaving each at least one of its own; 0 if too few."""
    shortest = min(len(p) for p in prompts)
    stacked = np.stack([p[:shortest] for p in prompts])
    equal = (stacked == stacked[0]).all(axis=0)
    length = int(np.argmin(equal)) if not equal.all() else shortest
    length = min(length, shortest - 1)
    return length if length >= _MIN_PREFIX else 0


class _Engine:
    """The compiled functions of one model; weights are arguments, not constants of the program."""

    def __init__(self, model: keras.Model):
        self.model = model
        self.backbone = model.backbone
        self.variables = list(self.backbone.variables)
        self.values = [v.value for v in self.variables]
        self.prefill = jax.jit(self._prefill, donate_argnums=(2,))
        self.decode = jax.jit(self._decode, donate_argnums=(1,), static_argnames=("max_steps",))

    def _empty_caches(self, batch: int, length: int) -> list:
        backbone = self.backbone
        shape = (batch, length, backbone.num_key_value_heads, backbone.head_dim)
        dtype = backbone.token_embedding.compute_dtype
        if type(backbone).__name__ == "Gemma3Backbone":
            return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in backbone.transformer_layers]
        # Gemma 1 and 2 keep keys and values in one array: (B, 2, T, heads, H).
        return [jnp.zeros((batch, 2, *shape[1:]), dtype) for _ in backbone.transformer_layers]

    def _hidden(self, token_ids, caches, index):
        """Hidden states (B, T, D) of tokens at positions index, index + 1, …, and the caches with them added."""
        backbone = self.backbone
        x = backbone.token_embedding(token_ids)
        x = x * jnp.sqrt(jnp.array(backbone.hidden_dim, jnp.float32)).astype(x.dtype)
        updated = []
        for block, cache in zip(backbone.transformer_layers, caches, strict=True):
            x, cache = block(x, cache=cache, cache_update_index=index)
            updated.append(cache)
        return backbone.layer_norm(x), updated

    def _scope(self, values):
        return keras.StatelessScope(state_mapping=list(zip(self.variables, values, strict=True)))

    def _prefill(self, values, token_ids, caches, index):
        with self._scope(values):
            return self._hidden(token_ids, caches, index)[1]

    def _decode(self, values, tokens, lengths, caches, index, stop_ids, max_steps):
        """Feeds position after position until every row has stopped; returns the tokens."""
        limits = lengths + max_steps
        last = tokens.shape[1] - 1

        def running(state):
            index, _, _, done = state
            return (index < last) & ~jnp.all(done)

        def step(state):
            index, tokens, caches, done = state
            with self._scope(values):
                current = jax.lax.dynamic_slice_in_dim(tokens, index, 1, axis=1)  # (B, 1)
                hidden, caches = self._hidden(current, caches, index)
                predicted = jax.lax.cond(
                    jnp.any(index + 1 >= lengths),
                    lambda: jnp.argmax(self._logits(hidden[:, 0]), axis=-1).astype(jnp.int32),
                    lambda: jnp.zeros(tokens.shape[0], jnp.int32),
                )
            given = jax.lax.dynamic_slice_in_dim(tokens, index + 1, 1, axis=1)[:, 0]
            own = index + 1 >= lengths  # (B,) the prompt is over, the row continues by itself
            token = jnp.where(own, jnp.where(done, stop_ids[0], predicted), given)
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index + 1, axis=1)
            done = done | (own & jnp.isin(token, stop_ids)) | (index + 2 >= limits)
            return index + 1, tokens, caches, done

        done = jnp.zeros(tokens.shape[0], bool)
        return jax.lax.while_loop(running, step, (index, tokens, caches, done))[1]

    def _logits(self, hidden):
        # Soft-capping (Gemma 2) is monotonic, so greedy decoding needs no logits but these.
        return hidden @ self.backbone.token_embedding.embeddings.value.T  # (B, D) -> (B, V)

    def prefix_caches(self, prefix: np.ndarray) -> list:
        """Caches of one row, exactly as long as the prefix."""
        caches = self._empty_caches(1, len(prefix))
        return self.prefill(self.values, jnp.asarray(prefix)[None], caches, 0)

    def answer(self, prompts, prefix_caches, prefix: int, stop_ids, max_new_tokens: int) -> list[np.ndarray]:
        """New tokens of one batch of prompts."""
        lengths = np.array([len(p) for p in prompts], np.int32)
        total = int(-(-(lengths.max() + max_new_tokens) // 32) * 32)
        tokens = np.full((len(prompts), total), stop_ids[0], np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        caches = self._empty_caches(len(prompts), total)
        if prefix_caches is not None:
            caches = jax.tree.map(partial(_spread, batch=len(prompts)), caches, prefix_caches)
        start = prefix + (int(lengths.min()) - 1 - prefix) // _BUCKET * _BUCKET
        if start > prefix:
            caches = self.prefill(self.values, jnp.asarray(tokens[:, prefix:start]), caches, prefix)
        done = self.decode(
            self.values,
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            caches,
            jnp.asarray(start, jnp.int32),
            jnp.asarray(stop_ids, jnp.int32),
            max_steps=max_new_tokens,
        )
        return [
            _until_stop(row[n : n + max_new_tokens], stop_ids) for row, n in zip(np.asarray(done), lengths, strict=True)
        ]


def _spread(cache, prefix, batch: int):
    """Copies a one-row cache into the beginning of every row of a longer, empty one."""
    axis = cache.ndim - 3  # time: (B, T, heads, H), or (B, 2, T, heads, H)
    repeated = jnp.broadcast_to(prefix, (batch, *prefix.shape[1:]))
    return jax.lax.dynamic_update_slice_in_dim(cache, repeated.astype(cache.dtype), 0, axis=axis)


def _until_stop(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, stop_ids))
    return row[: ends[0]] if len(ends) else row
