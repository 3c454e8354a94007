"""Reading, splitting, encoding: every form and every kind of bad line, and a mask on the answer alone."""

import json
import re
import types

import numpy as np
import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import batches, encode, encode_prompt, load_dataset, read_jsonl, show_mask
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template, default_template, template_of, template_reason

NAMES = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
EXPENSE = Template("Expense: {prompt}\nJSON:", " {response}<eos>")


class GreedyTokenizer:
    """A character a token, but a control token's name in a text becomes that token: the dangerous kind."""

    def tokenize(self, text):
        pieces = re.findall("|".join(NAMES) + "|(?s:.)", text)
        return [self.token_to_id(piece) for piece in pieces]

    def token_to_id(self, token):
        return NAMES.index(token) if token in NAMES else ord(token) + 1000

    def id_to_token(self, i):
        return NAMES[i] if i < len(NAMES) else chr(i - 1000)

    def text(self, ids):
        return "".join(self.id_to_token(int(i)) for i in ids)


class ListTokenizer(GreedyTokenizer):
    """As KerasHub's: takes a text or a list of texts."""

    calls = 0

    def tokenize(self, text):
        self.calls += 1
        if isinstance(text, str):
            return np.array(super().tokenize(text), "int32")
        return [super(ListTokenizer, self).tokenize(one) for one in text]


@pytest.fixture(params=[GreedyTokenizer, ListTokenizer])
def tokenizer(request):
    return request.param()


def write(path, *lines, end=b"\n"):
    def raw(line):
        return line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()

    path.write_bytes(end.join(map(raw, lines)) + end)
    return path


def pair(number):
    return {"prompt": f"question {number}", "response": f"answer {number}"}


CHAT = [("user", "a"), ("model", "b"), ("user", "c"), ("model", "d")]


# --- forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"prompts": "p", "responses": "r"}, "p", "r"),
        ({"prompt": "p", "response": "r", "id": 7}, "p", "r"),
        ({"instruction": "do", "output": "r"}, "do", "r"),
        ({"instruction": "do", "input": "", "output": "r"}, "do", "r"),
        ({"instruction": "do", "input": "this", "output": "r"}, "do\n\nthis", "r"),
        ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]}, "p", "r"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}, "p", "r"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "model", "content": "r"}]}, "p", "r"),
        (
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "r"},
                ]
            },
            "be brief\n\np",
            "r",
        ),
    ],
)
def test_forms(tmp_path, record, prompt, response):
    (example,) = read_jsonl(write(tmp_path / "a.jsonl", record))
    assert (example.prompt, example.response, example.turns) == (prompt, response, ())
    assert (example.file, example.line) == (str(tmp_path / "a.jsonl"), 1)


def test_a_longer_chat_keeps_its_turns(tmp_path):
    names = {"user": "human", "model": "gpt"}
    turns = [{"from": names[role], "value": text} for role, text in CHAT]
    record = {"conversations": [{"from": "system", "value": "s"}, *turns]}
    (example,) = read_jsonl(write(tmp_path / "a.jsonl", record))
    assert example.turns == (("user", "s\n\na"), *CHAT[1:])
    assert example.response == "d"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_line_ends_and_blank_lines(tmp_path, end):
    first = b"\xef\xbb\xbf" + json.dumps(pair(1)).encode()
    path = write(tmp_path / "a.jsonl", first, b"", b"   ", {"prompt": "é\u2028x", "response": "ö"}, end=end)
    examples = read_jsonl(path)
    assert [e.line for e in examples] == [1, 4]
    assert [e.prompt for e in examples] == ["question 1", "é\u2028x"]


# --- bad lines ---------------------------------------------------------------------------------------------

