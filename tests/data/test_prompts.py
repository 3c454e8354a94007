"""Prompts from files: every line is used, or named with what is wrong."""

import json

import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.formats import Example
from gemma_lora.data.prompts import read_prompts

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def lines(*values):
    return "\n".join(json.dumps(value) for value in values).encode()


def test_a_text_file_has_a_prompt_in_each_line():
    raw = "\ufeffone\r\n\n  two \nd\u2028e\n".encode()
    assert read_prompts(raw, "p.txt", jsonl=False) == ["one", "  two ", "d\u2028e"]


def test_json_lines_are_texts_prompts_chats_or_examples():
    raw = lines(
        "one", {"prompt": "two"}, {"messages": CHAT}, {"prompt": "three", "response": "r"}, {"messages": CHAT[:2]}
    )
    one, two, chat, three, asked = read_prompts(raw, "p.jsonl", jsonl=True)
    assert (one, two, chat) == ("one", "two", CHAT)
    assert isinstance(three, Example) and three.prompt == "three"
    assert isinstance(asked, Example) and asked.prompt == "a"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prompt": "x", "system": "y"}, "'system'"),
        ({"prompt": 3}, "text"),
        ({"messages": [CHAT[0], CHAT[2]]}, "alternate"),
        ({"question": "x"}, "'answer' is missing"),
        (3, "int"),
    ],
)
def test_what_would_not_be_used_is_named(value, said):
    with pytest.raises(GemmaLoraError, match=f"p.jsonl:2: .*{said}"):
        read_prompts(lines("good", value), "p.jsonl", jsonl=True)


@pytest.mark.parametrize(("raw", "said"), [(b"\n \n", "no prompt"), (b"a\n\xff\n", "p.txt:2: not UTF-8")])
def test_a_file_without_prompts_is_named(raw, said):
    with pytest.raises(GemmaLoraError, match=said):
        read_prompts(raw, "p.txt", jsonl=False)
