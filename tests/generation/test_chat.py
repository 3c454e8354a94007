"""A chat gives the answers that the whole chat would get, and reads each token once."""

import types

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.encoding import encode_prompt
from gemma_lora.data.templates import Template
from gemma_lora.generation import chat as chats
from gemma_lora.generation import decoding
from tests.conftest import CharacterTokenizer, tiny_gemma

TURNS = ("hi", "and?", "a longer turn, so that windows of six positions have long passed", "x")


def small(number=3):
    model = tiny_gemma(number)
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    return model


def whole(model, chat, **named):
    """What `generate` answers to everything before the chat's last turn."""
    return gl.generate(model, [chat.history[:-1]], **named)[0]


def adapted(model, scale=0.3):
    for number, layer in enumerate(lora.lora_layers(model)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, scale, layer.lora_b.shape))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("template", [Template.base(), Template.gemma_chat()], ids=["base", "chat"])
def test_answers_are_those_of_the_whole_chat_and_each_token_is_read_once(number, template):
    model = small(number)
    chat = gl.Chat(model, "Be brief.", template, max_new_tokens=21)
    tokenizer, seen = model.preprocessor.tokenizer, 0
    for turn in TURNS:
        answer = chat(turn)
        assert answer == whole(model, chat, template=template, max_new_tokens=21)
        prompt = encode_prompt(chat.history[:-1], tokenizer, template)
        assert chat.tokens_read <= len(prompt) - seen  # nothing of the prompt before
        seen = len(prompt)
    roles = [turn["role"] for turn in chat.history]
    assert roles == ["system", *["user", "assistant"] * len(TURNS)]
    assert [turn["content"] for turn in chat.history[1::2]] == list(TURNS)


@pytest.mark.slow
def test_only_new_tokens_are_read(monkeypatch):
    model, read = small(), []
    whole_read = decoding.Engine.read_on

    def counting(self, own, shared, tokens, start):
        read.append(tokens.shape[1] - start)
        return whole_read(self, own, shared, tokens, start)

    monkeypatch.setattr(decoding.Engine, "read_on", counting)
    chat = gl.Chat(model, max_new_tokens=9)
    before, answer, whole_answers = 0, "", 0
    for turn in TURNS:
        said, answer = answer, chat(turn)
        prompt = len(encode_prompt(chat.history[:-1], CharacterTokenizer(), Template.base()))
        assert chat.tokens_read == read[-1] + 1 <= prompt - before  # the last one is read by the program that answers
        if (
            len(said) == 9
        ):  # nothing was stripped: all its tokens but the newest, which was made and not read, are known
            assert chat.tokens_read == prompt - before - 9 + 1
            whole_answers += 1
        before = prompt
    assert whole_answers


@pytest.mark.slow
def test_few_shapes_are_compiled_and_the_cache_grows_in_steps(monkeypatch):
    monkeypatch.setattr(chats, "_GROWTH", 64)
    model, sizes = small(), []
    decode = decoding._decode_program

    def noted(*args, **named):
        sizes.append(named["own"][0].keys.shape[2])
        return decode(*args, **named)

    monkeypatch.setattr(decoding, "_decode_program", noted)
    chat, lengths = gl.Chat(model, max_new_tokens=9), []
    for turn in ("a" * 20, "b" * 20, "c", "d" * 20, "e" * 20):
        chat(turn)
        lengths.append(len(encode_prompt(chat.history[:-1], CharacterTokenizer(), Template.base())))
    assert 2 <= len(set(sizes)) < len(sizes)
    assert set(sizes) == {64 * -(-length // 64) + 16 for length in lengths}
    assert chat.history[-1]["content"] == whole(model, chat, max_new_tokens=9)  # what it had read has moved along


@pytest.mark.slow
def test_a_changed_model_is_noticed():
    model = small()
    chat = gl.Chat(model, max_new_tokens=9)
    chat("hi")
    lora.apply_lora(model, rank=2)
    adapted(model)
    assert chat("and?") == whole(model, chat, max_new_tokens=9)
    assert chat.tokens_read == len(encode_prompt(chat.history[:-1], CharacterTokenizer(), Template.base()))
    adapted(model, 0.8)  # another adapter
    assert chat("more") == whole(model, chat, max_new_tokens=9)
    lora.merge_lora(model)
    assert chat("x") == whole(model, chat, max_new_tokens=9)
    before = chat.tokens_read
    chat("y")
    assert chat.tokens_read < before  # nothing was changed


@pytest.mark.slow
def test_a_stream_is_the_answer_and_a_turn_given_up_does_not_count():
    model = small()
    chat, other = (gl.Chat(model, max_new_tokens=30) for _ in range(2))
    assert "".join(chat.stream("hi")) == other("hi")
    started = chat.stream("never mind")
    next(started)
    started.close()
    assert len(chat.history) == 2
    assert chat("and?") == other("and?")
    assert chat.history == other.history
    chat.reset()
    assert chat.history == [] and chat("hi") == other.history[1]["content"]


@pytest.mark.slow
def test_an_empty_answer_does_not_end_the_chat():
    model = small()
    stop = gl.generate(model, "hi", max_new_tokens=2)[0][0]
    chat = gl.Chat(model, "Be brief.", max_new_tokens=5, stop=[stop])
    model_answers = [chat("hi"), chat("and?")]
    assert all(stop not in answer for answer in model_answers) and len(chat.history) == 5
    chat._turns[1]["content"] = ""
    prompt = chat._encoded([*chat.history, {"role": "user", "content": "x"}])
    text = CharacterTokenizer().detokenize(prompt.tolist())
    assert text.startswith("<bos>Be brief.\n\nhi\n<eos>\nand?\n") and text.endswith("<eos>\nx\n")


def test_a_chat_that_is_too_long_says_what_to_do():
    chat = gl.Chat(small(), max_new_tokens=5, context_length=20)
    with pytest.raises(GemmaLoraError, match=r"reset\(\)"):
        chat("a turn of more than twenty tokens")
    assert chat.history == []


@pytest.mark.parametrize("named", [{"max_new_tokens": 0}, {"temperature": -1}, {"stop": [""]}])
def test_bad_arguments_are_named(named):
    with pytest.raises(ValueError, match=f"`{next(iter(named))}`"):
        gl.Chat(small(), **named)


def test_a_turn_is_text():
    with pytest.raises(ValueError, match="text"):
        gl.Chat(small())(["hi"])
