"""Batched greedy generation with a key-value cache, for a Gemma with or without an adapter.

KerasHub's `generate` compiles anew for every input shape. Here all batches of a call share one shape, so XLA compiles
two programs. The prompts of a batch are read together, some tokens of every row at a time; then each row
goes on at its own position, where its prompt ends (`jax.vmap` over KerasHub's one-row cache update). No padding stands
inside a row, so positions are exact for every Gemma. What all prompts begin with (a few-shot prompt's examples) is
computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.backend import require_jax

require_jax()

import keras  # noqa: E402

from gemma_lora.lora import lora_layers  # noqa: E402
from gemma_lora.packed import Int8Rows  # noqa: E402
from gemma_lora.qlora import head_table  # noqa: E402

_PIECE = 16  # prompt tokens of a row that are read at a time
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
    longest = max(len(p) for p in prompts)
    room = max(-(-(longest - prefix) // _PIECE) * _PIECE, longest - prefix + max_new_tokens)
    total = prefix + -(-room // _PIECE) * _PIECE  # one length for all batches: one program
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first prompt: one compiled shape serves all.
        filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])
        rows = engine.answer([prompts[i] for i in filled], total, caches, prefix, stop_ids, max_new_tokens)
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
        # With its update added, a layer costs one product a token instead of three. Packed weights stay packed.
        self.adapted = [layer for layer in lora_layers(self.backbone) if not layer.is_packed]
        whole = [layer.whole_matrix() for layer in self.adapted]
        # Beside packed weights DoRA's scale is computed once, not for every token.
        self.scaled = [layer for layer in lora_layers(self.backbone) if layer.is_packed and layer.dora]
        scales = [layer.column_scale() for layer in self.scaled]
        self.values = ([v.value for v in self.variables], whole, scales)
        self.prefill = jax.jit(self._prefill, donate_argnums=(2,))
        self.decode = jax.jit(self._decode, donate_argnums=(1, 3), static_argnames=("max_steps",))

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

    @contextlib.contextmanager
    def _scope(self, values):
        """While a program is traced: weights, LoRA's kernels with their updates and DoRA's scales are `values`."""
        values, whole, scales = values
        for layer, matrix in zip(self.adapted, whole, strict=True):
            layer.whole_kernel = lambda matrix=matrix: matrix
        for layer, scale in zip(self.scaled, scales, strict=True):
            layer.fixed_scale = lambda scale=scale: scale
        try:
            with keras.StatelessScope(state_mapping=list(zip(self.variables, values, strict=True))):
                yield
        finally:
            for layer in self.adapted:
                layer.whole_kernel = None
            for layer in self.scaled:
                layer.fixed_scale = None

    def _prefill(self, values, token_ids, caches, index):
        with self._scope(values):
            return self._hidden(token_ids, caches, index)[1]

    def _next_hidden(self, values, tokens, caches, positions):
        """Hidden states (B, D) of one token a row, (B,), each at its own position (B,), and the caches."""

        def one_row(token, caches, position):
            caches = jax.tree.map(lambda cache: cache[None], caches)
            hidden, caches = self._hidden(token[None, None], caches, position)
            return hidden[0, 0], jax.tree.map(lambda cache: cache[0], caches)

        with self._scope(values):
            return jax.vmap(one_row)(tokens, caches, positions)

    def _decode(self, values, tokens, lengths, caches, stop_ids, max_steps):
        """Lets every row go on from its last prompt token until all have stopped; returns tokens (B, T) and caches."""
        rows = jnp.arange(tokens.shape[0])

        def running(state):
            step, _, _, done = state
            return (step < max_steps) & ~jnp.all(done)

        def step(state):
            step, tokens, caches, done = state
            positions = lengths - 1 + step
            hidden, caches = self._next_hidden(values, tokens[rows, positions], caches, positions)
            predicted = jnp.argmax(self._logits(values, hidden), axis=0).astype(jnp.int32)
            token = jnp.where(done, stop_ids[0], predicted)
            tokens = tokens.at[rows, positions + 1].set(token)
            return step + 1, tokens, caches, done | jnp.isin(token, stop_ids)

        done = jnp.zeros(tokens.shape[0], bool)
        return jax.lax.while_loop(running, step, (0, tokens, caches, done))[1:3]

    def _logits(self, values, hidden):
        # Soft-capping (Gemma 2) is monotonic, so greedy decoding needs no logits but these.
        with self._scope(values):
            table = head_table(self.backbone.token_embedding)
            return table.product(hidden) if isinstance(table, Int8Rows) else table @ hidden.T  # (V, B)

    def prefix_caches(self, prefix: np.ndarray) -> list:
        """Caches of one row, exactly as long as the prefix."""
        caches = self._empty_caches(1, len(prefix))
        return self.prefill(self.values, jnp.asarray(prefix)[None], caches, 0)

    def answer(
        self, prompts, total: int, prefix_caches, prefix: int, stop_ids, max_new_tokens: int
    ) -> list[np.ndarray]:
        """New tokens of one batch of prompts, in caches of `total` positions."""
        lengths = np.array([len(p) for p in prompts], np.int32)
        tokens = np.full((len(prompts), total + 1), stop_ids[0], np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        caches = self._empty_caches(len(prompts), total)
        if prefix_caches is not None:
            caches = jax.tree.map(partial(_spread, batch=len(prompts)), caches, prefix_caches)
        # What this writes behind a shorter prompt's end is written over before any token attends to it.
        for start in range(prefix, int(lengths.max()) - 1, _PIECE):
            piece = jnp.asarray(tokens[:, start : start + _PIECE])
            caches = self.prefill(self.values, piece, caches, jnp.asarray(start, jnp.int32))
        answered, _ = self.decode(
            self.values,
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            caches,
            jnp.asarray(stop_ids, jnp.int32),
            max_steps=max_new_tokens,
        )
        return [
            _until_stop(row[n : n + max_new_tokens], stop_ids)
            for row, n in zip(np.asarray(answered), lengths, strict=True)
        ]


def _spread(cache, prefix, batch: int):
    """Copies a one-row cache into the beginning of every row of a longer, empty one."""
    axis = cache.ndim - 3  # time: (B, T, heads, H), or (B, 2, T, heads, H)
    repeated = jnp.broadcast_to(prefix, (batch, *prefix.shape[1:]))
    return jax.lax.dynamic_update_slice_in_dim(cache, repeated.astype(cache.dtype), 0, axis=axis)


def _until_stop(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, stop_ids))
    return row[: ends[0]] if len(ends) else row
