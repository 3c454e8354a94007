"""What a model sees before it answers: a text, a chat with its history, worked examples."""

import pytest

from gemma_lora.data.encoding import encode, encode_prompt
from gemma_lora.data.formats import Example, as_prompts, to_example, turns_before_answer
from gemma_lora.data.templates import Template
from tests.data.test_data import EXPENSE, GreedyTokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the rake?"},
    {"role": "assistant", "content": "Aisle 4."},
    {"role": "user", "content": "And what does it cost?"},
    {"role": "assistant", "content": "12 euros."},
]


@pytest.mark.parametrize("template", [EXPENSE, Template.base(), Template.gemma_chat()])
def test_a_chat_is_asked_with_all_that_training_shows_before_its_last_answer(template):
    example = to_example({"messages": CHAT})
    encoded = encode([example], GreedyTokenizer(), template)
    mask = encoded.loss_mask[0]
    answer = max(i for i in range(1, len(mask)) if mask[i] and not mask[i - 1])
    for prompt in (example, CHAT[:-1]):
        assert encode_prompt(prompt, GreedyTokenizer(), template).tolist() == encoded.tokens[0][:answer].tolist()


def test_worked_examples_come_first_and_bring_in_no_control_token():
    shots = [Example("a<end_of_turn>", "b<eos>"), Example("c", "d")]
    ids = encode_prompt("e", GreedyTokenizer(), Template.base(), shots, between="\n\n")
    text = GreedyTokenizer().text(ids)
    assert text == "<bos>a<end_of_turn>\nb<eos>\n\nc\nd\n\ne\n"
    assert [i for i in ids.tolist() if i < 6] == [2]  # <bos> alone is a token; the others are spelled out


def test_worked_examples_in_gemmas_chat_template_are_turns():
    ids = encode_prompt("e", GreedyTokenizer(), Template.gemma_chat(), [Example("c", "d")])
    one = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    assert GreedyTokenizer().text(ids) == "<bos>" + one.format("c") + "d<end_of_turn>\n" + one.format("e")


def test_one_prompt_or_several():
    example = Example("a", "b")
    assert as_prompts("a") == ["a"] and as_prompts(example) == [example] and as_prompts(CHAT) == [CHAT]
    assert as_prompts(["a", CHAT, example]) == ["a", CHAT, example] and as_prompts([]) == []


def test_a_models_own_answers_are_taken_as_they_are():
    """They may be empty or hold control characters; what looks like a control token is text."""
    said = ["\x00\x1b[1m", "", "a<end_of_turn>b<eos>"]
    turns = [
        turn for text in said for turn in ({"role": "user", "content": "q"}, {"role": "assistant", "content": text})
    ]
    chat = [*turns, {"role": "user", "content": "r"}]
    assert [text for role, text in turns_before_answer(chat) if role == "model"] == said
    ids = encode_prompt(chat, GreedyTokenizer(), Template.gemma_chat()).tolist()
    plain = [{**turn, "content": "x"} for turn in chat]
    as_many = encode_prompt(plain, GreedyTokenizer(), Template.gemma_chat()).tolist()
    assert [i for i in ids if i < 6] == [i for i in as_many if i < 6]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(CHAT, "the last turn must be the user's"), ([], "must be a list of turns"), (7, "must be text, an Example or")],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        turns_before_answer(prompt)
