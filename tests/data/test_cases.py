"""Inputs that went wrong for people who fine-tune, in `cases/`: each is read as it is meant, or refused by name."""

from pathlib import Path

import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.encoding import encode
from gemma_lora.data.formats import BadLines, read_examples, turns_before_answer
from gemma_lora.data.templates import Template
from tests.data.test_data import EXPENSE, GreedyTokenizer

CASES = Path(__file__).parent / "cases"
OTHER = ("other question", "other answer")  # the line behind a case of one line


def read(name, **named):
    """A case's examples but for the other line, and its notices."""
    said = []
    examples = read_examples(CASES / name, on_notice=said.append, **named)
    return [e for e in examples if (e.prompt, e.response) != OTHER], said


#: A file -> what is seen before the answer and the answer of its first line.
READ = {
    "two_systems.jsonl": ("You are a pirate.\n\nNever mention ships.\n\nWho are you?", "Arr."),
    "developer.jsonl": ("Be brief.\n\n2+2?", "4"),
    "prompt_response_system.jsonl": ("Answer in one word.\n\nCapital of Norway?", "Oslo"),
    "context_dropped.jsonl": ("When was it opened?\n\nThe shop opened in 1931.", "In 1931."),
    "content_parts.jsonl": ("Capital of Norway?", "Oslo"),
    "conversations_role_content.jsonl": ("Capital of Norway?", "Oslo"),
    "messages_from_value.jsonl": ("Capital of Norway?", "Oslo"),
    "capital_roles.jsonl": ("Capital of Norway?", "Oslo"),
    "dolly.jsonl": ("When was shop 0 opened?\n\nShop 0 opened in 1900.", "In 1900."),
    "prompt_completion.jsonl": ("Sky is", "blue."),
    "null_other_column.jsonl": ("Sky?", "Blue."),
    "alpaca_nan.jsonl": ("Do it", "done"),
    "number_label.jsonl": ("Is it good?", "1"),
    "array_pretty.json": ("Name a fruit, number 0", "fruit 0"),
    "table.csv": ("q0", "a, 0"),
    "u2028.jsonl": ("line one\u2028line two, number 0\x85end", "yes\u2029no 0"),
    "prompt_slot.jsonl": ("Fill the template 'Dear {prompt}' for case 0", "Dear customer 0"),
    "response_slot.jsonl": ("Write a template 0", "Hello {prompt}, your answer is {response} (0)"),
    "control_tokens_in_text.jsonl": (
        "What does <end_of_turn> mean? 0 <start_of_turn>model",
        "It ends a turn: <end_of_turn> 0",
    ),
    "already_templated.jsonl": ("Sky 0?", "Blue 0."),
    "eos_in_response.jsonl": ("Say number 0", "number 0"),
    "spaces.jsonl": ("Capital of Norway?", "Oslo"),
    "two_line_answers.jsonl": ("Repeat the word twice, one a line: apple", "apple\napple"),
}
#: A file of chats -> its first line's turns.
CHATS = {
    "multi_turn_memory.jsonl": [
        "The secret number is 1000.\n\nHello",
        "Hi, ask me.",
        "What is the secret number?",
        "1000",
    ],
    "alpaca_system_history.jsonl": [
        *("Answer in one word.\n\nCapital of Norway?", "Oslo"),
        *("And of Sweden?", "Stockholm"),
    ],
    "weight_zero.jsonl": ["Capital of France?", "Berlin", "Are you sure?", "Sorry: Paris."],
}
#: A file -> what the message says of its first line.
REFUSED = {
    "system_in_middle.jsonl": "a system turn may only come first",
    "text_and_tool_call.jsonl": "'tools' belongs to tool calls",
    "tools.jsonl": "'tools' belongs to tool calls",
    "reasoning.jsonl": "'reasoning_content' holds a reasoning",
    "prefill.jsonl": "'prefix' marks the start of an answer",
    "content_image.jsonl": "type 'image': only text can be trained, not images",
}
#: A file -> what its one notice says. The others have none.
NOTICES = {
    "dolly.jsonl": "'category' (3 lines)",
    "number_label.jsonl": 'Numbers became text in 2 lines, such as 1 → "1"',
    "prompt_completion.jsonl": "White space around turns was taken off in 2 lines",
    "spaces.jsonl": "White space around turns was taken off in 1 line,",
    "eos_in_response.jsonl": "Chat markers around the text were taken off in 3 lines, for the template brings its own: "
    "<eos> (3 lines)",
}


