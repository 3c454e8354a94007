"""Examples, prompts and bad lines: what is read from files, lists of dictionaries and Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.chats import Turn, check_alternation, read_turns
from gemma_lora.data.containers import Unreadable, read_rows
from gemma_lora.data.fields import Notes
from gemma_lora.data.notices import Notices
from gemma_lora.data.records import read_record

_SHOWN = 10  # bad lines that an error lists


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Invariants: `turns` is empty, or holds a chat of more than two turns as (role, text), user and model in
    alternation; `prompt` and `response` are then the last two. `learn` is empty where every answer is learned, else
    one value a turn: False for a turn that is context only. The last answer is always learned. Text is as it was
    given; what reads lines takes white space off around it.
    """

    prompt: str
    response: str
    file: str = ""
    line: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    learn: tuple[bool, ...] = ()

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
        prompt: A `Prompt`. As in training, white space around texts is taken off, and system text of a chat joins
            the user's first turn. Earlier answers are the model's own: they may be empty or hold control characters,
            which are text as any other.

    Raises:
        ValueError: If it is none, or a chat whose turns do not alternate or end with the model's.

    Example:

    >>> turns_before_answer([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    (('user', 'Be brief.\\n\\nHello'),)
    """
    if isinstance(prompt, Example):
        return prompt.turns[:-1] or (("user", prompt.prompt),)
    if isinstance(prompt, str):
        return (("user", prompt.strip()),)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ValueError(f"a prompt must be text, an Example or a list of turns. Received: {type(prompt).__name__}")
    system, turns = read_turns(list(prompt), "chat", [], controls=True)
    turns = [turn._replace(text=turn.text.strip()) for turn in turns]
    check_alternation(turns, last="user", empty=True)
    return _with_system(system, turns)


def _with_system(system: str, turns: Sequence[Turn]) -> tuple[tuple[str, str], ...]:
    """Turns as (role, text); system text joins the first, with a blank line between, as in Gemma's chat template."""
    first = f"{system}\n\n{turns[0].text}" if system.strip() else turns[0].text
    return (("user", first), *((turn.role, turn.text) for turn in turns[1:]))


class BadLines:
    """Collects what is wrong with lines, and raises or counts at the end. `notices` has what else is to be said."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.notices = Notices()
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


def read_examples(
    path: str | os.PathLike,
    skip_bad_lines: bool = False,
    bad: BadLines | None = None,
    on_notice: Callable[[str], None] = print,
) -> list[Example]:
    """Reads examples from a file: JSON Lines, a JSON array, CSV, TSV or Parquet, each also with .gz.

    Each line is `{"prompt", "response"}` (or completion, question and answer), Alpaca's `{"instruction", "input",
    "output"}`, Dolly's `{"instruction", "context", "response"}`, or a chat in `messages` or `conversations`, each turn
    as `{"role", "content"}` or `{"from", "value"}`.

    Args:
        path: The file, UTF-8. Empty lines are passed over.
        skip_bad_lines: Leave bad lines out instead of raising.
        bad: A collector to use instead; the caller then finishes it, and shows its notices.
        on_notice: Called with each sentence on how the lines were read.

    Raises:
        GemmaLoraError: If the file is missing, holds no example, or a line is bad; it names file and line.
    """
    own = bad is None
    bad = bad or BadLines(skip_bad_lines)
    examples = []
    for number, value in read_rows(path):
        try:
            if isinstance(value, Unreadable):
                raise ValueError(value.reason)
            examples.append(to_example(value, str(path), number, bad.notices))
        except ValueError as error:
            bad.add(str(path), number, str(error))
    if own:
        bad.finish()
        for sentence in bad.notices.sentences():
            on_notice(sentence)
    if not examples and (own or not bad.messages):
        raise GemmaLoraError(f"{path}: holds no usable example. Give one JSON object a line.")
    return examples


#: The former name of `read_examples`, from when it read JSON Lines alone.
read_jsonl = read_examples


def from_records(records: Iterable[Any], name: str, bad: BadLines) -> list[Example]:
    """Examples of dictionaries, such as the rows of a Hugging Face dataset."""
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(to_example(record, name, number, bad.notices))
        except ValueError as error:
            bad.add(name, number, str(error))
    return examples


def to_example(value: Any, file: str = "", line: int = 0, notices: Notices | None = None) -> Example:
    """Turns one record of any known form into an `Example`.

    Args:
        value: The record.
        file, line: Where it is from, for messages.
        notices: Collects what a user should know: fields that are not used, numbers that became text.

    Raises:
        ValueError: Says what is wrong with the record.

    Example:

    >>> to_example({"instruction": "Translate.", "input": "eau", "output": "water"}).prompt
    'Translate.\\n\\neau'
    """
    notes: Notes = []
    system, read = read_record(value, notes)
    turns = _with_system(system, read)
    learn = tuple(turn.role == "model" and turn.learn for turn in read)
    marked = any(turn.role == "model" and not turn.learn for turn in read)
    example = Example(turns[-2][1], turns[-1][1], file, line, turns if len(turns) > 2 else (), learn if marked else ())
    if notices is not None:
        notices.add_line(example.where, notes)
    return example
