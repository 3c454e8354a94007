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


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_holds_what_lines_may(indent):
    values = ["one", {"prompt": "two"}, {"messages": CHAT}, CHAT, {"prompt": "three", "response": "r"}]
    one, two, chat, turns, three = read_prompts(json.dumps(values, indent=indent).encode(), "p.json", jsonl=True)
    assert (one, two, chat, turns) == ("one", "two", CHAT, CHAT) and isinstance(three, Example)


def test_an_array_of_turns_is_one_chat_and_a_chat_may_stand_in_each_line():
    assert read_prompts(json.dumps(CHAT, indent=1).encode(), "p.json", jsonl=True) == [CHAT]
    assert read_prompts(lines(CHAT, CHAT[:1]), "p.jsonl", jsonl=True) == [CHAT, CHAT[:1]]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'["a",\n 3.5]', "p.json:2: .*this is float"),
        (b'["a",\n {"prompt": "x", "system": "y"}]', "p.json:2: .*'system'"),
        (b'["a"\n "b"]', "p.json: not JSON"),
        (b'["a",\n "\xff"]', "p.json:2: not UTF-8"),
        (b"[]", "no prompt"),
    ],
)
def test_what_is_wrong_in_an_array_is_named(raw, said):
    with pytest.raises(GemmaLoraError, match=said):
        read_prompts(raw, "p.json", jsonl=True)


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
