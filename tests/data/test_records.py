"""The rule of data: a field that means something is used or refused by name, any other is named in a notice."""

import itertools
import json
import math
import random

import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.encoding import encode, encode_prompt
from gemma_lora.data.formats import read_examples, to_example, turns_before_answer
from gemma_lora.data.notices import Notices
from gemma_lora.data.templates import Template
from tests.data.test_data import GreedyTokenizer

USER, MODEL = {"role": "user", "content": "u"}, {"role": "assistant", "content": "m"}
#: Records that are complete: one of each form.
FORMS = {
    "prompt": {"prompt": "p", "response": "r"},
    "completion": {"prompt": "p", "completion": "r"},
    "alpaca": {"instruction": "p", "output": "r"},
    "dolly": {"instruction": "p", "response": "r"},
    "question": {"question": "p", "answer": "r"},
    "input": {"input": "p", "output": "r"},
    "messages": {"messages": [USER, MODEL]},
    "conversations": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "m"}]},
    "pair of chats": {"prompt": [USER], "completion": [MODEL]},
}
#: Names of fields from public tools and data sets, and values in which a loss would matter.
NAMES = """
    system system_prompt system_message history context input instruction prompt question query response output
    completion answer messages conversations text label id source category metadata score name title weight
    train loss tools functions function_call tool_calls tool_choice reasoning_content reasoning thinking thought
    prefix prefill suffix images image audio videos documents chosen rejected train_detail loss_mask
    chat_template refusal Context SYSTEM Tools Unknown
""".split()
VALUES = [
    "MARK",
    7.5,
    True,
    False,
    0,
    ["MARK"],
    [["MARK", "ALSO"]],
    {"a": "MARK"},
    [{"role": "user", "content": "MARK"}],
]


def read(record):
    """An example's texts as one, and what was said of the record; or the error."""
    notices = Notices()
    try:
        example = to_example(record, "f", 1, notices)
    except ValueError as error:
        return None, str(error)
    turns = example.turns or (("user", example.prompt), ("model", example.response))
    return "\n".join(text for _, text in turns), " ".join(notices.sentences())


@pytest.mark.parametrize("form", FORMS)
def test_every_field_is_used_or_refused_or_named(form):
    without, _ = read(FORMS[form])
    for name, value in itertools.product(NAMES, VALUES):
        if name.lower() in FORMS[form]:
            continue
        whole, said = read(FORMS[form] | {name: value})
        named = repr(name) in said or repr(name.lower()) in said
        used = whole is not None and whole != without and ("MARK" in whole or "7.5" in whole or "0" in whole)
        harmless = value is False or (name == "train" and value is True)
        assert named or used or harmless, (name, value, whole, said)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [None, math.nan])
def test_an_absent_field_is_no_field(form, value):
    for name in NAMES:
        if name.lower() not in FORMS[form]:
            assert read(FORMS[form] | {name: value}) == read(FORMS[form])


@pytest.mark.parametrize("name", ["tools", "history", "system", "input", "context", "images", "thinking", "prefix"])
@pytest.mark.parametrize("value", ["", [], {}])
def test_an_empty_field_says_nothing(name, value):
    if name in ("system", "input", "context") and value != "":
        return  # those must be text
    assert read(FORMS["alpaca"] | {name: value}) == read(FORMS["alpaca"])


@pytest.mark.parametrize("field", sorted(set(NAMES) - {"system", "train", "loss", "weight", "Unknown", "text"}))
def test_a_turns_field_is_refused_or_named(field):
    whole, said = read({"messages": [USER, MODEL | {field: "MARK"}]})
    assert repr(field) in said or repr(field.lower()) in said
    assert whole in (None, "u\nm")


TURN_MARKS = [("weight", 0, 1), ("train", False, True), ("loss", False, True), ("weight", 0.0, 1.0)]


@pytest.mark.parametrize(("name", "no", "yes"), TURN_MARKS)
def test_marks_of_what_is_learned(name, no, yes):
    chat = [USER, MODEL | {name: no}, USER, MODEL | {name: yes}]
    example = to_example({"messages": chat})
    assert example.learn == (False, False, False, True) and len(example.turns) == 4
    assert to_example({"messages": [USER, MODEL | {name: yes}]}).learn == ()
    with pytest.raises(ValueError, match="every answer has weight 0"):
        to_example({"messages": [USER, MODEL | {name: no}, USER, MODEL | {name: no}]})
    with pytest.raises(ValueError, match=f"{name!r} 1; only the model's turns are learned"):
        to_example({"messages": [USER | {name: yes}, MODEL]})
    assert to_example({"messages": [USER | {name: no}, MODEL]}) == to_example({"messages": [USER, MODEL]})


