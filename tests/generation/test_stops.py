"""Where answers end, and their text as it grows."""

import random
import types

import numpy as np
import pytest

from gemma_lora.data.templates import Template
from gemma_lora.generation.engine import generate
from gemma_lora.generation.stops import Stops, streamed, text_of
from tests.conftest import CharacterTokenizer, tiny_gemma


class BytesAndWords:
    """Tokens 0 … 255 are bytes, as Gemma's byte tokens, then come control tokens and words; some overlap stops."""

    pieces = (
        "<eos>",
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<unk>",
        "\n",
        "\n\n",
        "Q",
        ":",
        "Q:",
        " ",
        "ab",
        "é",
    )

    def token_to_id(self, token):
        return 256 + self.pieces.index(token if token in self.pieces else "<unk>")

    def detokenize(self, ids):
        raw = b"".join(bytes([i]) if i < 256 else self.pieces[i - 256].encode() for i in ids)
        text, left = "", raw
        while left:  # as SentencePiece: one sign for each byte that is no character
            for size in range(1, 5):
                try:
                    text, left = text + left[:size].decode(), left[size:]
                    break
                except UnicodeDecodeError:
                    continue
            else:
                text, left = text + "\ufffd", left[1:]
        return text


TOKENIZER = BytesAndWords()
BASE = Template("{prompt}\n", "{response}<eos>")


def stops(*texts, template=BASE):
    return Stops.of(TOKENIZER, template, texts)


def ids(*pieces):
    return [i for piece in pieces for i in ([TOKENIZER.token_to_id(piece)] if isinstance(piece, str) else piece)]


@pytest.mark.parametrize(
    ("texts", "pieces", "answer"),
    [
        (("Q:",), ("ab", "\n", "Q", ":", "ab"), "ab"),  # a string of two tokens
        (("Q:",), ("ab", "Q:", "ab"), "ab"),  # and as one
        (("\n",), ("ab", "\n\n", "ab"), "ab"),  # inside a longer token
        (("ab\n", "\n"), ("é", "ab", "\n"), "éab"),  # both end at one place: the shorter
        (("ab\nQ", "\n"), ("é", "ab", "\n", "Q"), "éab"),  # what is complete first
        (("ü",), ("ab", list("ü".encode()), "é"), "ab"),  # written in bytes
        ((), ("ab", list("ü".encode())), "abü"),
    ],
)
def test_an_answer_ends_before_the_first_string(texts, pieces, answer):
    assert stops(*texts).answer(TOKENIZER, np.array(ids(*pieces))) == answer
    for size in (1, 2, 3):
        tokens = np.array(ids(*pieces), "int32")
        given = streamed((tokens[n : n + size] for n in range(0, len(tokens), size)), TOKENIZER, stops(*texts))
        assert "".join(given) == answer


def test_template_stops_are_control_tokens_or_strings():
    found = Stops.of(TOKENIZER, Template("{prompt}", "{response}", stop=("Q: ab", "<end_of_turn>", "\n")))
    assert found.texts == ("Q: ab", "\n")
    assert set(found.ids) == set(ids("<eos>", "<end_of_turn>", "\n"))  # never <unk>


def test_pieces_joined_are_the_answer_and_none_is_taken_back():
    """Random tokens, bytes among them, cut anywhere; strings that begin often and are seldom complete."""
    chance = random.Random(0)
    for _ in range(400):
        texts = chance.sample(["Q:ab", "\n\nQ", "é ", ": :", "ü", "\n \n", "abé"], chance.randint(0, 3))
        known = [i for i in range(256, 256 + len(TOKENIZER.pieces)) if i - 256 > 4]
        tokens = [
            chance.choice([*known, *"üéa".encode(), 0xF0, 0x9F, 0x8E, 0x89]) for _ in range(chance.randint(0, 30))
        ]
        ends = Stops.of(TOKENIZER, BASE, texts)
        answer = ends.answer(TOKENIZER, np.array(tokens, "int32"))
        size = chance.randint(1, 6)
        pieces = [np.array(tokens[n : n + size], "int32") for n in range(0, len(tokens), size)]
        given = list(streamed(iter(pieces), TOKENIZER, ends))
        assert "".join(given) == answer and all(given)
        whole = text_of(TOKENIZER, tokens)
        assert not any(text in answer for text in texts)
        if not any(text in whole for text in texts):
            assert answer == whole.strip()


def test_half_a_character_and_half_a_stop_wait():
    tokens = ids("ab", [0xC3], [0xBC], "Q", "ab", "Q", ":")
    pieces = (np.array([i], "int32") for i in tokens)
    assert list(streamed(pieces, TOKENIZER, stops("Q:"))) == ["ab", "ü", "Qab"]


def test_no_more_tokens_are_made_once_the_text_stops():
    taken = []

    def pieces():
        for piece in ("ab", "Q", ":", "ab", "ab"):
            taken.append(piece)
            yield np.array(ids(piece), "int32")

    assert "".join(streamed(pieces(), TOKENIZER, stops("Q:"))) == "ab"
    assert taken == ["ab", "Q", ":"]


# --- with a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    model = tiny_gemma(3)
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    return model


@pytest.mark.slow
def test_generate_stops_at_strings_of_several_tokens(small):
    prompts = ["ab", "a longer prompt", "c"]
    free = generate(small, prompts, max_new_tokens=40)
    stop = free[0][20:22]
    assert stop.strip() == stop and len(stop) == 2
    expected = [text.split(stop)[0].strip() for text in free]
    assert generate(small, prompts, max_new_tokens=40, stop=stop) == expected != free
    template = Template("{prompt}\n", "{response}<eos>", ("<eos>", stop))
    assert generate(small, prompts, template, 40) == expected
    assert "".join(generate(small, prompts[0], max_new_tokens=40, stop=[stop], stream=True)) == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("named", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_a_stream_is_the_answer(small, named):
    pieces = list(generate(small, "ab", max_new_tokens=37, stream=True, **named))
    assert len(pieces) > 5
    assert ["".join(pieces)] == generate(small, "ab", max_new_tokens=37, **named)


def test_a_stream_takes_one_prompt(small):
    with pytest.raises(ValueError, match="`stream`"):
        generate(small, ["a", "b"], stream=True)


def test_an_adapter_may_know_how_long_answers_are(small, monkeypatch):
    monkeypatch.setattr(small, "gemma_lora_max_new_tokens", 3, raising=False)
    (short,) = generate(small, "ab")
    assert short == generate(small, "ab", max_new_tokens=3)[0]
