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

import contextlib
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.gemma.blocks import attention_scale
from gemma_lora.layers.linear import is_one_product, kernel_matrix
from gemma_lora.layers.loss import table_rows
from gemma_lora.layers.mixed_precision import rounded_output
from gemma_lora.lora.layer import lora_layers, plain_layers
from gemma_lora.lora.qlora import head_table
from gemma_lora.quantization.packed import Bfloat16Rows, Int8Rows

_BLOCK = 4096  # entries of the vocabulary whose logits are formed at a time
_STEPS = 16  # new tokens that the compiled program makes at a time
_PIECE = 16  # prompt tokens of a row that are read at a time
_MIN_PREFIX = 32  # a shared beginning shorter than this is not worth its own pass


def generate(
    model: keras.Model,
    prompts: str | Sequence[str],
    template: Any = None,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool = False,
) -> list[str]:
    """Answers prompts greedily.

    Args:
        model: A KerasHub Gemma `CausalLM`, with an adapter or without.
        prompts: A string or a list of strings, as a user writes them (without the template's text).
        template: A `Template`; defaults to the adapter's, else Gemma's chat template.
        max_new_tokens: Integer, the most tokens of an answer.
        batch_size: Integer, prompts answered together.
        on_progress: Called with (answered, all) after each batch.
        mixed_precision: Boolean; rounds the factors of the large products of a float32 model to bfloat16, packed
            layers' excepted. Faster where the CPU multiplies bfloat16 faster; an answer here and there is another.

    Returns:
        The answers, in the prompts' order, without the stop token, stripped of outer white space.

    Raises:
        ValueError: If `max_new_tokens` or `batch_size` is below 1.
    """
    from gemma_lora.data.dataset import encode_prompt, template_of

    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            "`max_new_tokens` and `batch_size` must be at least 1. "
            f"Received: max_new_tokens={max_new_tokens}, batch_size={batch_size}"
        )
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    template = template_of(model, template)
    tokenizer = model.preprocessor.tokenizer
    stops = sorted({tokenizer.token_to_id(token) for token in (*template.stop, "<eos>")})
    encoded = [np.asarray(encode_prompt(text, tokenizer, template), np.int32) for text in prompts]
    rows = generate_tokens(model, encoded, stops, max_new_tokens, batch_size, on_progress, mixed_precision)
    return [tokenizer.detokenize([int(i) for i in row]).strip() if len(row) else "" for row in rows]


