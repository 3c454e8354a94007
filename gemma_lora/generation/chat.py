"""`Chat`: a conversation that keeps what it has read.

Each turn is encoded as the whole chat up to it, as training encodes a chat (`encode_prompt`). What its tokens begin
with and the cache holds is not read again. So an answer is that of `generate` to the whole chat, in less time.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import CONTEXT_LENGTH, DEFAULTS, Answering
from gemma_lora.data.encoding import encode_prompt
from gemma_lora.data.templates import Template, template_of
from gemma_lora.gemma.weights import collect
from gemma_lora.generation.decoding import Engine, Pairs, Rows, behind_prompt, places, resized
from gemma_lora.generation.engine import GREEDY, before_stop, continued, most_new_tokens
from gemma_lora.generation.stops import Stops, streamed

_GROWTH = 512  # places by which the cache grows: each size is compiled once


@dataclasses.dataclass
class _Kept:
    """What a chat keeps between turns.

    Invariants: `own` holds keys and values of `tokens` in its first places; `length` of its places are a prompt's.
    """

    engine: Engine
    is_current: Callable[[], bool]  # whether the model is still the one that `engine` was made of
    own: Pairs | None = None
    length: int = 0
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    @classmethod
    def of(cls, model: keras.Model, mixed_precision: bool | None) -> _Kept:
        return cls(Engine.of(model, mixed_precision), _unchanged(model))

    def read(self, prompt: np.ndarray, most: int) -> tuple[Rows, int]:
        """Reads what is new in a prompt, and leaves room for `most` more tokens.

        Returns:
            `(rows, read)`: a batch of this one prompt, and how many tokens of it were not in the cache.
        """
        shortest = min(len(self.tokens), len(prompt) - 1)
        equal = self.tokens[:shortest] == prompt[:shortest]
        known = shortest if equal.all() else int(np.argmin(equal))
        self.length = max(self.length, -(-len(prompt) // _GROWTH) * _GROWTH)
        own, self.own = resized(self.engine.architecture, self.own, self.length + places(most)), None
        nothing = self.engine.shared_keys(prompt[:0])
        own = self.engine.read_on(own, nothing, prompt[None, :-1], known)
        lengths, done = np.array([len(prompt)], np.int32), np.zeros(1, bool)
        return Rows(own, nothing, self.length, lengths, prompt[-1:], done), len(prompt) - known

    def take_back(self, rows: Rows, prompt: np.ndarray, made: np.ndarray, stop_ids: Sequence[int]) -> None:
        """Keeps what an answer's tokens left in the cache, its last one excepted, which was made and not read."""
        if not rows.own:  # it was interrupted while the program ran
            self.tokens = self.tokens[:0]
            return
        stopped = np.flatnonzero(np.isin(made, stop_ids))
        steps = int(stopped[0]) + 1 if len(stopped) else len(made)
        self.own = behind_prompt(rows.own, len(prompt) - 1, rows.length)
        self.tokens = np.concatenate([prompt, made])[: len(prompt) - 1 + steps]


