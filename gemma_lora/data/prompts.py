"""Prompts without answers: a text file, one a line, or JSON Lines."""

from __future__ import annotations

import json
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.formats import BadLines, Prompt, to_example, turns_before_answer


def read_prompts(raw: bytes, name: str, jsonl: bool) -> list[Prompt]:
    """The prompts of a file's bytes, UTF-8, one a line; empty lines are passed over.

    Args:
        raw: The bytes.
        name: What messages call the file.
        jsonl: Whether a line is JSON: text, `{"prompt"}`, `{"messages"}` whose last turn is the user's, or any example
            with an answer, which is left out.

    Raises:
        GemmaLoraError: If a line is not UTF-8 or not as above, or there is none; it names file and line.

    Example:

    >>> read_prompts(b'first\\n\\nsecond\\n', "prompts.txt", jsonl=False)
    ['first', 'second']
    >>> read_prompts(b'{"prompt": "first"}', "prompts.jsonl", jsonl=True)
    ['first']
    """
    bad, prompts = BadLines(skip=False), []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").removesuffix("\r")
            prompts.append(_from_json(text, name, number) if jsonl else text)
        except UnicodeDecodeError as error:
            bad.add(name, number, f"not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            bad.add(name, number, str(error))
    if bad.messages:
        raise GemmaLoraError("\n".join(bad.messages[:10]))
    if not prompts:
        raise GemmaLoraError(f"{name}: holds no prompt. Give one a line.")
    return prompts


def _from_json(text: str, name: str, number: int) -> Prompt:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"text or a JSON object is needed, this is {type(value).__name__}")
    if "messages" in value and isinstance(value["messages"], list) and value["messages"]:
        last = value["messages"][-1]
        if isinstance(last, dict) and str(last.get("role")).lower() == "user":
            turns_before_answer(value["messages"])  # what is wrong with it is said now
            return value["messages"]
    if "prompt" in value and not {"response", "completion", "messages"} & set(value):
        if not isinstance(value["prompt"], str):
            raise ValueError(f"the field 'prompt' must be text, this is {type(value['prompt']).__name__}")
        if more := sorted(set(value) - {"prompt"}):
            raise ValueError(f"a prompt may not have the field {more[0]!r} beside it; it would not be used")
        return value["prompt"]
    return to_example(value, name, number)
