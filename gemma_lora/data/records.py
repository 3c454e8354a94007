"""One record of any known form as turns of user and model: what its fields mean is decided here.

Every field is used, refused by name, or noted as not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_lora.data.chats import Turn, check_alternation, content_text, is_chat, joined_system, read_pairs, read_turns
from gemma_lora.data.fields import (
    ADDED,
    ANSWERS,
    CHATS,
    PROMPTS,
    REFUSED,
    SYSTEMS,
    Notes,
    is_empty,
    present,
    refuse,
    text_of,
)
from gemma_lora.data.markers import without_markers

#: A field that stands alone -> the field that is looked for beside it.
_PARTNERS = {
    **{"prompt": "response", "prompts": "responses", "instruction": "output", "question": "answer"},
    **{"query": "response", "input": "output", "response": "prompt", "responses": "prompts", "output": "instruction"},
    **{"completion": "prompt", "answer": "question"},
}


def read_record(value: Any, notes: Notes) -> tuple[str, list[Turn]]:
    """Reads a record: a pair of texts, Alpaca's fields, or a chat.

    Args:
        value: The record.
        notes: Where to note what is not used or was changed.

    Returns:
        The system text, empty where there is none, and turns of user and model in alternation. The last one is the
        model's, and is learned.

    Raises:
        ValueError: If a field is missing, or has a meaning that training would lose. It says which, and why.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a JSON object is needed, this is {type(value).__name__}")
    fields = present(value)
    refuse(fields, REFUSED)
    _refuse_line_marks(fields)
    chats = [name for name in CHATS if name in fields]
    if len(chats) > 1:
        raise ValueError(f"both {chats[0]!r} and {chats[1]!r} hold a chat. Keep one of the two")
    if chats:
        used, system, turns = _chat(fields, chats[0], notes)
    else:
        used, system, turns = _pair(fields, value, notes)
    unused = [name for name in fields if name not in used and not is_empty(fields[name])]
    notes += [("unused", repr(name)) for name in unused]
    return system, _learned_turns(_trimmed(turns, notes), notes)


def _refuse_line_marks(fields: Mapping[str, Any]) -> None:
    """Raises where a whole line is marked as a bad answer, or weighs more or less than others."""
    label = fields.get("label")
    if isinstance(label, bool) and any(name in fields for name in (*CHATS, *ANSWERS)):
        raise ValueError(
            "the field 'label' says whether the answer is wanted (true) or not. Keep the wanted lines, without 'label'"
        )
    if fields.get("weight", 1) not in (1, "1", "1.0") or fields.get("train") is False:
        name = "train" if fields.get("train") is False else "weight"
        raise ValueError(f"the field {name!r} weighs the whole line. Leave the line out, or remove the field")


def _chat(fields: Mapping[str, Any], field: str, notes: Notes) -> tuple[set[str], str, list[Turn]]:
    used = {field, *_system_fields(fields)}
    system, turns = read_turns(fields[field], field, notes, _system(fields, notes))
    said = {system.strip(), *(turn.text.strip() for turn in turns)}
    for name in (*PROMPTS, *ANSWERS, *ADDED, "history"):
        if name in fields and not is_empty(fields[name]):
            if not isinstance(fields[name], str) or fields[name].strip() not in said:
                raise ValueError(
                    f"both {field!r} and {name!r} are given. Put all into the chat's turns, or remove {name!r}"
                )
    return used, system, turns


def _pair(fields: Mapping[str, Any], value: Mapping, notes: Notes) -> tuple[set[str], str, list[Turn]]:
    prompt, answer = _names(fields, value)
    added = [name for name in ADDED if name in fields and name != prompt]
    used = {prompt, answer, *added, "history", *_system_fields(fields)}
    system = _system(fields, notes)
    turns: list[Turn] = []
    if not is_empty(fields.get("history")):
        early, turns = read_pairs(fields["history"], notes)
        system = joined_system(system, early)
    if is_chat(fields[prompt]):  # TRL's pair of chats: the answer's turns are learned
        for name in added:
            if not is_empty(fields[name]):
                raise ValueError(f"both the chat {prompt!r} and {name!r} are given. Put all into the chat's turns")
        early, shown = read_turns(fields[prompt], prompt, notes, system)
        system, turns = early, [*turns, *(turn._replace(learn=False) for turn in shown)]
    else:
        texts = [text_of(fields[prompt], prompt, notes)]
        texts += [text for name in added if (text := text_of(fields[name], name, notes)).strip()]
        turns.append(Turn("user", "\n\n".join(texts)))
    if is_chat(fields[answer]):
        late, answers = read_turns(fields[answer], answer, notes)
        if late:
            raise ValueError("a system turn may only come first")
        return used, system, [*turns, *answers]
    return used, system, [*turns, Turn("model", text_of(fields[answer], answer, notes))]


def _names(fields: Mapping[str, Any], value: Mapping) -> tuple[str, str]:
    """The names of the fields that hold the prompt and the answer."""
    prompts = [name for name in PROMPTS if name in fields]
    answers = [name for name in ANSWERS if name in fields]
    for what, found in (("the prompt", prompts), ("the answer", answers)):
        if len(found) > 1:
            raise ValueError(f"both {found[0]!r} and {found[1]!r} could be {what}. Keep one of the two")
    prompts = prompts or [name for name in ("input",) if name in fields]
    if prompts and answers:
        return prompts[0], answers[0]
    known = ", ".join(map(repr, value)) or "none"
    if not prompts and not answers:
        if "text" in fields:
            raise ValueError(
                "the field 'text' is not said to be prompt or answer. Give both, as 'prompt' and 'response'; "
                f"fields are {known}"
            )
        raise ValueError(
            f"unknown form: fields are {known}; needed are prompt and response, instruction and output, "
            "conversations, or messages"
        )
    missing = _PARTNERS[(prompts or answers)[0]]
    null = " (null)" if missing in value else ""
    raise ValueError(f"the field {missing!r} is missing{null}; fields are {known}")


def _system_fields(fields: Mapping[str, Any]) -> list[str]:
    return [name for name in SYSTEMS if name in fields]


def _system(fields: Mapping[str, Any], notes: Notes) -> str:
    system = ""
    for name in _system_fields(fields):
        system = joined_system(system, content_text(fields[name], name, notes))
    return system


def _trimmed(turns: list[Turn], notes: Notes) -> list[Turn]:
    """Turns without white space and without chat markers around their texts."""
    trimmed = [turn._replace(text=turn.text.strip()) for turn in turns]
    if trimmed != turns:
        notes.append(("trimmed", ""))
    return without_markers(trimmed, notes)


def _learned_turns(turns: list[Turn], notes: Notes) -> list[Turn]:
    """Turns up to the last one that is learned; raises if none is."""
    check_alternation(turns, last="model")
    last = max((place for place, turn in enumerate(turns) if turn.role == "model" and turn.learn), default=None)
    if last is None:
        raise ValueError("every answer has weight 0, so nothing is learned. Remove the line, or a weight")
    if last + 1 < len(turns):
        notes.append(("behind", ""))
    return turns[: last + 1]
