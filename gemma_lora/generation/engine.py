"""Batched greedy generation with a key-value cache, for a Gemma with or without an adapter.

KerasHub's `generate` compiles anew for every input shape. Here all batches of a call share one shape, so XLA compiles
two programs. The prompts of a batch are read together, some tokens of every row at a time; then each row
goes on at its own position, where its prompt ends. What all prompts begin with (a few-shot prompt's examples) is
computed and kept once.

Keys and values stand in up to three pieces: of the shared beginning, of each row's own prompt, of the new tokens. A key
carries its position, and attention goes by positions alone, so the padding behind a short prompt does not count. While
tokens are made, only the last piece changes, in the same place for all rows: nothing else is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.hardware import choose
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS
from gemma_lora.data.encoding import encode_prompt
from gemma_lora.data.formats import Prompt, as_prompts
from gemma_lora.data.templates import template_of
from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.attention import Attend, Keys, attention, in_window
from gemma_lora.gemma.forward import forward
from gemma_lora.gemma.weights import Weights, backbone_of, collect
from gemma_lora.layers.loss import table_rows
from gemma_lora.quantization.rows import Bfloat16Rows, Int8Rows

_BLOCK = 4096  # entries of the vocabulary whose logits are formed at a time
_STEPS = 16  # new tokens that the compiled program makes at a time
_PIECE = 16  # prompt tokens of a row that are read at a time
_MIN_PREFIX = 32  # a shared beginning shorter than this is not worth its own pass


def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    template: Any = None,
    max_new_tokens: int = 128,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
) -> list[str]:
    """Answers prompts greedily.

    Args:
        model: A KerasHub Gemma `CausalLM`, with an adapter or without.
        prompts: One or a list of: text as a user writes it (without the template's text); an `Example`, or a chat as
            a list of `{"role", "content"}`, whose last turn is the user's.
        template: A `Template`; defaults to the adapter's, else Gemma's chat template.
        max_new_tokens: Integer, the most tokens of an answer.
        batch_size: Integer, prompts answered together.
        on_progress: Called with (answered, all) after each batch.
        mixed_precision: Boolean; rounds the factors of large products of a float32 model to bfloat16, packed
            layers' excepted. Faster where the CPU multiplies bfloat16 faster; an answer here and there is another.

    Returns:
        The answers, in the prompts' order, without the stop token, stripped of outer white space.

    Raises:
        ValueError: If `max_new_tokens` or `batch_size` is below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            "`max_new_tokens` and `batch_size` must be at least 1. "
            f"Received: max_new_tokens={max_new_tokens}, batch_size={batch_size}"
        )
    template = template_of(model, template)
    tokenizer = model.preprocessor.tokenizer
    stops = sorted({tokenizer.token_to_id(token) for token in (*template.stop, "<eos>")})
    encoded = [np.asarray(encode_prompt(prompt, tokenizer, template), np.int32) for prompt in as_prompts(prompts)]
    rows = generate_tokens(model, encoded, stops, max_new_tokens, batch_size, on_progress, mixed_precision)
    return [tokenizer.detokenize([int(i) for i in row]).strip() if len(row) else "" for row in rows]