def test_marks_that_are_no_marks():
    for value in (0.5, 2, "0", "no", [0]):
        with pytest.raises(ValueError, match="'weight' must be 0 or 1"):
            to_example({"messages": [USER, MODEL | {"weight": value}]})
    with pytest.raises(ValueError, match="'weight' and 'train' contradict"):
        to_example({"messages": [USER, MODEL | {"weight": 0, "train": True}]})


def test_what_follows_the_last_turn_to_learn_is_left_out_and_it_is_said():
    notices = Notices()
    chat = [USER, MODEL, USER | {"content": "v"}, MODEL | {"content": "n", "weight": 0}]
    example = to_example({"messages": chat}, "f", 1, notices)
    assert (example.prompt, example.response, example.turns, example.learn) == ("u", "m", (), ())
    assert "left out in 1 line" in notices.sentences()[0]


def test_another_mark_makes_another_dataset_and_none_changes_nothing():
    def digest(*weights):
        chats = [[USER, MODEL | {"weight": w}, USER, MODEL] for w in weights]
        return load_dataset([{"messages": chat} for chat in chats], on_notice=lambda notice: None).digest

    assert digest(1, 1) != digest(0, 1) != digest(0, 0)
    plain = [{"messages": [USER, MODEL, USER, MODEL]}] * 2
    assert digest(1, 1) == load_dataset(plain, on_notice=lambda notice: None).digest


