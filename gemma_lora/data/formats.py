"""Reading training examples: JSONL in four common forms, lists of dictionaries, Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError

_SHOWN = 10  # bad lines that an error lists


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its answer. `turns` is empty, or holds a chat of more than two turns as (role, text)."""

    prompt: str
    response: str
    file: str = ""
    line: int = 0
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        return f"{self.file or 'example'}:{self.line}"


#: What a model may be asked: text, an example (everything before its last answer), or a chat's turns.
Prompt = str | Example | Sequence[Mapping[str, str]]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str | Example):
        return [prompts]
    given: list[Any] = list(prompts)
    return [given] if given and all(isinstance(part, Mapping) for part in given) else given


def turns_before_answer(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What a model sees before it answers, as (role, text), user and model in alternation, the user's last.

    Args:
        prompt: A `Prompt`. System text of a chat joins the user's first turn, as in training.

    Raises:
        ValueError: If it is none, or a chat whose turns do not alternate or end with the model's.

    Example:

    >>> turns_before_answer([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    (('user', 'Be brief.\\n\\nHello'),)
    """
    if isinstance(prompt, Example):
        return prompt.turns[:-1] or (("user", prompt.prompt),)
    if isinstance(prompt, str):
        return (("user", prompt),)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValueError(f"a prompt must be text, an Example or a list of turns. Received: {type(prompt).__name__}")
    return _alternating(list(prompt), "chat", "role", "content", last="user")


class BadLines:
    """Collects what is wrong with lines, and raises or counts at the end."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.messages: list[str] = []
        self.files: dict[str, int] = {}

    def add(self, file: str, line: int, what: str) -> None:
        self.messages.append(f"{file}:{line}: {what}")
        self.files[file] = self.files.get(file, 0) + 1

    def finish(self) -> None:
        """Raises with the first bad lines unless they are to be skipped."""
        if not self.messages or self.skip:
            return
        shown = "\n".join(self.messages[:_SHOWN])
        more = len(self.messages) - _SHOWN
        rest = f"\n… and {more} more" if more > 0 else ""
        count = len(self.messages)
        raise GemmaLoraError(
            f"{count} bad line{'s' if count > 1 else ''}:\n{shown}{rest}\n"
            "Mend them, or skip and count them with --skip-bad-lines (skip_bad_lines=True)."
        )


def summary(skipped: Mapping[str, int]) -> str:
    """One line about bad lines that were left out, given their number by file; empty if there were none."""
    counts = ", ".join(f"{count} in {file}" for file, count in skipped.items())
    return f"Bad lines skipped: {counts}." if counts else ""


def read_jsonl(path: str | os.PathLike, skip_bad_lines: bool = False, bad: BadLines | None = None) -> list[Example]:
    """Reads examples from a JSON Lines file.

    Each line is `{"prompt", "response"}`, Alpaca's `{"instruction", "input", "output"}`, ShareGPT's
    `{"conversations": [{"from", "value"}]}` or `{"messages": [{"role", "content"}]}`.

    Args:
        path: The file, UTF-8. Empty lines are passed over.
        skip_bad_lines: Leave bad lines out instead of raising.
        bad: A collector to use instead; the caller then finishes it.

    Raises:
        GemmaLoraError: If the file is missing, holds no example, or a line is bad; it names file and line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error.strerror}). Give a JSONL file.") from error
    own = bad is None
    bad = bad or BadLines(skip_bad_lines)
    examples = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(_from_line(line, str(path), number))
        except ValueError as error:
            bad.add(str(path), number, str(error))
    if own:
        bad.finish()
    if not examples and (own or not bad.messages):
        raise GemmaLoraError(f"{path}: holds no usable example. Give one JSON object a line.")
    return examples


def _from_line(line: bytes, file: str, number: int) -> Example:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    return to_example(value, file, number)


def from_records(records: Iterable[Any], name: str, bad: BadLines) -> list[Example]:
    """Examples of dictionaries, such as the rows of a Hugging Face dataset."""
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(to_example(record, name, number))
        except ValueError as error:
            bad.add(name, number, str(error))
    return examples


def to_example(value: Any, file: str = "", line: int = 0) -> Example:
    """Turns one record of any known form into an `Example`.

    Raises:
        ValueError: Says what is wrong with the record.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, this is {type(value).__name__}")
    for keys, reader in _FORMS:
        if any(key in value for key in keys):
            prompt, response, turns = reader(value)
            if not response.strip():
                raise ValueError("the answer is empty")
            return Example(prompt, response, file, line, turns)
    raise ValueError(
        "unknown form: fields are " + (", ".join(map(repr, value)) or "none") + "; needed are prompt and response, "
        "instruction and output, conversations, or messages"
    )


def _text(value: dict, key: str) -> str:
    if key not in value:
        raise ValueError(f"the field {key!r} is missing")
    if not isinstance(value[key], str):
        raise ValueError(f"the field {key!r} must be text, this is {type(value[key]).__name__}")
    try:
        value[key].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the field {key!r} holds half a character (an unpaired \\ud800…\\udfff)") from None
    return value[key]


def _prompt_response(value: dict):
    plural = "prompts" in value or "responses" in value
    keys = ("prompts", "responses") if plural else ("prompt", "response")
    return _text(value, keys[0]), _text(value, keys[1]), ()


def _alpaca(value: dict):
    instruction, output = _text(value, "instruction"), _text(value, "output")
    extra = _text(value, "input") if value.get("input") else ""
    return (f"{instruction}\n\n{extra}" if extra else instruction), output, ()


def _sharegpt(value: dict):
    return _conversation(value["conversations"], "conversations", "from", "value")


def _messages(value: dict):
    return _conversation(value["messages"], "messages", "role", "content")


_ROLES = {"human": "user", "user": "user", "gpt": "model", "assistant": "model", "model": "model"}


def _conversation(entries: Any, field: str, role_key: str, text_key: str):
    turns = _alternating(entries, field, role_key, text_key, last="model")
    return turns[-2][1], turns[-1][1], turns if len(turns) > 2 else ()


def _alternating(entries: Any, field: str, role_key: str, text_key: str, last: str) -> tuple[tuple[str, str], ...]:
    """Checks a chat: turns of user and model in alternation, the last one's role; system text joins the first."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"the field {field!r} must be a list of turns")
    system = ""
    turns: list[tuple[str, str]] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"a turn of {field!r} must be an object")
        role, text = _text(entry, role_key), _text(entry, text_key)
        if role == "system" and not turns:
            system = f"{text}\n\n"
            continue
        if role not in _ROLES:
            raise ValueError(f"unknown role {role!r}; known are system, {', '.join(_ROLES)}")
        expected = "model" if len(turns) % 2 else "user"
        if _ROLES[role] != expected:
            raise ValueError(f"turns must alternate: turn {len(turns) + 1} is {role!r}, expected the {expected}'s")
        turns.append((_ROLES[role], text))
    if not turns or turns[-1][0] != last:
        raise ValueError(f"the last turn must be the {last}'s")
    if any(role == "model" and not text.strip() for role, text in turns):
        raise ValueError("an answer is empty")
    turns[0] = ("user", system + turns[0][1])
    return tuple(turns)


_Reader = Callable[[dict], tuple[str, str, Any]]
_FORMS: Sequence[tuple[tuple[str, ...], _Reader]] = (
    (("messages",), _messages),
    (("conversations",), _sharegpt),
    (("instruction", "output"), _alpaca),
    (("prompt", "response", "prompts", "responses"), _prompt_response),
)
