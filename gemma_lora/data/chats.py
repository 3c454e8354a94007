"""Turns of a chat: who speaks, what is said, and whether it is learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemma_lora.data.fields import REFUSED_IN_TURN, Notes, is_absent, is_empty, present, refuse, text_of

#: A role as it may be written, in any case -> Gemma's.
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "model"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "tool_call", "tool_response")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_WEIGHT_KEYS = ("weight", "train", "loss")  # OpenAI's and Mistral's, axolotl's, ms-swift's
_TEXT_PARTS = ("text", "input_text", "output_text")


class Turn(NamedTuple):
    """A turn of user or model; `learn` is False where the model's words are shown and not learned."""

    role: str
    text: str
    learn: bool = True


def read_turns(
    entries: Any, field: str, notes: Notes, system: str = "", controls: bool = False
) -> tuple[str, list[Turn]]:
    """Reads a list of turns, in either pair of keys: role and content, or from and value.

    Args:
        entries: The list.
        field: What it is called, for messages.
        notes: Where to note what is not used.
        system: System text that comes before the chat's own.
        controls: Whether control characters may stand in the texts, as in a prompt's, which are not learned.

    Returns:
        The system text, empty where there is none, and the turns of user and model.

    Raises:
        ValueError: If a turn is not understood, or has a meaning that training would lose. It says why.
    """
    if isinstance(entries, str | bytes | Mapping) or not isinstance(entries, Sequence) or not entries:
        raise ValueError(f"the field {field!r} must be a list of turns")
    turns: list[Turn] = []
    for entry in entries:
        role, turn = _read_turn(entry, field, notes, controls)
        if role != "system":
            turns.append(turn)
        elif turns:
            raise ValueError(f"a system turn may only come first, this one is after turn {len(turns)}")
        else:
            system = joined_system(system, turn.text)
    return system, turns


def joined_system(first: str, second: str) -> str:
    """Two system texts as one, with a blank line between; the same text twice is one."""
    return "\n\n".join(dict.fromkeys(text for text in (first, second) if text.strip()))


def check_alternation(turns: Sequence[Turn], last: str, empty: bool = False) -> None:
    """Raises unless user and model alternate, the user first and `last` at the end; and if an answer is empty.

    Args:
        turns: The turns.
        last: Whose the last one must be.
        empty: Whether answers may be empty: a model's own may, what it is to learn may not.
    """
    for number, turn in enumerate(turns):
        expected = "model" if number % 2 else "user"
        if turn.role != expected:
            raise ValueError(f"turns must alternate: turn {number + 1} is the {turn.role}'s, expected the {expected}'s")
    if not turns or turns[-1].role != last:
        raise ValueError(f"the last turn must be the {last}'s")
    if not empty and any(turn.role == "model" and not turn.text.strip() for turn in turns):
        raise ValueError("an answer is empty" if len(turns) > 2 else "the answer is empty")


def _read_turn(entry: Any, field: str, notes: Notes, controls: bool) -> tuple[str, Turn]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"a turn of {field!r} must be an object")
    fields = present(entry)
    refuse(fields, REFUSED_IN_TURN, "a turn's field")
    role_key, text_key = _one_of(fields, _ROLE_KEYS, entry), _one_of(fields, _TEXT_KEYS, entry)
    role = _role(text_of(fields[role_key], role_key, []))
    text = content_text(fields[text_key], text_key, notes, controls)
    learn = _learned(fields, role)
    known = {role_key, text_key, *_WEIGHT_KEYS}
    notes += [("unused", f"a turn's {name!r}") for name in fields if name not in known]
    return role, Turn(role, text, learn)


def _one_of(fields: Mapping[str, Any], names: tuple[str, str], entry: Mapping) -> str:
    """The one of two names under which a turn has a value."""
    found = [name for name in names if name in fields]
    if len(found) == 2:
        raise ValueError(f"a turn has both {names[0]!r} and {names[1]!r}. Keep one of the two")
    if not found:
        other = _ROLE_KEYS if names is _TEXT_KEYS else _TEXT_KEYS
        place = next((place for place, name in enumerate(other) if name in entry), 0)
        missing = next((name for name in names if name in entry), names[place])
        raise ValueError(f"the field {missing!r} is missing in a turn")
    return found[0]


