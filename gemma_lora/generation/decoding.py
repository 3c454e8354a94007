"""The compiled programs of generation: reading prompts, and making tokens with a key-value cache.

Keys and values stand in up to three pieces: of what all prompts begin with, of each row's own prompt, of the new
tokens. A key carries its position, and attention goes by positions alone, so the padding behind a short prompt does not
count. While tokens are made, only the last piece changes, in the same place for all rows: nothing else is copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.hardware import choose
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.attention import Attend, Keys, attention, in_window
from gemma_lora.gemma.forward import forward
from gemma_lora.gemma.weights import Weights, backbone_of, collect
from gemma_lora.generation.sampling import Sampling, drawn, likeliest

STEPS = 16  # new tokens that the compiled program makes at a time, at most
PIECE = 16  # prompt tokens of a row that are read at a time

Pairs = list[Keys]  # keys and values of every block


class _Piece(NamedTuple):
    """Some positions of the cache: where they stand, and which of them a query may see."""

    pairs: Pairs
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


def _prefill(architecture: Architecture, weights: Weights, token_ids, own: Pairs, shared: Pairs, start) -> Pairs:
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
    architecture: Architecture,
    weights: Weights,
    last,
    lengths,
    made,
    done,
    own,
    shared,
    stop_ids,
    most,
    length: int,
    sampling: Sampling | None = None,
):
    """Lets every row go on for some tokens from `last` (B,): its last prompt token at first, then its newest one.

    Args:
        lengths: (B,), of the prompts.
        made: Scalar, new tokens of a row so far.
        done: (B,) booleans, rows that have stopped.
        own: As in `_prefill`, with room behind the prompts; used up.
        most: Scalar, the most tokens to make now, up to `STEPS`.
        length: Places in `own` that the prompts have.
        sampling: How tokens are drawn; None for the likeliest, of which the program then consists.

    Returns:
        `(tokens, done, own)`: (B, STEPS), filled up with a stop token, and what the next call takes.
    """
    batch, beginning = len(last), shared[0].keys.shape[2]
    before = jnp.arange(beginning)[None]
    room = own[0].keys.shape[2] - length
    old = beginning + jnp.arange(length)[None], lengths[:, None] - 1 + jnp.arange(room)
    # Of the prompt, the last token is the first that is fed here.
    read = old[0] < lengths[:, None] - 1, jnp.broadcast_to(jnp.arange(room) < made, (batch, room))
    places = jnp.concatenate([jnp.broadcast_to(old[0], read[0].shape), old[1]], axis=1)
    valid = jnp.concatenate(read, axis=1)
    new_places = lengths[:, None] - 1 + made + jnp.arange(STEPS)

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
        if sampling is None:
            token = likeliest(weights.head, hidden)
        else:
            token = drawn(weights.head, hidden, architecture.logit_soft_cap, sampling, made + step)
        token = jnp.where(done, stop_ids[0], token)
        tokens = tokens.at[:, step].set(token)
        return step + 1, token, tokens, updated, done | jnp.isin(token, stop_ids)

    tokens = jnp.full((batch, STEPS), stop_ids[0], jnp.int32)
    state = (0, last, tokens, empty(architecture, batch, STEPS), done)
    _, _, tokens, new, done = jax.lax.while_loop(running, step, state)
    own = [_written(pair, more, length + made) for pair, more in zip(own, new, strict=True)]
    return tokens, done, own


# What the programs depend on is in their arguments: shapes, the architecture, how each product is formed.
_prefill_program = jax.jit(_prefill, static_argnames=("architecture",), donate_argnames=("own",))
_decode_program = jax.jit(_decode, static_argnames=("architecture", "length"), donate_argnames=("own",))


@dataclasses.dataclass
class Rows:
    """Prompts of one batch that have been read, and how far their answers are.

    Invariants: `own` is (B, kv_heads, length + room, H) for each block and holds keys and values of all tokens but the
    newest, `last`; `made` is the number of new tokens of a row that has not stopped.
    """

    own: Pairs
    shared: Pairs
    length: int  # places of the prompts in `own`
    lengths: np.ndarray  # (B,), of the prompts
    last: np.ndarray  # (B,)
    done: np.ndarray  # (B,) booleans; the caller may set more of them
    made: int = 0

    @property
    def room(self) -> int:
        """New tokens that there is a place for."""
        return self.own[0].keys.shape[2] - self.length


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model's architecture and its weights as they are now, made ready for generation."""

    architecture: Architecture
    weights: Weights

    @classmethod
    def of(cls, model: keras.Model, mixed_precision: bool | None) -> Engine:
        """Collects the weights; rounded copies of large matrices are made where `mixed_precision` asks for them."""
        architecture = architecture_of(backbone_of(model))
        rounded = choose(mixed_precision, dtype=architecture.dtype).mixed_precision
        return cls(architecture, collect(model).settled(rounded))

    def shared_keys(self, prefix: np.ndarray) -> Pairs:
        """Keys and values of what all prompts begin with, (1, kv_heads, P, H) for each block."""
        own = empty(self.architecture, 1, len(prefix))
        if not len(prefix):
            return own
        nothing = empty(self.architecture, 1, 0)
        return _prefill_program(self.architecture, self.weights, jnp.asarray(prefix)[None], own, nothing, 0)

    def read(self, prompts: Sequence[np.ndarray], length: int, shared: Pairs, most: int) -> Rows:
        """Reads a batch of prompts, each at most `length` tokens longer than what they share.

        Args:
            most: New tokens to leave room for.
        """
        beginning = shared[0].keys.shape[2]
        lengths = np.array([len(p) for p in prompts], np.int32)
        tokens = np.zeros((len(prompts), beginning + length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        own = empty(self.architecture, len(prompts), length + places(most))
        # What this writes behind a shorter prompt's end is not seen by any token of it.
        own = self.read_on(own, shared, tokens[:, : int(lengths.max()) - 1], beginning)
        last, done = tokens[np.arange(len(prompts)), lengths - 1], np.zeros(len(prompts), bool)
        return Rows(own, shared, length, lengths, last, done)

    def read_on(self, own: Pairs, shared: Pairs, tokens: np.ndarray, start: int) -> Pairs:
        """Puts keys and values of tokens (B, T) from position `start` on into `own`, which is used up.

        Up to `PIECE` - 1 places behind the last token are written to as well.
        """
        prefill = partial(_prefill_program, self.architecture, self.weights)
        for here in range(start, tokens.shape[1], PIECE):
            piece = tokens[:, here : here + PIECE]
            piece = np.pad(piece, ((0, 0), (0, PIECE - piece.shape[1])))
            own = prefill(jnp.asarray(piece), own=own, shared=shared, start=jnp.asarray(here, jnp.int32))
        return own

    def advance(self, rows: Rows, stop_ids: jax.Array, most: int, sampling: Sampling | None = None) -> np.ndarray:
        """Makes up to `most` new tokens of every row: (B, most), filled up with a stop token."""
        rows.made, made = rows.made + most, rows.made
        own, rows.own = rows.own, []  # used up; not to be used again if this is interrupted
        new, done, rows.own = _decode_program(
            self.architecture,
            self.weights,
            rows.last,
            rows.lengths,
            made,
            rows.done,
            own=own,
            shared=rows.shared,
            stop_ids=stop_ids,
            most=most,
            length=rows.length,
            sampling=sampling,
        )
        tokens, rows.done = np.asarray(new)[:, :most], np.array(done)
        rows.last = tokens[:, -1]
        return tokens


def places(tokens: int) -> int:
    """Places for so many tokens, in whole pieces."""
    return -(-tokens // STEPS) * STEPS


@partial(jax.jit, static_argnames=("length",), donate_argnames=("own",))
def behind_prompt(own: Pairs, start, length: int) -> Pairs:
    """Moves what stands behind the prompt's `length` places to the places from `start` on; `own` is used up."""
    return [_written(pair, Keys(pair.keys[:, :, length:], pair.values[:, :, length:]), start) for pair in own]


def resized(architecture: Architecture, own: Pairs | None, size: int) -> Pairs:
    """A single row's keys and values in so many places: the first ones as they were."""
    if own is None:
        return empty(architecture, 1, size)
    if own[0].keys.shape[2] == size:
        return own
    both = zip(empty(architecture, 1, size), own, strict=True)
    return [_written(new, [part[:, :, :size] for part in old], 0) for new, old in both]


def empty(architecture: Architecture, batch: int, length: int) -> Pairs:
    """Keys and values of zeros for every block, (B, kv_heads, length, H)."""
    shape = (batch, architecture.kv_heads, length, architecture.head_dim)
    zeros = partial(jnp.zeros, shape, architecture.dtype)
    return [Keys(zeros(), zeros()) for _ in architecture.blocks]


def _put(pair, k, v, start):
    """Writes keys and values of T tokens, (B, T, kv_heads, H), into a pair (B, kv_heads, S, H) from `start` on."""
    more = [jnp.swapaxes(new, 1, 2).astype(old.dtype) for old, new in zip(pair, (k, v), strict=True)]
    return _written(pair, more, start)


def _written(pair, more, start):
    """A pair (B, kv_heads, S, H) with the pair `more` (B, kv_heads, T, H) in its places start … start + T - 1."""
    return Keys(*(jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=2) for a, b in zip(pair, more, strict=True)))
