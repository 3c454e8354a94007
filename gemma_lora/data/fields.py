"""The fields of a line: which are absent, which are text, and which mean something that training would lose."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

#: What is noted while a line is read: pairs of a kind of `notices.KINDS` and a detail.
Notes = list[tuple[str, str]]

_TOOLS = "belongs to tool calls, which cannot be trained yet. Leave such lines out"
_REASONING = "holds a reasoning, which Gemma's turns have no place for. Put it into the answer's text, or remove it"
_MEDIA = "holds images, sound or files, and only text can be trained. Leave such lines out"
_PREFERENCE = "is one of a pair of preferred and rejected answers. Give the answer to learn as 'response' alone"
_PREFIX = "marks the start of an answer that is to be continued. Give a prompt and its whole answer"
_WEIGHTS = "weighs parts of a line. Give whole turns of a chat a 'weight' of 0 or 1 instead"

#: Names of a line's fields, in the order in which they are looked for: chats, the user's text, the model's.
CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "prompts", "instruction", "question", "query")
ANSWERS = ("response", "responses", "output", "completion", "answer")
SYSTEMS = ("system", "system_prompt", "system_message")
#: Text that is added to the prompt, after a blank line.
ADDED = ("input", "context")

#: Fields that mean something which training would lose -> what they are, and the remedy. They are refused by name.
REFUSED = {
    **dict.fromkeys(("tools", "functions", "function_call", "tool_calls", "tool_choice", "tool_call_id"), _TOOLS),
    **dict.fromkeys(("parallel_tool_calls", "tool_call", "tool_use", "tool_responses"), _TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "rationale"), _REASONING),
    **dict.fromkeys(("chain_of_thought", "cot", "scratchpad"), _REASONING),
    **dict.fromkeys(("image", "images", "image_url", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("files", "attachments"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "kto_tag", "preferred_output", "non_preferred_output"), _PREFERENCE),
    **dict.fromkeys(("prefix", "prefill", "suffix", "continue_final_message"), _PREFIX),
    **dict.fromkeys(("train_detail", "training_detail", "loss_mask", "loss_weight"), _WEIGHTS),
    "refusal": "holds a refusal apart from the answer. Put it into the answer's text, or remove it",
    "documents": "holds documents apart from the prompt. Put their text into the prompt, or remove it",
    "chat_template": "is a template of its own. Give it as a template.json, see --template",
}
#: What is refused in a turn.
REFUSED_IN_TURN = {
    **REFUSED,
    **dict.fromkeys(("function", "recipient"), _TOOLS),
    "mask": _WEIGHTS,
    "partial": _PREFIX,
    "channel": "names a channel, which Gemma's turns have no place for. Keep the final answer alone",
    "name": "names a speaker, which Gemma's turns have no place for. Put the name into the text, or remove it",
}
_KNOWN = {*CHATS, *PROMPTS, *ANSWERS, *SYSTEMS, *ADDED, *REFUSED_IN_TURN, "history", "text", "label", "weight"}
_KNOWN |= {"role", "content", "from", "value", "train", "loss", "type"}

# Characters that are none of a text: controls other than tab, line ends, form feed, and half of a pair.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


def is_absent(value: Any) -> bool:
    """Whether a column has no value here: null, or NaN, which pandas writes into an empty cell."""
    if isinstance(value, str | int | list | dict):  # nearly always
        return False
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational) and math.isnan(value)


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: it is absent, false, an empty text, list or object."""
    return is_absent(value) or value is False or value in ("", [], {}, (), "[]", "{}", "null")


def present(record: Mapping[Any, Any]) -> dict[str, Any]:
    """A record's fields without the absent ones. Names that have a meaning are in lower case.

    Raises:
        ValueError: If a name is no text, or two are one.
    """
    fields: dict[str, Any] = {}
    for key, value in record.items():
        name = key if key in _KNOWN else _name(key)
        value = _plain(value)
        if is_absent(value):
            continue
        if name in fields:
            raise ValueError(f"the field {name!r} stands there twice")
        fields[name] = value
    return fields


def _name(key: Any) -> str:
    """A field's name: as it is written, or in lower case if it then is one that has a meaning."""
    if not isinstance(key, str):
        raise ValueError(f"a field's name must be text, this is {key!r}")
    check_characters(key, f"the name {key!r}")
    lower = key.strip().lower()
    return lower if lower in _KNOWN else key


def refuse(fields: Mapping[str, Any], names: Mapping[str, str], whose: str = "the field") -> None:
    """Raises if a field has a meaning that training would lose.

    Args:
        fields: The fields that are present.
        names: Names that are refused, and why.
        whose: What the message calls a field.
    """
    for name in fields:
        if name in names and not is_empty(fields[name]):
            raise ValueError(f"{whose} {name!r} {names[name]}")


def text_of(value: Any, name: str, notes: Notes, controls: bool = False) -> str:
    """A field's value as text. A number becomes text, which is noted.

    Args:
        value: The value.
        name: The field's name, for messages.
        notes: Where to note a number.
        controls: Whether control characters may stand in it: a model's own answers may hold them.

    Raises:
        ValueError: If it is anything else, or holds characters that are no text.
    """
    if isinstance(value, str):
        check_characters(value, f"the field {name!r}", controls)
        return value
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        word = "true" if value else "false"
        raise ValueError(f"the field {name!r} must be text, this is {word}. Write the word that is meant, in quotes")
    if isinstance(value, numbers.Number) or type(value).__name__ == "Decimal":
        written = str(value)
        if isinstance(value, complex) or "inf" in written.lower() or "nan" in written.lower():
            raise ValueError(f"the field {name!r} must be text, this is {written}")
        notes.append(("numbers", f'{written} → "{written}"'))
        return written
    raise ValueError(f"the field {name!r} must be text, this is {type(value).__name__}")


def check_characters(text: str, what: str, controls: bool = False) -> None:
    """Raises if a text holds half a character, or without `controls` a control character but tab and line ends."""
    if text.isascii() and text.isprintable():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a character (an unpaired \\ud800…\\udfff)") from None
    if not controls and (found := _CONTROLS.search(text)):
        raise ValueError(f"{what} holds the control character U+{ord(found[0]):04X}. Remove it")


def _plain(value: Any) -> Any:
    """NumPy's arrays and scalars, in which some libraries hand over lists and numbers, as Python's own."""
    if isinstance(value, str | int | list | dict | None):
        return value
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value