def generate_tokens(
    model: keras.Model,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
) -> list[np.ndarray]:
    """Greedy continuations of token sequences; see `generate`.

    Returns:
        One int32 array a prompt: the new tokens before the first stop token.
    """
    if not prompts:
        return []
    prefix = _shared_prefix(prompts) if len(prompts) > 1 else 0
    longest = max(len(p) for p in prompts) - prefix
    room = -(-longest // _PIECE) * _PIECE  # one for all batches: one program
    engine = _Engine.of(model, mixed_precision)
    shared = engine.shared_keys(prompts[0][:prefix])
    order = np.argsort([len(p) for p in prompts], kind="stable")
    batch_size = min(batch_size, len(prompts))
    answers = [np.zeros(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first prompt: one compiled shape serves all.
        filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])
        rows = engine.answer([prompts[i] for i in filled], room, shared, stop_ids, max_new_tokens)
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


_Pairs = list[Keys]  # keys and values of every block


class _Piece(NamedTuple):
    """Some positions of the cache: where they stand, and which of them a query may see."""

    pairs: _Pairs
    positions: jax.Array  # (B, S) or (1, S), integers
    valid: jax.Array | None = None  # like positions, booleans; None: all


def _cached(architecture: Architecture, positions: jax.Array, attend: Callable[..., tuple]) -> Attend:
    """Attention of queries at `positions` (B or 1, T) over a cache.

    Args:
        attend: From a block's number and the new keys and values (B, T, kv_heads, H) to the pieces that are seen, a
            list of `_Piece`.
    """

    def seen_by(block, piece: _Piece, batch: int):
        seen = in_window(block, positions[:, :, None] - piece.positions[:, None, :])  # (B, T, S)
        if piece.valid is not None:
            seen &= piece.valid[:, None, :]
        return jnp.broadcast_to(seen, (batch, *seen.shape[1:]))

    def attention_of(number: int, q, k, v):
        pieces = [piece for piece in attend(number, k, v) if piece.pairs[number].keys.shape[2]]
        block = architecture.blocks[number]
        seen = jnp.concatenate([seen_by(block, piece, len(q)) for piece in pieces], axis=-1)
        return attention(architecture, q, [piece.pairs[number] for piece in pieces], seen)

    return attention_of


def _prefill(architecture: Architecture, weights: Weights, token_ids, own: _Pairs, shared: _Pairs, start) -> _Pairs:
    """Reads tokens (B, T) at positions start, start + 1, …; returns `own` with their keys and values.

    Args:
        own: (B, kv_heads, S, H) for each block, of the positions behind the shared beginning; used up.
        shared: (1, kv_heads, P, H) for each block, of the positions 0 … P - 1.
        start: Scalar, at least P.
    """
    length, beginning = own[0].keys.shape[2], shared[0].keys.shape[2]
    positions = start + jnp.arange(token_ids.shape[1])[None]
    before, places = jnp.arange(beginning)[None], beginning + jnp.arange(length)[None]
    updated = list(own)

    def attend(number: int, k, v):
        updated[number] = _put(own[number], k, v, start - beginning)
        return [_Piece(shared, before), _Piece(updated, places)]

    forward(architecture, weights, token_ids, positions, _cached(architecture, positions, attend))
    return updated


def _decode(
    architecture: Architecture, weights: Weights, last, lengths, made, done, own, shared, stop_ids, most, length: int
):
    """Lets every row go on for some tokens from `last` (B,): its last prompt token at first, then its newest one.

    Args:
        lengths: (B,), of the prompts.
        made: Scalar, new tokens of a row so far.
        done: (B,) booleans, rows that have stopped.
        own: As in `_prefill`, with room behind the prompts; used up.
        most: Scalar, the most tokens to make now, up to `_STEPS`.
        length: Places in `own` that the prompts have.

    Returns:
        `(tokens, done, own)`: (B, _STEPS), filled up with a stop token, and what the next call takes.
    """
    batch, beginning = len(last), shared[0].keys.shape[2]
    before = jnp.arange(beginning)[None]
    room = own[0].keys.shape[2] - length
    old = beginning + jnp.arange(length)[None], lengths[:, None] - 1 + jnp.arange(room)
    # Of the prompt, the last token is the first that is fed here.
    read = old[0] < lengths[:, None] - 1, jnp.broadcast_to(jnp.arange(room) < made, (batch, room))
    places = jnp.concatenate([jnp.broadcast_to(old[0], read[0].shape), old[1]], axis=1)
    valid = jnp.concatenate(read, axis=1)
    new_places = lengths[:, None] - 1 + made + jnp.arange(_STEPS)

    def running(state):
        step, _, _, _, done = state
        return (step < most) & ~jnp.all(done)

    def step(state):
        step, last, tokens, new, done = state
        positions = (lengths - 1 + made + step)[:, None]
        updated, now = list(new), list(new)

        def attend(number: int, k, v):
            # The token's own keys apart: what is written here is read in the next step.
            now[number] = Keys(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
            updated[number] = _put(new[number], k, v, step)
            pieces = [_Piece(shared, before), _Piece(own, places, valid)]
            return [*pieces, _Piece(new, new_places, new_places < positions), _Piece(now, positions)]

        seen = _cached(architecture, positions, attend)
        hidden = forward(architecture, weights, last[:, None], positions, seen)[:, 0]
        token = jnp.where(done, stop_ids[0], _likeliest(weights.head, hidden))
        tokens = tokens.at[:, step].set(token)
        return step + 1, token, tokens, updated, done | jnp.isin(token, stop_ids)

    tokens = jnp.full((batch, _STEPS), stop_ids[0], jnp.int32)
    state = (0, last, tokens, _empty(architecture, batch, _STEPS), done)
    _, _, tokens, new, done = jax.lax.while_loop(running, step, state)
    own = [_written(pair, more, length + made) for pair, more in zip(own, new, strict=True)]
    return tokens, done, own


# What the programs depend on is in their arguments: shapes, the architecture, how each product is formed.
_prefill_program = jax.jit(_prefill, static_argnames=("architecture",), donate_argnames=("own",))
_decode_program = jax.jit(_decode, static_argnames=("architecture", "length"), donate_argnames=("own",))


@dataclasses.dataclass(frozen=True)
class _Engine:
    """A model's architecture and its weights as they are now, made ready for generation."""

    architecture: Architecture
    weights: Weights

    @classmethod
    def of(cls, model: keras.Model, mixed_precision: bool | None) -> _Engine:
        architecture = architecture_of(backbone_of(model))
        rounded = choose(mixed_precision, dtype=architecture.dtype).mixed_precision
        return cls(architecture, collect(model).settled(rounded))

    def shared_keys(self, prefix: np.ndarray) -> _Pairs:
        """Keys and values of what all prompts begin with, (1, kv_heads, P, H) for each block."""
        own = _empty(self.architecture, 1, len(prefix))
        if not len(prefix):
            return own
        nothing = _empty(self.architecture, 1, 0)
        return _prefill_program(self.architecture, self.weights, jnp.asarray(prefix)[None], own, nothing, 0)

    def answer(self, prompts, length: int, shared: _Pairs, stop_ids, max_new_tokens: int) -> list[np.ndarray]:
        """New tokens of one batch of prompts, each at most `length` tokens longer than what they share."""
        beginning = shared[0].keys.shape[2]
        lengths = np.array([len(p) for p in prompts], np.int32)
        tokens = np.full((len(prompts), beginning + length), stop_ids[0], np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        room = -(-max_new_tokens // _STEPS) * _STEPS
        own = _empty(self.architecture, len(prompts), length + room)
        prefill = partial(_prefill_program, self.architecture, self.weights)
        # What this writes behind a shorter prompt's end is not seen by any token of it.
        for start in range(beginning, int(lengths.max()) - 1, _PIECE):
            piece = jnp.asarray(tokens[:, start : start + _PIECE])
            own = prefill(piece, own=own, shared=shared, start=jnp.asarray(start, jnp.int32))
        last, done = tokens[np.arange(len(prompts)), lengths - 1], np.zeros(len(prompts), bool)
        stops, answers = jnp.asarray(stop_ids, jnp.int32), np.full((len(prompts), room), stop_ids[0], np.int32)
        decode = partial(_decode_program, self.architecture, self.weights)
        for made in range(0, max_new_tokens, _STEPS):
            most = min(_STEPS, max_new_tokens - made)
            new, done, own = decode(
                last, lengths, made, done, own=own, shared=shared, stop_ids=stops, most=most, length=length
            )
            answers[:, made : made + _STEPS] = new
            last = answers[:, made + _STEPS - 1]
            if np.all(done):
                break
        return [_until_stop(row[:max_new_tokens], stop_ids) for row in answers]


def _empty(architecture: Architecture, batch: int, length: int) -> _Pairs:
    """Keys and values of zeros for every block, (B, kv_heads, length, H)."""
    shape = (batch, architecture.kv_heads, length, architecture.head_dim)
    zeros = partial(jnp.zeros, shape, architecture.dtype)
    return [Keys(zeros(), zeros()) for _ in architecture.blocks]


def _likeliest(table, hidden):
    """The tokens (B,) with the largest logits; of equal ones, the first.

    Soft-capping (Gemma 2) is monotonic and changes none of them.

    Args:
        table: (V, D): an array, or `Int8Rows` or `Bfloat16Rows`, of which `_BLOCK` rows are used at a time.
        hidden: (B, D).
    """
    if not isinstance(table, (Int8Rows, Bfloat16Rows)):
        return _max_and_place(table @ hidden.T)[1]
    vocabulary = table.shape[0]
    size = min(_BLOCK, vocabulary)
    if isinstance(table, Bfloat16Rows):
        hidden = hidden.astype(jnp.bfloat16)

    def one_block(index, best):
        most, token = best
        start = jnp.minimum(index * size, vocabulary - size)  # the last block may reach back
        rows = table_rows(table, start, size, hidden.dtype)
        logits = jax.lax.dot_general(rows, hidden, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        here, place = _max_and_place(logits)
        better = here > most
        return jnp.where(better, here, most), jnp.where(better, start + place, token)

    start = (jnp.full(len(hidden), -jnp.inf), jnp.zeros(len(hidden), jnp.int32))
    return jax.lax.fori_loop(0, -(-vocabulary // size), one_block, start)[1]


def _max_and_place(logits):
    """Largest entry of each column of (K, B), and its row. XLA's `argmax` of it all is slow on the CPU (jax 0.10.2)."""
    rows, batch = logits.shape
    groups = math.gcd(rows, 64)
    split = logits.reshape(groups, -1, batch)
    tops = split.max(axis=1)  # (groups, B)
    group = jnp.argmax(tops, axis=0)
    chosen = jnp.take_along_axis(split, group[None, None], axis=0)[0]
    return tops.max(axis=0), (group * split.shape[1] + jnp.argmax(chosen, axis=0)).astype(jnp.int32)


def _put(pair, k, v, start):
    """Writes keys and values of T tokens, (B, T, kv_heads, H), into a pair (B, kv_heads, S, H) from `start` on."""
    more = [jnp.swapaxes(new, 1, 2).astype(old.dtype) for old, new in zip(pair, (k, v), strict=True)]
    return _written(pair, more, start)


def _written(pair, more, start):
    """A pair (B, kv_heads, S, H) with the pair `more` (B, kv_heads, T, H) in its places start … start + T - 1."""
    return Keys(*(jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=2) for a, b in zip(pair, more, strict=True)))


def _until_stop(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, stop_ids))
    return row[: ends[0]] if len(ends) else row
