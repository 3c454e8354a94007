"""Files in every form hold the same rows; what cannot be read is one sentence, never one a line."""

import csv
import gzip
import io
import json
import random
import sys
import types
import zipfile

import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.formats import read_examples

ROWS = [
    {"prompt": "a, b", "response": '"quoted"', "id": "1"},
    {"prompt": "two\nlines", "response": "é\u2028\x85x", "id": "2"},
    {"prompt": "; \t", "response": "[{}]", "id": "3"},
]


def table(rows, delimiter):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def lines(rows, **how):
    return "".join(json.dumps(row, **how) + "\n" for row in rows)


#: A file's name -> how its content is made.
FORMS = {
    "a.jsonl": lambda rows: lines(rows),
    "a.ndjson": lambda rows: lines(rows, ensure_ascii=False),
    "crlf.jsonl": lambda rows: lines(rows).replace("\n", "\r\n"),
    "mark.jsonl": lambda rows: "\ufeff" + lines(rows),
    "a.json": json.dumps,
    "pretty.json": lambda rows: json.dumps(rows, indent=4, ensure_ascii=False),
    "one a line.json": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "array.jsonl": lambda rows: json.dumps(rows, indent=1),
    "objects.jsonl": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "old mac.jsonl": lambda rows: lines(rows).replace("\n", "\r"),
    "a.csv": lambda rows: table(rows, ","),
    "mark.csv": lambda rows: "\ufeff" + table(rows, ","),
    "semicolons.csv": lambda rows: table(rows, ";"),
    "a.tsv": lambda rows: table(rows, "\t"),
    "table.jsonl": lambda rows: table(rows, ","),
    "table.txt": lambda rows: table(rows, ";"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_rows(tmp_path, name, packed):
    raw = FORMS[name](ROWS).encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    said = []
    examples = read_examples(path, on_notice=said.append)
    assert [(e.prompt, e.response) for e in examples] == [
        (row["prompt"].strip(), row["response"].strip()) for row in ROWS
    ]
    assert "'id' (3 lines)" in said[0]


@pytest.mark.parametrize(
    ("name", "line"), [("pretty.json", 7), ("one a line.json", 3), ("objects.jsonl", 6), ("a.csv", 4), ("a.jsonl", 2)]
)
def test_a_row_is_named_by_the_line_on_which_it_begins(tmp_path, name, line):
    path = tmp_path / name
    path.write_bytes(FORMS[name]([ROWS[1], ROWS[0] | {"response": " "}]).encode())
    with pytest.raises(GemmaLoraError) as error:
        read_examples(path)
    assert str(error.value).splitlines()[1] == f"{path}:{line}: the answer is empty"


def random_rows(seed):
    rng = random.Random(seed)
    letters = "ab\"',;\t\n {}[]é\\\u2028"
    word = lambda: "x" + "".join(rng.choices(letters, k=rng.randrange(9))) + "x"  # noqa: E731
    return [{"prompt": word(), "response": word()} for _ in range(rng.randrange(1, 8))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["a.jsonl", "pretty.json", "objects.jsonl", "a.csv", "a.tsv"])
def test_any_text_survives_any_form(tmp_path, name, seed):
    rows = random_rows(seed)
    path = tmp_path / name
    path.write_bytes(FORMS[name](rows).encode())
    assert [{"prompt": e.prompt, "response": e.response} for e in read_examples(path)] == rows


def sheet():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


#: A file -> its bytes, and what the one sentence says.
BROKEN = {
    "cut.json": (json.dumps(ROWS, indent=4)[:-30].encode(), "not JSON"),
    "cut lines.json": (("[\n" + ",\n".join(map(json.dumps, ROWS))).encode(), "not JSON"),
    "commas.json": (json.dumps(ROWS, indent=4).replace("},", "}").encode(), "not JSON.*Expecting ','"),
    "more.json": ((json.dumps(ROWS, indent=4) + "\n[]").encode(), "not JSON.*Extra data"),
    "nested.json": (json.dumps({"data": ROWS}, indent=4).encode(), "one JSON object with the fields 'data'"),
    "latin.json": (json.dumps(ROWS, indent=4, ensure_ascii=False).encode("cp1252", "replace"), "not UTF-8"),
    "latin.csv": ("prompt,response\na,b\ncafé,b\n".encode("cp1252"), "latin.csv:3: not UTF-8"),
    "quote.csv": (b'prompt,response\na,"b\n', "not CSV"),
    "twice.csv": (b"prompt,response,prompt\na,b,c\n", "two columns are called 'prompt'"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS).encode())[:-12], "packed by gzip, and broken"),
    "sheet.xlsx": (sheet(), "zip or Excel"),
    "sheet.csv": (sheet(), "zip or Excel"),
    "wide.jsonl": (lines(ROWS).encode("utf-16"), "UTF-16. Save the file as UTF-8"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x00", "zstd"),
    "prose.txt": (b"One line.\nAnother line, with a comma.\n", "holds no JSON object"),
    "columns.csv": (b"text,label\na,b\nc,d\n", "the columns are 'text', 'label'; needed are prompt and response"),
    "one column.csv": (b"prompt\na\nb\n", "the columns are 'prompt'; needed"),
    "noise.bin": (bytes(range(256)) * 4, "is no text"),
    "empty.csv": (b"prompt,response\n", "holds no usable example"),
    "empty.json": (b"[]", "holds no usable example"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    content, what = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    for skip in (False, True):
        with pytest.raises(GemmaLoraError, match=what) as error:
            read_examples(tmp_path / name, skip_bad_lines=skip)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / name))


def test_bad_lines_among_good_ones_are_still_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"\n' + lines(ROWS))
    with pytest.raises(GemmaLoraError, match="1 bad line:\n.*a.jsonl:1: not JSON"):
        read_examples(path)
    assert len(read_examples(path, skip_bad_lines=True)) == 3


def test_a_row_of_too_many_cells_is_a_bad_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\na,b\nc, d,e\nf\n")
    with pytest.raises(GemmaLoraError) as error:
        read_examples(path)
    assert "a.csv:3: has 3 cells, the header 2" in str(error.value)
    assert "a.csv:4: the field 'response' is missing" in str(error.value)


def test_a_long_cell_is_read_and_csvs_limit_is_as_it_was(tmp_path):
    limit = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response\n{'x' * (limit + 1)},b\n")
    assert len(read_examples(path)[0].prompt) == limit + 1
    assert csv.field_size_limit() == limit


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(GemmaLoraError, match="is a Parquet file. Install pyarrow") as error:
        read_examples(tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_parquet_is_read_through_pyarrow(tmp_path, monkeypatch):
    parquet = types.SimpleNamespace(read_table=lambda file: types.SimpleNamespace(to_pylist=lambda: ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    assert [e.line for e in read_examples(tmp_path / "a.parquet")] == [1, 2, 3]


def test_parquet_itself(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chats = [{"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet")[0].response == "b"
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(GemmaLoraError, match="is a Parquet file, and cannot be read"):
        read_examples(tmp_path / "cut.parquet")