def generate_tokens(
    model: keras.Model,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool = False,
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
    engine = _engine_of(model, mixed_precision)
    values = engine.values()
    shared = engine.shared_keys(values, prompts[0][:prefix])
    order = np.argsort([len(p) for p in prompts], kind="stable")
    batch_size = min(batch_size, len(prompts))
    answers = [np.zeros(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first prompt: one compiled shape serves all.
        filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])
        rows = engine.answer(values, [prompts[i] for i in filled], room, shared, stop_ids, max_new_tokens)
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


class _Keys(NamedTuple):
    """Keys and values of some positions, in one layer, and which of them a query may see."""

    keys: jax.Array  # (B, kv_heads, S, H); B may be 1 for all rows
    values: jax.Array  # the same
    positions: jax.Array  # (B, S) or (1, S), integers
    valid: jax.Array | None = None  # like positions, booleans; None: all


class _Values(NamedTuple):
    """What the programs compute with."""

    variables: list  # the backbone's
    whole: list  # LoRA's kernels with their updates
    kernels: list  # the other kernels in bfloat16, where they are rounded
    scales: list  # DoRA's
    table: Bfloat16Rows | None  # the head's, where it is rounded


_Hook = tuple[Any, str, Callable[..., Any]]  # a layer, a method's name, what takes its place


def _engine_of(model: keras.Model, mixed_precision: bool) -> _Engine:
    """The model's engine, from its last call where nothing has changed since that its programs depend on."""
    engine = model.__dict__.get("_generation_engine")
    if engine is None or not engine.fits(model, mixed_precision):
        engine = model.__dict__["_generation_engine"] = _Engine(model, mixed_precision)
    return engine


class _Engine:
    """The compiled functions of one model; weights are arguments, not constants of the programs."""

    def __init__(self, model: keras.Model, mixed_precision: bool = False):
        self.backbone = model.backbone
        # Weakly: a layer that another takes the place of, as in `quantize_base`, is not kept in memory by this.
        self.parts = [weakref.ref(part) for part in _parts(self.backbone)]
        self.mixed_precision, self.constants = mixed_precision, _constants(self.backbone)
        self.rounded = mixed_precision and self.backbone.token_embedding.compute_dtype == "float32"
        self.prefill = jax.jit(self._prefill, donate_argnums=(2,))
        self.decode = jax.jit(self._decode, donate_argnums=(5,), static_argnames=("length",))

    def fits(self, model: keras.Model, mixed_precision: bool) -> bool:
        """Whether the programs are right for this model as it is now."""
        parts = _parts(model.backbone)
        same = len(parts) == len(self.parts) and all(now is then() for now, then in zip(parts, self.parts, strict=True))
        return same and mixed_precision == self.mixed_precision and _constants(model.backbone) == self.constants

    @property
    def adapted(self) -> list:
        """Layers with an update that is added to their kernel here. Packed weights stay packed."""
        return [layer for layer in lora_layers(self.backbone) if not layer.is_packed]

    @property
    def scaled(self) -> list:
        """Packed layers with DoRA's scale, which is computed once, not for every token."""
        return [layer for layer in lora_layers(self.backbone) if layer.is_packed and layer.dora]

    @property
    def plain(self) -> list:
        """The other layers that are rounded."""
        return [layer for _, _, layer in plain_layers(self.backbone) if is_one_product(layer)] if self.rounded else []

    def values(self) -> _Values:
        """What the programs compute with, as it is now."""
        whole = [self._kept(layer.whole_matrix()) for layer in self.adapted]  # one product a token instead of three
        kernels = [self._kept(kernel_matrix(layer)) for layer in self.plain]
        scales = [layer.column_scale() for layer in self.scaled]
        table = self._kept(head_table(self.backbone.token_embedding)) if self.rounded else None
        return _Values([v.value for v in self.backbone.variables], whole, kernels, scales, table)

    def _kept(self, matrix):
        """A matrix as the programs take it: as it is, or in bfloat16 where they round."""
        return Bfloat16Rows.of(matrix) if self.rounded and hasattr(matrix, "dtype") else matrix

    def _empty(self, batch: int, length: int) -> list[tuple[jax.Array, jax.Array]]:
        """Keys and values of zeros for every layer, (B, kv_heads, length, H)."""
        backbone = self.backbone
        shape = (batch, backbone.num_key_value_heads, length, backbone.head_dim)
        dtype = backbone.token_embedding.compute_dtype
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in backbone.transformer_layers]

    def _hidden(self, token_ids, positions, attend):
        """Hidden states (B, T, D) of tokens (B, T) at `positions`, (B, T) or (1, T).

        `attend(number, layer, q, k, v)` is the attention of block `number`: from the queries, keys and values of these
        tokens, rotated, (B, T, heads, H), to what they see, shaped like the queries.
        """
        backbone = self.backbone
        with _own_attention(backbone, positions, attend):
            x = backbone.token_embedding(token_ids)
            x = x * jnp.sqrt(jnp.array(backbone.hidden_dim, jnp.float32)).astype(x.dtype)
            for block in backbone.transformer_layers:
                x = block(x)
            return backbone.layer_norm(x)

    @contextlib.contextmanager
    def _scope(self, values):
        """While a program is traced: weights, LoRA's kernels with their updates and DoRA's scales are `values`."""
        adapted, scaled = self.adapted, self.scaled
        for layer, matrix in zip(adapted, values.whole, strict=True):
            layer.whole_kernel = lambda matrix=matrix: _unpacked(matrix)
        for layer, scale in zip(scaled, values.scales, strict=True):
            layer.fixed_scale = lambda scale=scale: scale
        rounded = zip(self.plain, values.kernels, strict=True)
        hooks = [(layer, "call", partial(_rounded_call, layer, kernel)) for layer, kernel in rounded]
        state = list(zip(self.backbone.variables, values.variables, strict=True))
        try:
            with keras.StatelessScope(state_mapping=state), _hooked(hooks):
                yield
        finally:
            for layer in adapted:
                layer.whole_kernel = None
            for layer in scaled:
                layer.fixed_scale = None

    def _prefill(self, values, token_ids, own, shared, start):
        """Reads tokens (B, T) at positions start, start + 1, …; returns `own` with their keys and values.

        Args:
            own: A pair (B, kv_heads, S, H) a layer, of the positions behind the shared beginning; used up.
            shared: A pair (1, kv_heads, P, H) a layer, of the positions 0 … P - 1.
            start: Scalar, at least P.
        """
        length, beginning = own[0][0].shape[2], shared[0][0].shape[2]
        positions = start + jnp.arange(token_ids.shape[1])[None]
        places = beginning + jnp.arange(length)[None]
        updated = list(own)

        def attend(number, layer, q, k, v):
            updated[number] = keys, values = _put(own[number], k, v, start - beginning)
            pieces = [_Keys(*shared[number], jnp.arange(beginning)[None]), _Keys(keys, values, places)]
            return _attention(layer, q, positions, pieces)

        with self._scope(values):
            self._hidden(token_ids, positions, attend)
        return updated

    def _decode(self, values, last, lengths, made, done, own, shared, stop_ids, most, length):
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
        backbone, batch, beginning = self.backbone, len(last), shared[0][0].shape[2]
        before = jnp.arange(beginning)[None]
        room = own[0][0].shape[2] - length
        old = beginning + jnp.arange(length)[None], lengths[:, None] - 1 + jnp.arange(room)
        # Of the prompt, the last token is the first that is fed here.
        read = old[0] < lengths[:, None] - 1, jnp.broadcast_to(jnp.arange(room) < made, (batch, room))
        places = jnp.concatenate([jnp.broadcast_to(old[0], read[0].shape), old[1]], axis=1)
        read = jnp.concatenate(read, axis=1)
        new_places = lengths[:, None] - 1 + made + jnp.arange(_STEPS)

        def running(state):
            step, _, _, _, done = state
            return (step < most) & ~jnp.all(done)

        def step(state):
            step, last, tokens, new, done = state
            positions = (lengths - 1 + made + step)[:, None]
            updated = list(new)

            def attend(number, layer, q, k, v):
                # The token's own keys apart: what is written here is read in the next step.
                now = _Keys(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), positions)
                pieces = [_Keys(*shared[number], before), _Keys(*own[number], places, read)]
                pieces += [_Keys(*new[number], new_places, new_places < positions), now]
                updated[number] = _put(new[number], k, v, step)
                return _attention(layer, q, positions, pieces)

            with self._scope(values):
                hidden = self._hidden(last[:, None], positions, attend)[:, 0]
                table = head_table(backbone.token_embedding) if values.table is None else values.table
                token = _likeliest(table, hidden)
            token = jnp.where(done, stop_ids[0], token)
            tokens = tokens.at[:, step].set(token)
            return step + 1, token, tokens, updated, done | jnp.isin(token, stop_ids)

        tokens = jnp.full((batch, _STEPS), stop_ids[0], jnp.int32)
        state = (0, last, tokens, self._empty(batch, _STEPS), done)
        _, _, tokens, new, done = jax.lax.while_loop(running, step, state)
        start = length + made
        own = [_written(pair, more, start) for pair, more in zip(own, new, strict=True)]
        return tokens, done, own

    def shared_keys(self, values: _Values, prefix: np.ndarray) -> list:
        """Keys and values of what all prompts begin with, (1, kv_heads, P, H), a pair a layer."""
        own = self._empty(1, len(prefix))
        if not len(prefix):
            return own
        return self.prefill(values, jnp.asarray(prefix)[None], own, self._empty(1, 0), 0)

    def answer(self, values: _Values, prompts, length: int, shared, stop_ids, max_new_tokens: int) -> list[np.ndarray]:
        """New tokens of one batch of prompts, each at most `length` tokens longer than what they share."""
        beginning = shared[0][0].shape[2]
        lengths = np.array([len(p) for p in prompts], np.int32)
        tokens = np.full((len(prompts), beginning + length), stop_ids[0], np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        room = -(-max_new_tokens // _STEPS) * _STEPS
        own = self._empty(len(prompts), length + room)
        # What this writes behind a shorter prompt's end is not seen by any token of it.
        for start in range(beginning, int(lengths.max()) - 1, _PIECE):
            piece = jnp.asarray(tokens[:, start : start + _PIECE])
            own = self.prefill(values, piece, own, shared, jnp.asarray(start, jnp.int32))
        last, done = tokens[np.arange(len(prompts)), lengths - 1], np.zeros(len(prompts), bool)
        stops, answers = jnp.asarray(stop_ids, jnp.int32), np.full((len(prompts), room), stop_ids[0], np.int32)
        for made in range(0, max_new_tokens, _STEPS):
            most = min(_STEPS, max_new_tokens - made)
            new, done, own = self.decode(values, last, lengths, made, done, own, shared, stops, most, length=length)
            answers[:, made : made + _STEPS] = new
            last = answers[:, made + _STEPS - 1]
            if np.all(done):
                break
        return [_until_stop(row[:max_new_tokens], stop_ids) for row in answers]


def _parts(backbone) -> list:
    return [*backbone._flatten_layers(), *backbone.variables]


def _constants(backbone) -> list:
    """What programs take from layers as constants and what may change while the layers stay the same."""
    dtypes = [layer.compute_dtype for layer in backbone._flatten_layers()]
    return dtypes + [(layer.merged, layer.scaling, layer.dora) for layer in lora_layers(backbone)]


@contextlib.contextmanager
def _own_attention(backbone, positions, attend):
    """While blocks are traced without a cache: rotations at `positions`, and `attend` as attention; see `_hidden`."""
    known: dict[Any, Any] = {}

    def rotation(layer, inputs, start_index=0, _positions=None):
        kind = (layer.max_wavelength, layer.scaling_factor)
        if kind not in known:
            known[kind] = type(layer)._compute_cos_sin_embedding(layer, inputs, start_index, positions)
        return known[kind]

    def attention(number, layer, q, k, v, mask, **_):
        return attend(number, layer, q, k, v)

    hooks: list[_Hook] = []
    for number, block in enumerate(backbone.transformer_layers):
        rope = block.attention.rope_layer
        hooks += [
            (block, "_compute_attention_mask", lambda *_, **__: jnp.ones((1, 1, 1), bool)),
            (block.attention, "_compute_attention", partial(attention, number, block.attention)),
            (rope, "_compute_cos_sin_embedding", partial(rotation, rope)),
        ]
    with _hooked(hooks):
        yield


@contextlib.contextmanager
def _hooked(hooks: Sequence[_Hook]):
    """Puts functions in the place of layers' methods for a while."""
    before = [layer.__dict__.get(name) for layer, name, _ in hooks]
    for layer, name, hook in hooks:
        layer.__dict__[name] = hook
    try:
        yield
    finally:
        for (layer, name, _), old in zip(hooks, before, strict=True):
            if old is None:
                del layer.__dict__[name]
            else:
                layer.__dict__[name] = old


def _unpacked(matrix):
    return matrix.decode(jnp.bfloat16) if isinstance(matrix, Bfloat16Rows) else matrix


def _rounded_call(layer, kernel: Bfloat16Rows, inputs, training=None):
    """A linear layer's `call` with both factors rounded to bfloat16."""
    return rounded_output(layer, inputs, _unpacked(kernel))


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
    return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=2) for a, b in zip(pair, more, strict=True))