class Chat:
    """A conversation with a model. Call it with what the user says; it gives the model's answer.

    Args:
        model: A KerasHub Gemma `CausalLM`, with an adapter or without. If it is changed between two turns (another
            adapter, merging, training), the next turn sees it.
        system: Text that the model is given before the first turn.
        template: A `Template`; defaults to the adapter's, else the one the weights were made with.
        max_new_tokens: Integer, the most tokens of an answer; see `generate`.
        temperature, top_k, top_p, seed, stop, mixed_precision: See `generate`.
        context_length: Integer, the most tokens of the chat, its next answer included.

    Attributes:
        history: The chat so far, a list of `{"role", "content"}`.
        tokens_read: How many tokens of the last turn's prompt were not in the cache.

    Raises:
        ValueError: If an argument is not as above.

    Example:

    >>> chat = Chat(load_gemma("gemma-3-1b-it.gguf"), system="Be brief.")    # doctest: +SKIP
    >>> chat("What is the capital of Italy?")                                # doctest: +SKIP
    'Rome.'
    >>> for piece in chat.stream("And of France?"):                          # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    Paris.
    """

    def __init__(
        self,
        model: keras.Model,
        system: str | None = None,
        template: Template | None = None,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = GREEDY.temperature,
        top_k: int | None = GREEDY.top_k,
        top_p: float | None = GREEDY.top_p,
        seed: int = GREEDY.seed,
        stop: str | Sequence[str] = (),
        mixed_precision: bool | None = DEFAULTS.mixed_precision,
        context_length: int = CONTEXT_LENGTH,
    ):
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1. Received: max_new_tokens={max_new_tokens}")
        self.model = model
        self.system = system
        self.tokens_read = 0
        self._template, self._max_new_tokens, self._stop = template, max_new_tokens, stop
        self._answering = Answering(temperature or 0.0, top_k, top_p, seed)
        self._mixed_precision, self._context_length = mixed_precision, context_length
        self._turns: list[dict[str, str]] = []
        self._kept: _Kept | None = None
        self._stops()  # what is wrong with `stop` is said now

    @property
    def history(self) -> list[dict[str, str]]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + [dict(turn) for turn in self._turns]

    def reset(self) -> None:
        """Forgets all turns, and what was kept of them. The system text stays."""
        self._turns, self._kept = [], None

    def __call__(self, text: str) -> str:
        """The model's answer to the user's next turn; see `stream`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to the user's next turn in pieces, as it is made.

        The turn is part of the history once its answer has been taken to the end. One that was given up is not.

        Raises:
            ValueError: If `text` is not text.
            GemmaLoraError: If the chat becomes longer than `context_length`.
        """
        if not isinstance(text, str):
            raise ValueError(f"a turn must be text. Received: {type(text).__name__}")
        turn = {"role": "user", "content": text}
        prompt = self._encoded([*self.history, turn])
        most = most_new_tokens(self.model, self._max_new_tokens)
        if len(prompt) + most > self._context_length:
            raise GemmaLoraError(
                f"The chat would have {len(prompt)} tokens, and its answer may have {most} more: over "
                f"{self._context_length}. Begin a new one with reset(), or give Chat another `context_length` or fewer "
                "`max_new_tokens`."
            )
        return self._answer(turn, prompt, most)

    def _answer(self, turn: dict[str, str], prompt: np.ndarray, most: int) -> Iterator[str]:
        stops, turns = self._stops(), self._turns
        kept, self._kept = self._kept, None
        if kept is None or not kept.is_current():
            kept = None  # let go of old copies before new ones are made
            kept = _Kept.of(self.model, self._mixed_precision)
        rows, self.tokens_read = kept.read(prompt, most)
        made, pieces = [np.zeros(0, np.int32)], []

        def new() -> Iterator[np.ndarray]:
            for tokens in continued(kept.engine, rows, stops.ids, most, self._answering):
                made.append(tokens[0])
                yield tokens

        try:
            for piece in streamed(before_stop(new(), stops.ids), self.model.preprocessor.tokenizer, stops):
                pieces.append(piece)
                yield piece
        finally:
            kept.take_back(rows, prompt, np.concatenate(made), stops.ids)
            if self._turns is turns:  # it was not reset in the meantime
                self._kept = kept
        if self._turns is turns:
            self._turns += [turn, {"role": "assistant", "content": "".join(pieces)}]

    def _stops(self) -> Stops:
        return Stops.of(self.model.preprocessor.tokenizer, template_of(self.model, self._template), self._stop)

    def _encoded(self, chat: list[dict[str, str]]) -> np.ndarray:
        """The tokens of a chat as training encodes it."""
        template = template_of(self.model, self._template)
        return np.asarray(encode_prompt(chat, self.model.preprocessor.tokenizer, template), np.int32)


def _unchanged(model: keras.Model) -> Callable[[], bool]:
    """A function that says whether the model's weights are still the arrays that they are now.

    JAX's arrays do not change: a layer with another value has another array. They are not kept alive here.
    """

    def now():
        leaves, structure = jax.tree.flatten(collect(model))
        return leaves, structure

    def reference(leaf):
        return weakref.ref(leaf) if isinstance(leaf, jax.Array) else (lambda: leaf)

    leaves, structure = now()
    before = [reference(leaf) for leaf in leaves]
    del leaves

    def is_current() -> bool:
        leaves, same = now()
        return same == structure and all(old() is leaf for old, leaf in zip(before, leaves, strict=True))

    return is_current