USER, MODEL = {"role": "user", "content": "u"}, {"role": "assistant", "content": "m"}
BAD = {
    "not json": (b'{"prompt": "a", ', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "not an object": (["a", "b"], "object"),
    "missing response": ({"prompt": "a"}, "'response' is missing"),
    "missing prompt": ({"response": "a"}, "'prompt' is missing"),
    "missing instruction": ({"output": "a"}, "'instruction' is missing"),
    "empty answer": ({"prompt": "a", "response": ""}, "answer is empty"),
    "blank answer": ({"prompt": "a", "response": " \n"}, "answer is empty"),
    "wrong type": ({"prompt": ["b"], "response": "a"}, "'prompt' must be text"),
    "answer of wrong type": ({"prompt": "a", "response": {"b": 1}}, "'response' must be text"),
    "bad utf-8": (b'{"prompt": "caf\xe9", "response": "a"}', "UTF-8"),
    "half a character": (b'{"prompt": "\\ud83d", "response": "a"}', "half a character"),
    "unknown form": ({"frage": "a", "antwort": "b"}, "'frage'"),
    "no turns": ({"messages": []}, "list of turns"),
    "turns of wrong type": ({"messages": "hello"}, "list of turns"),
    "turn of wrong type": ({"messages": ["hello"]}, "must be an object"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    "no alternation": ({"messages": [USER, USER, MODEL]}, "alternate"),
    "model first": ({"messages": [MODEL, USER, MODEL]}, "alternate"),
    "ends with the user": ({"messages": [USER, MODEL, USER]}, "last turn"),
    "empty turn of the model": ({"messages": [USER, {**MODEL, "content": ""}, USER, MODEL]}, "empty"),
    "content missing": ({"messages": [{"role": "user"}, MODEL]}, "'content' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_or_counted(tmp_path, name):
    line, what = BAD[name]
    path = write(tmp_path / "a.jsonl", pair(1), line, pair(2), b"", line, pair(3))
    with pytest.raises(GemmaLoraError) as error:
        load_dataset(path)
    first, *rest = str(error.value).splitlines()
    assert first.startswith("2 bad lines")
    for number, message in zip((2, 5), rest, strict=False):
        assert message.startswith(f"{path}:{number}: ") and what in message
    assert "--skip-bad-lines" in rest[-1] and "skip_bad_lines=True" in rest[-1]
    dataset = load_dataset(path, skip_bad_lines=True)
    assert dataset.skipped == {str(path): 2}
    assert f"2 in {path}" in dataset.skipped_summary
    prompts = sorted(e.prompt for e in dataset.train + dataset.validation)
    assert prompts == ["question 1", "question 2", "question 3"]


def test_ten_bad_lines_are_listed_and_the_rest_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", pair(1), *[b"?"] * 14)
    with pytest.raises(GemmaLoraError) as error:
        read_jsonl(path)
    assert str(error.value).count(f"{path}:") == 10 and "4 more" in str(error.value)


def test_bad_lines_of_every_split_are_reported_at_once(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.jsonl", pair(1), b"?")
    with pytest.raises(GemmaLoraError) as error:
        load_dataset(tmp_path)
    assert all(f"{name}.jsonl:2: not JSON" in str(error.value) for name in ("train", "validation", "test"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(GemmaLoraError, match="a.jsonl: holds no usable example"):
        load_dataset(tmp_path / "a.jsonl")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(GemmaLoraError, match="nowhere.*Give a JSONL file"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(GemmaLoraError, match="train.jsonl"):
        load_dataset(tmp_path)
    with pytest.raises(GemmaLoraError, match="'train'.*test"):
        load_dataset({"test": [pair(1)]})
    with pytest.raises(GemmaLoraError, match="int"):
        load_dataset(3)
    with pytest.raises(GemmaLoraError, match="0 usable training"):
        load_dataset(write(tmp_path / "a.jsonl", {"a": 1}, {"a": 2}), skip_bad_lines=True)
    with pytest.raises(GemmaLoraError, match="1 usable training and 0 validation"):
        load_dataset([pair(1)])
    with pytest.raises(ValueError, match="validation_fraction"):
        load_dataset([pair(1), pair(2)], validation_fraction=1.5)


# --- datasets ----------------------------------------------------------------------------------------------


def test_a_folder_with_splits_and_template(tmp_path):
    for name in ("train", "validation", "test", "test_unseen"):
        write(tmp_path / f"{name}.jsonl", pair(name), pair(2))
    (tmp_path / "template.json").write_text(json.dumps(EXPENSE.to_dict()))
    dataset = load_dataset(tmp_path)
    assert dataset.name == tmp_path.name and dataset.template == EXPENSE
    assert list(dataset.tests) == ["test", "test_unseen"]
    assert dataset.validation[0].prompt == "question validation" and len(dataset.train) == 2
    assert dataset.skipped == {} and dataset.skipped_summary == ""
    assert load_dataset(tmp_path, template=Template.gemma_chat()).template == Template.gemma_chat()
    (tmp_path / "template.json").write_text("{}")
    with pytest.raises(GemmaLoraError, match="template.json"):
        load_dataset(tmp_path)


def test_without_a_template_it_is_the_models(tmp_path):
    write(tmp_path / "train.jsonl", pair(1), pair(2), pair(3))
    plain = load_dataset(tmp_path)
    assert plain.template is None and load_dataset([pair(1), pair(2)]).template is None
    named = load_dataset(tmp_path, template=Template.gemma_chat())
    assert len({plain.digest, named.digest, load_dataset(tmp_path, template=EXPENSE).digest}) == 3
    assert plain.digest == load_dataset(tmp_path).digest


class Rows:
    """What `datasets.Dataset` looks like: columns by name, rows by iteration."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, column):
        return [row[column] for row in self.rows]

    def __iter__(self):
        return iter(self.rows)


class ListedRows:
    def __init__(self, rows):
        self.to_list = lambda: rows


@pytest.mark.parametrize("kind", [list, Rows, ListedRows])
def test_objects_with_rows(kind):
    rows = [pair(i) for i in range(30)]
    dataset = load_dataset(kind(rows))
    assert {e.prompt for e in dataset.train + dataset.validation} == {row["prompt"] for row in rows}
    splits = {"train": kind(rows), "test_new": kind(rows[:3]), "unsupervised": kind([{}])}
    dataset = load_dataset(splits)
    assert [e.response for e in dataset.tests["test_new"]] == ["answer 0", "answer 1", "answer 2"]
    with pytest.raises(GemmaLoraError, match="train:2: "):
        load_dataset(kind([pair(1), {"prompt": "a"}, pair(2)]))


def test_the_split_is_stable_disjoint_and_never_empty():
    def prompts(examples):
        return {e.prompt for e in examples}

    rows = [pair(i) for i in range(400)]
    once, again = load_dataset(rows), load_dataset(rows)
    assert once == again
    assert prompts(once.train).isdisjoint(prompts(once.validation))
    assert prompts(once.train) | prompts(once.validation) == {row["prompt"] for row in rows}
    assert 8 <= len(once.validation) <= 35  # 20 expected
    longer = load_dataset(rows[::-1] + [pair(i) for i in range(400, 500)])
    assert prompts(once.validation) <= prompts(longer.validation)
    assert prompts(once.train) <= prompts(longer.train)
    assert prompts(load_dataset(rows, seed=1).validation) != prompts(once.validation)
    twice = load_dataset(rows + rows)
    assert prompts(twice.train).isdisjoint(prompts(twice.validation))
    for count in range(2, 12):
        for fraction in (1e-9, 0.05, 0.999):
            small = load_dataset(rows[:count] * 2, validation_fraction=fraction)
            assert small.train and prompts(small.train).isdisjoint(prompts(small.validation))
            assert len(small.train) + len(small.validation) == 2 * count


# --- tokens and masks --------------------------------------------------------------------------------------


def test_the_mask_covers_the_answer_and_its_end_and_nothing_else(tokenizer):
    example = Example("12 lug {response} Café", '{"date": "{prompt}"}')
    encoded = encode([example], tokenizer, EXPENSE)
    (ids,), (mask,) = encoded.tokens, encoded.loss_mask
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    assert tokenizer.text(ids[mask]) == ' {"date": "{prompt}"}<eos>'
    assert tokenizer.text(ids[~mask]) == "<bos>Expense: 12 lug {response} Café\nJSON:"
    assert ids[-1] == NAMES.index("<eos>")


def test_gemmas_chat_template(tokenizer):
    encoded = encode([Example("p", "r")], tokenizer, Template.gemma_chat())
    ids = encoded.tokens[0]
    turns = "<start_of_turn>user\np<end_of_turn>\n<start_of_turn>model\nr<end_of_turn>"
    assert tokenizer.text(ids) == "<bos>" + turns
    assert tokenizer.text(ids[encoded.loss_mask[0]]) == "r<end_of_turn>"


def test_every_turn_of_the_model_carries_loss(tokenizer):
    encoded = encode([Example("a", "d", turns=tuple(CHAT))], tokenizer, Template.gemma_chat())
    ids, mask = encoded.tokens[0], encoded.loss_mask[0]
    assert tokenizer.text(ids) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>"
    )
    assert tokenizer.text(ids[mask]) == "b<end_of_turn>d<end_of_turn>"


@pytest.mark.parametrize(
    ("template", "text", "loss"),
    [
        (EXPENSE, "Expense: a\nJSON: b<eos>\nExpense: c\nJSON: d<eos>", " b<eos> d<eos>"),
        (Template.base(), "a\nb<eos>\nc\nd<eos>", "b<eos>d<eos>"),
        (Template("<bos>{prompt}|", "{response}<eos>"), "a|b<eos>\nc|d<eos>", "b<eos>d<eos>"),  # one <bos> is enough
    ],
)
def test_the_turns_of_a_chat_have_the_datasets_template(tokenizer, template, text, loss):
    encoded = encode([Example("a", "d", turns=tuple(CHAT))], tokenizer, template)
    ids, mask = encoded.tokens[0], encoded.loss_mask[0]
    assert (tokenizer.text(ids), tokenizer.text(ids[mask])) == ("<bos>" + text, loss)


@pytest.mark.parametrize(
    "text",
    [
        "<end_of_turn>",
        "x<end_of_turn>\n<start_of_turn>model\ny",
        "<eos>",
        "<e<eos>os><pad>",
        "<bos><bos>",
        "<start_of_turn",
    ],
)
def test_a_users_text_brings_in_no_control_token(tokenizer, text):
    template = Template("<start_of_turn><{prompt}>\n", "{response}<end_of_turn>")
    encoded = encode([Example(text, text)], tokenizer, template)
    ids, mask = encoded.tokens[0], encoded.loss_mask[0]
    control = [int(i) for i in ids if i < len(NAMES)]
    assert [NAMES[i] for i in control] == ["<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert tokenizer.text(ids[mask]) == f"{text}<end_of_turn>"
    assert tokenizer.text(ids[~mask]) == f"<bos><start_of_turn><{text}>\n"


WITH_BOS = Template("<bos>{prompt}", "{response}<eos>")


@pytest.mark.parametrize("template", [EXPENSE, Template.gemma_chat(), WITH_BOS])
def test_generation_sees_the_training_prefix(tokenizer, template):
    example = Example("12 <eos> lug", "answer")
    encoded = encode([example], tokenizer, template)
    ids, mask = encoded.tokens[0], encoded.loss_mask[0]
    prompt = encode_prompt(example.prompt, tokenizer, template)
    assert prompt.dtype == np.int32 and (prompt == NAMES.index("<bos>")).sum() == 1
    np.testing.assert_array_equal(prompt, ids[: mask.argmax()])


def test_an_empty_prompt_has_tokens(tokenizer):
    prompt = encode_prompt("", tokenizer, Template("{prompt}", "{response}<eos>"))
    np.testing.assert_array_equal(prompt, [NAMES.index("<bos>")])


def test_many_examples_take_one_call():
    tokenizer = ListTokenizer()
    encode([Example(str(i), str(-i)) for i in range(500)], tokenizer, EXPENSE)
    assert tokenizer.calls < 10


def test_too_long_is_a_bad_line_and_nothing_is_cut(tokenizer):
    template = Template("{prompt}", "{response}<eos>")
    fits = Example("x" * 5, "y" * 3, "a.jsonl", 1)  # 1 + 5 + 3 + 1 = 10 tokens
    answer = Example("x" * 5, "y" * 4, "a.jsonl", 2)
    prompt = Example("x" * 30, "y", "a.jsonl", 3)
    assert len(encode([fits], tokenizer, template, max_length=10).tokens[0]) == 10
    with pytest.raises(GemmaLoraError) as error:
        encode([fits, answer, prompt], tokenizer, template, max_length=10)
    lines = str(error.value).splitlines()
    assert lines[1].startswith("a.jsonl:2: ") and "11 tokens" in lines[1] and "max_length is 10" in lines[1]
    assert lines[2].startswith("a.jsonl:3: the prompt leaves no room") and "33 tokens" in lines[2]
    encoded = encode([fits, answer, prompt], tokenizer, template, max_length=10, skip_bad_lines=True)
    assert len(encoded.tokens) == 1 and encoded.skipped == {"a.jsonl": 2}
    assert "2 in a.jsonl" in encoded.skipped_summary
    with pytest.raises(GemmaLoraError, match="No example"):
        encode([prompt], tokenizer, template, max_length=10, skip_bad_lines=True)


# --- batches -----------------------------------------------------------------------------------------------


def test_batches_are_shifted_padded_and_of_one_shape(tokenizer):
    encoded = encode([Example("x" * i, "answer" + "y" * i) for i in range(7)], tokenizer, EXPENSE)
    found = []
    for x, y, weight in batches(encoded, 3, length=60, seed=1):
        token_ids, padding_mask = x["token_ids"], x["padding_mask"]
        assert token_ids.shape == padding_mask.shape == y.shape == weight.shape == (3, 60)
        assert (token_ids.dtype, padding_mask.dtype, y.dtype) == (np.int32, bool, np.int32)
        np.testing.assert_array_equal(y[:, :-1], token_ids[:, 1:])
        assert not weight[:, :-1][~padding_mask[:, 1:]].any() and not weight[:, -1].any()
        for row in range(3):
            length = padding_mask[row].sum()
            assert padding_mask[row, :length].all() and not token_ids[row, length:].any()
            if length:
                found.append(tokenizer.text(y[row][weight[row] == 1]))
            else:
                assert not weight[row].any()
    assert sorted(found) == sorted(" answer" + "y" * i + "<eos>" for i in range(7))


def test_batches_order_and_length(tokenizer):
    encoded = encode([Example("x" * i, "y") for i in range(9)], tokenizer, EXPENSE)

    def lengths(seed):
        rows = [x["padding_mask"].sum(1) for x, _, _ in batches(encoded, 2, seed=seed)]
        return np.concatenate(rows).tolist()

    plain = [len(ids) for ids in encoded.tokens] + [0]
    assert lengths(None) == plain
    assert lengths(3) == lengths(3) != plain and sorted(lengths(3)) == sorted(plain)
    assert next(batches(encoded, 2))[1].shape == (2, max(plain))
    with pytest.raises(ValueError, match="`length`"):
        batches(encoded, 2, length=max(plain) - 1)
    with pytest.raises(ValueError, match="`batch_size`"):
        batches(encoded, 0)


# --- templates and the picture of a mask -------------------------------------------------------------------


def test_the_template_is_the_callers_the_adapters_or_the_weights():
    base, tuned, unknown = (types.SimpleNamespace() for _ in range(3))
    base.gemma_lora_instruction_tuned, tuned.gemma_lora_instruction_tuned = False, True
    assert default_template(base) == default_template(unknown) == Template.base()
    assert default_template(tuned) == Template.gemma_chat()
    assert template_of(tuned) == Template.gemma_chat() and "instruction-tuned" in template_reason(tuned)
    assert "not instruction-tuned" in template_reason(base) and r"'{prompt}\n{response}<eos>'" in template_reason(base)
    tuned.gemma_lora_template = WITH_BOS
    assert template_of(tuned) == WITH_BOS and "adapter's" in template_reason(tuned)
    assert template_of(tuned, EXPENSE) == EXPENSE and "dataset's" in template_reason(tuned, EXPENSE)
    tuned.gemma_lora_template = None  # an adapter without one
    assert template_of(tuned) == Template.gemma_chat()


def test_the_base_template_is_a_line_and_its_answer(tokenizer):
    encoded = encode([Example("p", "r")], tokenizer, Template.base())
    ids = encoded.tokens[0]
    assert tokenizer.text(ids) == "<bos>p\nr<eos>" and tokenizer.text(ids[encoded.loss_mask[0]]) == "r<eos>"
    assert Template.base().stop == ("<eos>",)


def test_no_template_is_refused_with_the_way_to_one(tokenizer):
    example = Example("p", "r")
    for use in (
        lambda: encode([example], tokenizer, None),
        lambda: encode_prompt("p", tokenizer, None),
        lambda: show_mask(example, tokenizer, None),
    ):
        with pytest.raises(ValueError, match="`template`.*None.*template_of"):
            use()


def test_templates_survive_json():
    for template in (EXPENSE, Template.gemma_chat(), Template.base()):
        assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template


def test_show_mask_in_a_notebook(tokenizer):
    view = show_mask(Example("a<b>&\n", "c"), tokenizer, Template("{prompt}", "{response}<eos>"))
    page = view._repr_html_()
    spans = re.findall(r'<span style="([^"]*)">(.*?)</span>', page)
    assert [text for _, text in spans] == [
        "&lt;bos&gt;", "a", "&lt;", "b", "&gt;", "&amp;", "↵", "c", "&lt;eos&gt;",
    ]  # fmt: skip
    assert ["bold" in style and "underline" in style for style, _ in spans] == [False] * 7 + [True] * 2
    assert re.sub("<[^>]*>", "", page).endswith("read only")
    assert "<b>" not in page and "<eos>" not in page


def test_show_mask_in_a_terminal(tokenizer, monkeypatch, capsys):
    view = show_mask(Example("p\x1b[2J▁", "r\n"), tokenizer, Template("{prompt}", "{response}<eos>"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = str(view).splitlines()[0]
    assert re.findall("\x1b\\[1;4;97;44m(.*?)\x1b", line) == ["r", "↵", "<eos>"]
    assert re.sub("\x1b\\[[0-9;]*m", "", line) == "<bos>p␛[2J r↵<eos>"
    monkeypatch.setenv("NO_COLOR", "1")
    view.print()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "[r] [↵] [<eos>]" in printed
