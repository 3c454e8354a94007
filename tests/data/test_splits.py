"""Which file is which split, what is said of the others, and the template and validation lines one may give."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.dataset import load_dataset
from gemma_lora.data.templates import Template, find_template
from tests.data.test_data import EXPENSE, pair, write


def load(source, **named):
    said = []
    return load_dataset(source, on_notice=said.append, **named), said


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "Validation", "VAL"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
def test_the_validation_split_has_many_names(tmp_path, name, ending):
    import gzip

    write(tmp_path / "train.jsonl", pair(1), pair(2))
    raw = json.dumps(pair(3)).encode()
    (tmp_path / f"{name}.{ending}").write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    dataset, said = load(tmp_path)
    assert [e.prompt for e in dataset.validation] == ["question 3"] and len(dataset.train) == 2 and said == []


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (("valid.jsonl", "dev.jsonl"), "validation"),
        (("valid.jsonl", "valid.csv"), "validation"),
        (("train.json",), "train"),
        (("test.jsonl", "test.csv"), "test"),
    ],
)
def test_two_files_for_one_split_are_refused_by_name(tmp_path, files, split):
    for name in ("train.jsonl", *files):
        write(tmp_path / name, pair(1), pair(2))
    with pytest.raises(GemmaLoraError, match=f"could each be the {split} split. Rename all but one") as error:
        load_dataset(tmp_path)
    assert all(name in str(error.value) for name in files)


def test_files_that_are_passed_over_are_named(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "validation_hard.jsonl", "extra.csv", ".hidden.jsonl"):
        write(tmp_path / name, pair(1), pair(2))
    for name in ("README.md", "prepare.py", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "template.json").write_text(json.dumps(EXPENSE.to_dict()))
    _, said = load(tmp_path)
    assert said[0] == f"{tmp_path.name}: files that belong to no split are not used: " + (
        "extra.csv, notes.txt, validation_hard.jsonl."
    )


def test_a_split_in_pieces_is_read_whole(tmp_path):
    for number in range(2):
        write(tmp_path / f"train-0000{number}-of-00002.jsonl", pair(number), pair(number + 10))
    dataset, _ = load(tmp_path)
    assert len(dataset.train) + len(dataset.validation) == 4


def test_what_datasets_saved_is_named(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(GemmaLoraError, match="load_from_disk"):
        load_dataset(tmp_path)


def test_parts_of_a_dictionary_as_files(tmp_path):
    dataset, said = load(
        {"train": [pair(1), pair(2)], "dev": [pair(3)], "test_b": [pair(4)], "unsupervised": [pair(5)]}
    )
    assert [e.prompt for e in dataset.validation] == ["question 3"] and list(dataset.tests) == ["test_b"]
    assert said == ["examples: parts that belong to no split are not used: unsupervised."]
    with pytest.raises(GemmaLoraError, match="'val' and 'dev' could each be the validation split"):
        load({"train": [pair(1)], "dev": [pair(2)], "val": [pair(3)]})


class Table:
    """What a pandas table looks like: iteration gives names of columns."""

    columns = ("prompt", "response")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, how):
        assert how == "records"
        return [pair(1), pair(2)]


def test_a_table_is_read_by_rows():
    assert len(load(Table())[0].train) == 1


def test_validation_lines_of_ones_own(tmp_path):
    write(tmp_path / "train.jsonl", *map(pair, range(9)))
    other = write(tmp_path / "mine.jsonl", pair(20), pair(21))
    for source in (tmp_path, tmp_path / "train.jsonl", [pair(n) for n in range(9)]):
        for validation in (other, [pair(20), pair(21)]):
            dataset, _ = load(source, validation=validation)
            assert (len(dataset.train), [e.prompt for e in dataset.validation]) == (9, ["question 20", "question 21"])
    write(tmp_path / "valid.jsonl", pair(1))
    write(tmp_path / "dev.jsonl", pair(1))
    _, said = load(tmp_path, validation=other)
    assert said == [f"{tmp_path.name}: files that belong to no split are not used: dev.jsonl, mine.jsonl, valid.jsonl."]
    with pytest.raises(GemmaLoraError, match="nowhere.jsonl: no such file.*--validation"):
        load(tmp_path, validation=tmp_path / "nowhere.jsonl")
    with pytest.raises(GemmaLoraError, match="mine.jsonl:2: not JSON"):
        load(tmp_path, validation=write(tmp_path / "mine.jsonl", pair(1), b"?"))


def test_the_same_prompts_in_train_and_elsewhere_are_counted(tmp_path):
    write(tmp_path / "train.jsonl", *map(pair, range(9)))
    write(tmp_path / "valid.jsonl", pair(3) | {"response": "another"}, pair(20))
    write(tmp_path / "test.jsonl", pair(1), pair(2), pair(30))
    _, said = load(tmp_path)
    assert said == [
        "Prompts of train are in validation too: 1 of its 2 lines.",
        "Prompts of train are in test too: 2 of its 3 lines.",
    ]


def test_prompts_are_the_same_if_what_comes_before_is_too():
    def chat(first):
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": "b"}]
        return {"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}

    assert load([chat("a"), chat("b")], validation=[chat("x")])[1] == []
    assert "1 of its 1 lines" in load([chat("a"), chat("b")], validation=[chat("a")])[1][0]


def test_a_split_of_ones_own_making_is_said():
    assert load([pair(n) for n in range(40)])[1][0].startswith("There is no validation split, so ")


def test_notices_are_printed_where_nobody_else_takes_them(capsys):
    dataset = load_dataset([pair(1) | {"id": 1}], validation=[pair(2)])
    assert capsys.readouterr().out.splitlines() == list(dataset.notices) and len(dataset.notices) == 1


# --- templates ---------------------------------------------------------------------------------------------


def test_a_template_is_given_as_file_or_word(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(EXPENSE.to_dict()))
    for given, template in ((path, EXPENSE), (str(path), EXPENSE), ("base", Template.base()), (EXPENSE, EXPENSE)):
        dataset, _ = load([pair(1), pair(2)], template=given)
        assert (dataset.template, dataset.template_origin) == (template, "as asked for")
    assert find_template("chat") == Template.gemma_chat() and find_template(None) is None
    (tmp_path / "template.json").write_text(json.dumps(Template.base().to_dict()))
    write(tmp_path / "train.jsonl", pair(1), pair(2))
    assert load(tmp_path)[0].template_origin == "the dataset's own"
    assert load(tmp_path, template="chat")[0].template == Template.gemma_chat()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "not a template"),
        ("[]", "needs the fields prompt and response"),
        ('{"prompt": "{prompt}"}', "needs the fields prompt and response"),
        ('{"prompt": "x", "response": "{response}"}', "holds {prompt} once"),
        ('{"prompt": "{prompt}", "response": "{response}", "system": "x"}', "Received also: system"),
        ('{"prompt": "{prompt}", "response": "{response}", "stop": "<eos>"}', "stop is a list of tokens"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, content, what):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(GemmaLoraError, match="t.json: not a template") as error:
        load_dataset([pair(1), pair(2)], template=tmp_path / "t.json")
    assert what in str(error.value)


def test_what_is_no_template_is_refused():
    with pytest.raises(GemmaLoraError, match="gemma: no such template. Give a template.json, or one of base, chat"):
        find_template("gemma")
    with pytest.raises(ValueError, match="`template` must be a Template, a file"):
        find_template(3)


@pytest.mark.slow
def test_reading_imports_no_jax(tmp_path):
    write(tmp_path / "train.jsonl", pair(1), pair(2))
    script = (
        f"import sys; from gemma_lora import load_dataset; load_dataset({str(tmp_path)!r}, template='chat'); "
        "print({'jax', 'keras', 'pyarrow'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "set()"