def _attention(layer, q, positions, pieces: Sequence[_Keys]):
    """What queries (B, T, heads, H) at `positions` (B or 1, T) see of several pieces of keys and values.

    A query sees the valid keys at its own position and before it, of which `layer` may have a window.
    """
    batch, length, heads, size = q.shape
    kv_heads, groups = layer.num_key_value_heads, heads // layer.num_key_value_heads
    q = (q * attention_scale(layer)).astype(q.dtype).reshape(batch, length, kv_heads, groups, size)
    q = jnp.transpose(q, (0, 2, 1, 3, 4)).reshape(batch, kv_heads, length * groups, size)
    pieces = [piece for piece in pieces if piece.keys.shape[2]]
    logits = jnp.concatenate([_per_row("bkth,bksh->bkts", q, piece.keys) for piece in pieces], axis=-1)
    if layer.logit_soft_cap is not None:
        logits = jnp.tanh(logits / layer.logit_soft_cap) * layer.logit_soft_cap
    seen = jnp.concatenate([_seen(layer, positions, piece, batch) for piece in pieces], axis=-1)  # (B, T, S)
    split = logits.astype(jnp.float32).reshape(batch, kv_heads, length, groups, -1)
    weights = jax.nn.softmax(jnp.where(seen[:, None, :, None], split, -1e9), axis=-1)
    weights = weights.astype(q.dtype).reshape(logits.shape)
    ends = np.cumsum([piece.keys.shape[2] for piece in pieces])[:-1]
    shares = zip(jnp.split(weights, ends, axis=-1), pieces, strict=True)
    result = sum(_per_row("bkts,bksh->bkth", share, piece.values) for share, piece in shares)
    result = result.reshape(batch, kv_heads, length, groups, size)
    return jnp.transpose(result, (0, 2, 1, 3, 4)).reshape(batch, length, heads, size)


def _per_row(equation: str, x, y):
    """`jnp.einsum` over (B, …) and (B, …), or (1, …) for all rows: then one product, without copies of y."""
    if y.shape[0] == 1 and x.shape[0] > 1:
        return jnp.einsum(equation.replace(",b", ","), x, y[0])
    return jnp.einsum(equation, x, y)


def _seen(layer, positions, piece: _Keys, batch: int):
    distance = positions[:, :, None] - piece.positions[:, None, :]  # (B, T, S)
    seen = distance >= 0
    if layer.use_sliding_window_attention:
        seen &= distance < layer.sliding_window_size
    if piece.valid is not None:
        seen &= piece.valid[:, None, :]
    return jnp.broadcast_to(seen, (batch, *seen.shape[1:]))


def _until_stop(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, stop_ids))
    return row[: ends[0]] if len(ends) else row
