"""Prompts without answers: a text file, one a line, JSON Lines, or a JSON array."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.chats import is_chat
from gemma_lora.data.containers import array_rows
from gemma_lora.data.formats import BadLines, Prompt, to_example, turns_before_answer


def read_prompts(raw: bytes, name: str, jsonl: bool) -> list[Prompt]:
    """The prompts of a file's bytes, UTF-8, one a line; empty lines are passed over.

    Args:
        raw: The bytes.
        name: What messages call the file.
        jsonl: Whether it is JSON, as Lines or as one array. A prompt is then text, `{"prompt"}`, a chat whose last turn
            is the user's, as `{"messages"}` or as the list of its turns, or any example with an answer, which is left
            out. An array of turns is one chat.

    Raises:
        GemmaLoraError: If a line is not UTF-8 or not as above, or there is none; it names file and line.

    Example:

    >>> read_prompts(b'first\\n\\nsecond\\n', "prompts.txt", jsonl=False)
    ['first', 'second']
    >>> read_prompts(b'{"prompt": "first"}', "prompts.jsonl", jsonl=True)
    ['first']
    >>> read_prompts(b'["first",\\n "second"]', "prompts.json", jsonl=True)
    ['first', 'second']
    """
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    bad, prompts = BadLines(skip=False), []
    array = _array(raw, name) if jsonl else None
    for number, value in _lines(raw) if array is None else array:
        try:
            if array is not None:
                prompts.append(_prompt(value, name, number))
                continue
            text = value.decode("utf-8").removesuffix("\r")
            prompts.append(_prompt(_parsed(text), name, number) if jsonl else text)
        except UnicodeDecodeError as error:
            bad.add(name, number, f"not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            bad.add(name, number, str(error))
    if bad.messages:
        raise GemmaLoraError("\n".join(bad.messages[:10]))
    if not prompts:
        raise GemmaLoraError(f"{name}: holds no prompt. Give one a line.")
    return prompts


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    return ((number, line) for number, line in enumerate(raw.split(b"\n"), start=1) if line.strip())


def _array(raw: bytes, name: str) -> list[tuple[int, Any]] | None:
    """The elements of a file that is one JSON array, each with its line; None where each line is JSON of its own.

    Raises:
        GemmaLoraError: If it begins as an array and is not JSON.
    """
    lines = [line for _, line in _lines(raw)]
    if not lines or not lines[0].lstrip().startswith(b"["):
        return None
    if len(lines) > 1:
        try:
            json.loads(lines[0])
            return None  # a chat a line
        except (ValueError, RecursionError):
            pass
    try:
        rows = list(array_rows(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise GemmaLoraError(f"{name}:{line}: not UTF-8. Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise GemmaLoraError(f"{name}: not JSON ({error}). Mend it, or give one prompt a line.") from None
    turns = [value for _, value in rows]
    return [(rows[0][0], turns)] if _are_turns(turns) else rows


def _are_turns(value: Any) -> bool:
    """Whether a value is a chat as a list of its turns, and not a list of prompts."""
    return is_chat(value) and all({"role", "from"} & {str(name).lower() for name in turn} for turn in value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def _prompt(value: Any, name: str, number: int) -> Prompt:
    """A JSON value as a prompt."""
    if isinstance(value, str):
        return value
    if _are_turns(value):
        turns_before_answer(value)  # what is wrong with it is said now
        return value
    if not isinstance(value, Mapping):
        kind = "float" if isinstance(value, float) else type(value).__name__
        raise ValueError(f"text, a chat's turns or a JSON object is needed, this is {kind}")
    if "messages" in value and isinstance(value["messages"], list) and value["messages"]:
        last = value["messages"][-1]
        if isinstance(last, dict) and str(last.get("role")).lower() == "user":
            turns_before_answer(value["messages"])
            return value["messages"]
    if "prompt" in value and not {"response", "completion", "messages"} & set(value):
        if not isinstance(value["prompt"], str):
            raise ValueError(f"the field 'prompt' must be text, this is {type(value['prompt']).__name__}")
        if more := sorted(set(value) - {"prompt"}):
            raise ValueError(f"a prompt may not have the field {more[0]!r} beside it; it would not be used")
        return value["prompt"]
    return to_example(value, name, number)