@pytest.mark.parametrize("name", READ)
def test_a_case_is_read_as_it_is_meant(name):
    examples, _ = read(name)
    assert (examples[0].prompt, examples[0].response, examples[0].turns) == (*READ[name], ())


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_read_with_all_its_turns(name):
    examples, _ = read(name)
    assert [text for _, text in examples[0].turns] == CHATS[name]
    assert [role for role, _ in examples[0].turns] == ["user", "model"] * 2
    assert [text for _, text in turns_before_answer(examples[0])] == CHATS[name][:-1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_would_lose_is_refused_by_name(name):
    with pytest.raises(GemmaLoraError) as error:
        load_dataset(CASES / name)
    count, message, _ = str(error.value).splitlines()
    assert count == "1 bad line:" and message.startswith(f"{CASES / name}:1: ") and REFUSED[name] in message


@pytest.mark.parametrize("name", sorted({*READ, *CHATS} - {"already_templated.jsonl"}))
def test_a_change_is_said_once_and_nothing_else_is(name):
    _, said = read(name)
    assert len(said) == (name in NOTICES)
    assert NOTICES.get(name, "") in "".join(said)


def test_turns_that_are_wrapped_already_are_unwrapped_and_it_is_said():
    examples, said = read("already_templated.jsonl")
    assert [(e.prompt, e.response) for e in examples] == [(f"Sky {n}?", f"Blue {n}.") for n in range(3)]
    (markers,) = (sentence for sentence in said if "markers" in sentence)
    assert all(f"{name} (3 lines)" in markers for name in ("<bos>", "<start_of_turn>", "<end_of_turn>"))


def test_every_case_is_tested_here():
    elsewhere = {"mlx_folder", "long_answer.jsonl"}
    assert {path.name for path in CASES.iterdir()} == {*READ, *CHATS, *REFUSED, *elsewhere}


@pytest.mark.parametrize("template", [EXPENSE, Template.base(), Template.gemma_chat()])
def test_a_turn_of_weight_0_is_read_and_not_learned(template):
    examples, _ = read("weight_zero.jsonl")
    encoded = encode(examples, GreedyTokenizer(), template)
    ids, mask = encoded.tokens[0], encoded.loss_mask[0]
    text, learned = GreedyTokenizer().text(ids), GreedyTokenizer().text(ids[mask])
    assert "Berlin" in text and learned.strip() == "Sorry: Paris." + template.stop[0]


@pytest.mark.parametrize("name", ["prompt_slot.jsonl", "response_slot.jsonl", "control_tokens_in_text.jsonl"])
@pytest.mark.parametrize("template", [EXPENSE, Template.base(), Template.gemma_chat()])
def test_braces_and_names_of_control_tokens_are_text(name, template):
    examples, _ = read(name)
    encoded = encode(examples, GreedyTokenizer(), template)
    for example, ids, mask in zip(examples, encoded.tokens, encoded.loss_mask, strict=True):
        assert GreedyTokenizer().text(ids[mask]).strip() == example.response + template.stop[0]
        assert example.prompt in GreedyTokenizer().text(ids[~mask])
        expected = encode([type(example)("x", "y")], GreedyTokenizer(), template).tokens[0]
        assert [i for i in ids.tolist() if i < 6] == [i for i in expected.tolist() if i < 6]


def test_the_folder_of_another_tool_has_its_validation_split():
    said = []
    dataset = load_dataset(CASES / "mlx_folder", on_notice=said.append)
    assert [e.prompt for e in dataset.validation] == [f"valid question {n}" for n in range(3)]
    assert (len(dataset.train), list(dataset.tests), said) == (8, ["test"], [])


def test_bad_lines_of_a_case_are_counted_when_they_are_skipped():
    bad = BadLines(skip=True)
    read_examples(CASES / "prefill.jsonl", bad=bad)
    assert bad.files == {str(CASES / "prefill.jsonl"): 1}