def _role(written: str) -> str:
    name = written.strip().lower()
    if name in _TOOL_ROLES:
        raise ValueError(
            f"the role {written!r} belongs to tool calls, which cannot be trained yet. Leave such lines out"
        )
    if name not in ROLES:
        raise ValueError(f"unknown role {written!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _learned(fields: Mapping[str, Any], role: str) -> bool:
    """What `weight`, `train` or `loss` say: whether the turn is to be learned."""
    marks = {}
    for name in _WEIGHT_KEYS:
        if name in fields:
            if not isinstance(fields[name], int | float) or fields[name] not in (0, 1):
                raise ValueError(f"a turn's {name!r} must be 0 or 1, this is {fields[name]!r}")
            marks[name] = bool(fields[name])
    if len(set(marks.values())) > 1:
        raise ValueError(f"a turn's {' and '.join(map(repr, marks))} contradict each other")
    if role != "model" and any(marks.values()):
        name = next(name for name in marks if marks[name])
        raise ValueError(f"a turn of the {role} has {name!r} 1; only the model's turns are learned. Remove it")
    return all(marks.values())


def content_text(value: Any, name: str, notes: Notes, controls: bool = False) -> str:
    """A turn's text. Of a list of parts, the texts are joined, on lines of their own where no space is between.

    Args:
        value: The text or the parts.
        name: The field's name, for messages.
        notes: Where to note what is not used.
        controls: See `text_of`.

    Raises:
        ValueError: If a part is not text: an image, a tool's call.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return text_of(value, name, notes, controls)
    whole = ""
    for part in value:
        is_text = isinstance(part, str)
        text = text_of(part, name, notes, controls) if is_text else _part_text(part, name, notes, controls)
        between = "\n" if whole and text and not whole[-1].isspace() and not text[0].isspace() else ""
        whole += between + text
    return whole


def _part_text(part: Any, name: str, notes: Notes, controls: bool) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of {name!r} must be an object, this is {type(part).__name__}")
    fields = present(part)
    kind = fields.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise ValueError(f"a part of {name!r} is of the type {kind!r}: {_unsupported(str(kind))}")
    refuse(fields, REFUSED_IN_TURN, f"a part of {name!r} has a field that is refused:")
    if "text" not in fields:
        raise ValueError(f"a part of {name!r} has no 'text'")
    notes += [("unused", f"a part's {key!r}") for key in fields if key not in ("type", "text")]
    return text_of(fields["text"], "text", notes, controls)


def _unsupported(kind: str) -> str:
    if "tool" in kind or "function" in kind:
        return "tool calls cannot be trained yet. Leave such lines out"
    if "think" in kind or "reason" in kind:
        return "a reasoning has no place in Gemma's turns. Put it into the answer's text, or remove it"
    return "only text can be trained, not images, sound or files. Leave such lines out"


def read_pairs(history: Any, notes: Notes) -> tuple[str, list[Turn]]:
    """Alpaca's `history`: earlier turns as [user, model] pairs, or as turns.

    Returns:
        System text, empty where there is none, and the turns.
    """
    if isinstance(history, str):
        try:
            history = json.loads(history)
        except ValueError:
            history = None
    if not isinstance(history, list | tuple):
        raise ValueError("the field 'history' must be a list of [user, model] pairs")
    if history and all(isinstance(entry, Mapping) for entry in history):
        try:
            system, turns = read_turns(list(history), "history", notes)
            check_alternation(turns, last="model")
        except ValueError as error:
            raise ValueError(f"the field 'history': {error}") from None
        return system, turns
    turns = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(is_absent(text) for text in pair):
            raise ValueError("the field 'history' must be a list of [user, model] pairs")
        turns += [Turn("user", text_of(pair[0], "history", notes)), Turn("model", text_of(pair[1], "history", notes))]
    return "", turns


def is_chat(value: Any) -> bool:
    """Whether a value looks like a list of turns."""
    return (
        isinstance(value, list) and bool(value) and not is_empty(value) and all(isinstance(v, Mapping) for v in value)
    )
