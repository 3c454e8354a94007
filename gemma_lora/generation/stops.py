"""Where an answer ends: at a token, or where its text holds a string; and how its text is given out as it grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gemma_lora.data.templates import CONTROL_TOKENS, Template

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet one


@dataclasses.dataclass(frozen=True)
class Stops:
    """What ends an answer.

    Invariants: `ids` holds at least `<eos>`; `texts` are not empty. A string that is one token is among both: the
    compiled program then stops by itself.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, template: Template, stop: str | Sequence[str] = ()) -> Stops:
        """The template's stops and the caller's.

        Args:
            tokenizer: As in `generate`.
            template: Its `stop` names control tokens, and strings.
            stop: One more string or several.

        Raises:
            ValueError: If `stop` is neither text nor several texts, or one is empty.
        """
        more = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in more):
            raise ValueError(f"`stop` must be text or a list of texts, none of them empty. Received: stop={stop!r}")
        ids, texts = {tokenizer.token_to_id("<eos>")}, []
        for name in dict.fromkeys((*template.stop, *more)):
            number = tokenizer.token_to_id(name) if name in CONTROL_TOKENS else _whole_token(tokenizer, name)
            if number is not None:
                ids.add(number)
            if name and name not in CONTROL_TOKENS:
                texts.append(name)
        return cls(tuple(sorted(int(i) for i in ids)), tuple(texts))

    def end_of(self, text: str) -> int | None:
        """Where the string begins that is complete first, of several the shortest; None if there is none.

        Text that follows changes nothing, so it does not matter after how many tokens one looks.
        """
        found = [(place + len(stop), -place) for stop in self.texts if (place := text.find(stop)) >= 0]
        return -min(found)[1] if found else None

    def are_in(self, tokenizer: Any, tokens: np.ndarray) -> bool:
        """Whether the text of these tokens holds one of the strings."""
        return bool(self.texts) and self.end_of(text_of(tokenizer, tokens)) is not None

    def answer(self, tokenizer: Any, tokens: np.ndarray) -> str:
        """The text of an answer's tokens, up to the first string, stripped of outer white space."""
        text = text_of(tokenizer, tokens)
        return text[: self.end_of(text)].strip()

    def certain(self, text: str) -> str:
        """The part of a growing text that stays whatever comes: no half characters, no half stop strings."""
        text = text.rstrip(_HALF)
        if (end := self.end_of(text)) is not None:
            return text[:end].strip()
        half = max((_overlap(text, stop) for stop in self.texts), default=0)
        return text[: len(text) - half].strip()


def text_of(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of token ids; empty for none."""
    ids = [int(i) for i in tokens]
    return tokenizer.detokenize(ids) if ids else ""


def streamed(pieces: Iterable[np.ndarray], tokenizer: Any, stops: Stops) -> Iterator[str]:
    """An answer's text as it grows; joined, the pieces are `stops.answer` of all tokens.

    Args:
        pieces: New tokens, a few at a time, none of them a stop token. No more are taken once the text stops.
    """
    tokens, given = np.zeros(0, np.int32), 0
    for piece in pieces:
        tokens = np.concatenate([tokens, piece])
        text = stops.certain(text_of(tokenizer, tokens))
        if len(text) > given:
            yield text[given:]
            given = len(text)
        if stops.are_in(tokenizer, tokens):
            break
    if rest := stops.answer(tokenizer, tokens)[given:]:
        yield rest


def _whole_token(tokenizer: Any, text: str) -> int | None:
    """The number of the token that is this text, if there is one."""
    number = int(tokenizer.token_to_id(text)) if text else -1
    return number if number >= 0 and text_of(tokenizer, [number]) == text else None


def _overlap(text: str, stop: str) -> int:
    """The most signs at a text's end with which a stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