REFUSED = {
    "both prompts": ({"prompt": "a", "instruction": "b", "output": "c"}, "both 'prompt' and 'instruction'"),
    "both answers": ({"prompt": "a", "response": "b", "output": "c"}, "both 'response' and 'output'"),
    "two chats": ({"messages": [USER, MODEL], "conversations": [USER, MODEL]}, "both 'messages' and 'conversations'"),
    "a chat and a prompt": ({"messages": [USER, MODEL], "prompt": "x"}, "both 'messages' and 'prompt'"),
    "a chat and context": ({"messages": [USER, MODEL], "context": "x"}, "both 'messages' and 'context'"),
    "text alone": ({"text": "x"}, "'text' is not said to be prompt or answer"),
    "text and label": ({"text": "x", "label": 1}, "'text' is not said to be prompt or answer"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' is one of a pair"),
    "wanted or not": ({"prompt": "a", "completion": "b", "label": True}, "'label' says whether"),
    "weight of a line": ({"prompt": "a", "response": "b", "weight": 0.5}, "'weight' weighs the whole line"),
    "squad": ({"question": "a", "answers": {"text": ["b"]}}, "'answer' is missing; fields are 'question', 'answers'"),
    "null answer": ({"prompt": "a", "response": None}, "'response' is missing (null)"),
    "truth": ({"prompt": "a", "response": True}, "must be text, this is true"),
    "infinity": ({"prompt": "a", "response": math.inf}, "must be text, this is inf"),
    "history": ({"prompt": "a", "response": "b", "history": "c"}, "[user, model] pairs"),
    "history of threes": ({"prompt": "a", "response": "b", "history": [["c", "d", "e"]]}, "[user, model] pairs"),
    "tool role": ({"messages": [USER, {"role": "tool", "content": "x"}]}, "'tool' belongs to tool calls"),
    "observation": ({"conversations": [{"from": "observation", "value": "x"}]}, "'observation' belongs to tool calls"),
    "tool use": ({"messages": [USER, MODEL | {"content": [{"type": "tool_use"}]}]}, "tool calls cannot be trained"),
    "thinking": ({"messages": [USER, MODEL | {"content": [{"type": "thinking"}]}]}, "a reasoning has no place"),
    "name": ({"messages": [USER | {"name": "Bo"}, MODEL]}, "'name' names a speaker"),
    "two keys": ({"messages": [USER | {"from": "human"}, MODEL]}, "both 'role' and 'from'"),
    "control": ({"prompt": "a\x00", "response": "b"}, "control character U+0000"),
    "escape": ({"prompt": "a", "response": "\x1b[1mb"}, "control character U+001B"),
    "c1": ({"prompt": "a\x93", "response": "b"}, "control character U+0093"),
    "half in a turn": ({"messages": [USER | {"content": "\ud800"}, MODEL]}, "half a character"),
    "half in a name": ({"prompt": "a", "response": "b", "\udc00": 1}, "half a character"),
    "control in a name": ({"prompt": "a", "response": "b", "a\x07": 1}, "control character U+0007"),
    "name twice": ({"prompt": "a", "response": "b", "Prompt": "c"}, "'prompt' stands there twice"),
    "foreign": ({"prompt": "<|im_start|>user\nhi<|im_end|>", "response": "b"}, "another model's chat markers"),
    "inst": ({"prompt": "<s>[INST] hi [/INST]", "response": "b"}, "another model's chat markers"),
    "several turns": (
        {"prompt": "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n", "response": "b"},
        "several turns",
    ),
    "system late": ({"messages": [USER, MODEL, {"role": "developer", "content": "x"}]}, "may only come first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    record, what = REFUSED[name]
    with pytest.raises(ValueError) as error:
        to_example(record)
    assert what in str(error.value)
    str(error.value).encode()  # and can be printed


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"question": "a", "context": "c", "answer": "b"}, ["a\n\nc", "b"]),
        ({"input": "a", "output": "b"}, ["a", "b"]),
        ({"prompt": "a", "input": "i", "response": "b"}, ["a\n\ni", "b"]),
        ({"Prompt": "a", " RESPONSE ": "b"}, ["a", "b"]),
        ({"messages": [USER, MODEL], "system": "s"}, ["s\n\nu", "m"]),
        ({"messages": [{"role": "system", "content": "s"}, USER, MODEL], "system": "s"}, ["s\n\nu", "m"]),
        ({"messages": [{"role": "system", "content": ""}, USER, MODEL]}, ["u", "m"]),
        ({"messages": [USER, MODEL], "prompt": " u"}, ["u", "m"]),  # what is said already
        ({"prompt": "a", "response": "b", "history": []}, ["a", "b"]),
        ({"prompt": "a", "response": "b", "history": [USER, MODEL]}, ["u", "m", "a", "b"]),
        ({"prompt": "a", "response": "b", "history": '[["u", "m"]]'}, ["u", "m", "a", "b"]),
        (
            {"prompt": "a", "response": "b", "history": [{"role": "system", "content": "s"}, USER, MODEL]},
            ["s\n\nu", "m", "a", "b"],
        ),
        ({"prompt": [USER, MODEL, USER], "completion": [MODEL]}, ["u", "m", "u", "m"]),
        ({"messages": [USER | {"content": ["a", {"text": "b"}]}, MODEL]}, ["a\nb", "m"]),
        ({"messages": [USER | {"content": [{"type": "text", "text": "a "}, "b"]}, MODEL]}, ["a b", "m"]),
        ({"prompt": 3, "response": 1.5}, ["3", "1.5"]),
        ({"prompt": "a\x85b\u2028c\td\fe", "response": "b"}, ["a\x85b\u2028c\td\fe", "b"]),
        ({"prompt": "a", "response": "<s>old</s>"}, ["a", "<s>old</s>"]),
        ({"prompt": "a", "response": "b</s> <eos>"}, ["a", "b"]),
        ({"prompt": "a</s>", "response": "b</s>"}, ["a", "b"]),
        ({"prompt": "What is </s>", "response": "An end."}, ["What is </s>", "An end."]),
        (
            {"prompt": "Which token ends a turn?", "response": "<end_of_turn>"},
            ["Which token ends a turn?", "<end_of_turn>"],
        ),
        ({"prompt": "<bos>a", "response": "<start_of_turn>model\nb<end_of_turn>"}, ["a", "b"]),
        ({"prompt": "<bos> is what?", "response": "b"}, ["<bos> is what?", "b"]),
        ({"prompt": "Explain [INST].", "response": "b"}, ["Explain [INST].", "b"]),
    ],
)
def test_what_is_read(record, turns):
    example = to_example(record)
    assert [text for _, text in example.turns or (("", example.prompt), ("", example.response))] == turns


def test_of_a_pair_of_chats_the_answers_turns_are_learned():
    assert to_example({"prompt": [USER, MODEL, USER], "completion": [MODEL]}).learn == (False, False, False, True)


def test_a_number_stays_as_it_was_written(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "a", "response": 1.50}\n{"prompt": "b", "response": 1e2}\n{"prompt": "c", "response": NaN}'
    )
    said = []
    with pytest.raises(GemmaLoraError, match=r"a.jsonl:3: the field 'response' is missing \(null\)"):
        read_examples(path)
    examples = read_examples(path, skip_bad_lines=True, on_notice=said.append)
    assert [e.response for e in examples] == ["1.50", "1e2"] and "such as 1.50 → " in said[0]


def test_a_name_that_stands_twice_in_a_line_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "response": "c"}\n')
    with pytest.raises(GemmaLoraError, match="a.jsonl:1: the field 'response' stands there twice"):
        read_examples(path)


def test_values_as_numpy_has_them():
    import numpy as np

    chat = np.array([USER, MODEL], dtype=object)
    assert to_example({"messages": chat}).prompt == "u"
    record = {"prompt": "a", "response": np.int64(3), "input": np.float64("nan"), "context": np.float32("nan")}
    assert (to_example(record).prompt, to_example(record).response) == ("a", "3")


def test_notices_count_and_list():
    notices = Notices()
    for number in range(20):
        notices.add_line(f"f:{number}", [("unused", f"'{number}'"), ("unused", "'id'"), ("unused", "'id'")])
    notices.say("Once.")
    notices.say("Once.")
    unused, once = notices.sentences()
    assert "'id' (20 lines)" in unused and "'0' (1 line)" in unused and "and 9 more" in unused and once == "Once."


# --- Gemma's own wording -----------------------------------------------------------------------------------

#: What google/gemma-3's chat_template does with text, written anew in Jinja: the system text and a blank line before
#: the first user's, `trim` on every turn, "model" for the assistant.
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
    "{{ first if loop.first else '' }}{{ turn.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{{ '<start_of_turn>model\n' if ask else '' }}"
)


@pytest.mark.parametrize("seed", range(30))
def test_the_wording_is_gemmas_own(seed):
    jinja2 = pytest.importorskip("jinja2")
    rng = random.Random(seed)

    def text():
        word = "".join(rng.choices("ab {}é\n\t", k=5)) + "x" + rng.choice(["", " ", "\n", "\u2028", "  \t"])
        return rng.choice(["", " ", "\n"]) + word

    chat = [{"role": "system", "content": text()}] * rng.randrange(2)
    for _ in range(rng.randrange(1, 4)):
        chat += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    template = jinja2.Environment(keep_trailing_newline=True).from_string(GEMMA)
    example = to_example({"messages": chat})
    ids = encode([example], GreedyTokenizer(), Template.gemma_chat()).tokens[0]
    assert GreedyTokenizer().text(ids) + "\n" == template.render(messages=chat, ask=False)
    asked = template.render(messages=chat[:-1], ask=True)
    for prompt in (example, chat[:-1]):
        assert GreedyTokenizer().text(encode_prompt(prompt, GreedyTokenizer(), Template.gemma_chat())) == asked


def test_a_prompt_is_asked_as_it_was_trained():
    example = to_example({"prompt": " a \n", "response": "b"})
    assert turns_before_answer(" a \n") == turns_before_answer(example) == (("user", "a"),)
    assert turns_before_answer([{"from": "Human", "value": " a "}]) == (("user", "a"),)


def test_records_of_random_junk_never_raise_anything_else():
    rng = random.Random(0)
    names = [*NAMES, "role", "content", "from", "value", "a\ud800", ""]

    def junk(depth=0):
        kind = rng.randrange(8 if depth < 3 else 6)
        if kind == 6:
            return [junk(depth + 1) for _ in range(rng.randrange(3))]
        if kind == 7:
            return {rng.choice(names): junk(depth + 1) for _ in range(rng.randrange(4))}
        return [None, True, 3, math.nan, "<start_of_turn>user\nx", rng.choice(["user", "gpt", "x\x00"])][kind]

    for _ in range(4000):
        record = {rng.choice(names): junk() for _ in range(rng.randrange(1, 5))}
        if rng.random() < 0.5:
            record |= json.loads(json.dumps(rng.choice(list(FORMS.values()))))
        try:
            to_example(record, "f", 1, Notices())
        except ValueError as error:
            str(error).encode()
