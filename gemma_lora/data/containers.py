"""Rows of a file, whatever it is kept in: JSON Lines, JSON, CSV, TSV, Parquet, each also with .gz.

The form is seen from the content where that is possible, as names of files are often wrong. A file that cannot be read
gives one error, not one a line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.fields import ANSWERS, CHATS, PROMPTS

#: Endings of the files that are read; each may have .gz behind it.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
#: How a file of another kind begins -> what it is, and what to do.
_OTHERS = {
    b"PK\x03\x04": "a zip or Excel file. Unpack it, or save the sheet as CSV",
    b"BZh": "packed by bzip2. Unpack it, or pack it with gzip",
    b"\xfd7zXZ": "packed by xz. Unpack it, or pack it with gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd. Unpack it, or pack it with gzip",
    b"ARROW1": "an Arrow file. Save it as Parquet or JSON Lines",
    b"\xff\xff\xff\xff": "an Arrow file. Load it with datasets.load_from_disk, and give load_dataset the object",
    b"SQLite format 3": "a database. Export the table as CSV",
    b"\xff\xfe": "UTF-16. Save the file as UTF-8",
    b"\xfe\xff": "UTF-16. Save the file as UTF-8",
}
_REMEDY = "Give one JSON object a line, a JSON array, or a table as CSV with a line of names."
_BOM = b"\xef\xbb\xbf"


class Unreadable(NamedTuple):
    """A line that is no JSON, and why."""

    reason: str


class WrittenFloat(float):
    """A number that remembers how it was written: 1.50 stays 1.50 when it becomes text."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


Row = tuple[int, Any]


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """Gives each row of a file with the number of its line; in Parquet, of the row.

    Args:
        path: The file.

    Returns:
        An iterator of `(line, value)`; the value is `Unreadable` where a line is no JSON.

    Raises:
        GemmaLoraError: If the file cannot be read at all; one sentence with the remedy.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GemmaLoraError(f"{path}: is packed by gzip, and broken ({error}). Pack it anew.") from error
    except OSError as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error.strerror}). Give a JSONL file.") from error
    for start, what in _OTHERS.items():
        if raw.startswith(start):
            raise GemmaLoraError(f"{path}: is {what}.")
    if raw.startswith(b"PAR1"):
        return _parquet_rows(path, raw)
    return _text_rows(path, raw.removeprefix(_BOM))


def _parquet_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise GemmaLoraError(
            f"{path}: is a Parquet file. Install pyarrow to read it, or save it as JSON Lines or CSV."
        ) from None
    try:
        rows = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (OSError, ValueError) as error:
        raise GemmaLoraError(f"{path}: is a Parquet file, and cannot be read ({error}). Save it anew.") from error
    if rows:
        _check_columns(path, rows[0])
    return iter(list(enumerate(rows, start=1)))


def _text_rows(path: Path, raw: bytes) -> Iterator[Row]:
    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]
    if not lines:
        return iter(())
    first = lines[0][1].strip()
    if len(lines) > 1 and b"\x00" in first:
        raise GemmaLoraError(f"{path}: is no text. Give JSON Lines, a JSON array, CSV or Parquet.")
    delimiter = _delimiter(path, first)
    if delimiter is not None:
        return _table_rows(path, raw, delimiter)
    if first[:1] in (b"[", b"{") and (
        isinstance(_parsed(first), Unreadable) or (first[:1] == b"[" and len(lines) == 1)
    ):
        document = _document_rows(path, raw, lines)
        if document is not None:
            return iter(document)
    elif len(lines) > 1 and not any(line.lstrip()[:1] in (b"[", b"{") for _, line in lines):
        raise GemmaLoraError(f"{path}: holds no JSON object. {_REMEDY}")
    return ((number, _parsed(line)) for number, line in lines)


# --- JSON --------------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands there twice, one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=WrittenFloat)


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error})")
    except RecursionError as error:
        return Unreadable(f"not JSON ({error})")
    except ValueError as error:  # a name twice, or a number of thousands of digits
        return Unreadable(str(error))


def _document_rows(path: Path, raw: bytes, lines: list[tuple[int, bytes]]) -> list[Row] | None:
    """Rows of a JSON array, or of objects over several lines; None where the file is JSON Lines with bad lines."""
    text = raw.decode("utf-8", errors="replace")
    array = text.lstrip()[:1] == "["
    try:
        rows = list(array_rows(text) if array else _object_rows(text))
    except (ValueError, RecursionError) as error:
        if not array and any(isinstance(_parsed(line), dict) for _, line in lines):
            return None
        if len(lines) == 1:  # one line, whose own error is shorter
            return None
        raise GemmaLoraError(f"{path}: not JSON ({error}). Mend it, or give one JSON object a line.") from None
    if "\ufffd" in text:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise GemmaLoraError(f"{path}:{line}: not UTF-8. Save the file as UTF-8.") from None
    if len(rows) == 1 and not array and not _is_record(rows[0][1]):
        names = ", ".join(map(repr, rows[0][1]))
        raise GemmaLoraError(
            f"{path}: is one JSON object with the fields {names}. Give the list of its lines alone, as a JSON array or "
            "one JSON object a line."
        )
    return rows


def _is_record(value: dict[str, Any]) -> bool:
    return any(str(name).strip().lower() in (*CHATS, *PROMPTS, *ANSWERS) for name in value)


def array_rows(text: str) -> Iterator[Row]:
    """The elements of a JSON array, each with the line on which it begins.

    Raises:
        ValueError: If it is not JSON; as the elements are taken.

    Example:

    >>> list(array_rows('["a",\\n"b"]'))
    [(1, 'a'), (2, 'b')]
    """
    return _values(text, text.index("[") + 1, separator=",", end="]")


def _object_rows(text: str) -> Iterator[Row]:
    """Objects one after the other, each over any number of lines."""
    return _values(text, 0, separator="", end="")


def _values(text: str, place: int, separator: str, end: str) -> Iterator[Row]:
    """JSON values one after the other, each with the line on which it begins."""
    line, counted, first = 1, 0, True
    while True:
        place = _skip_space(text, place)
        if end and text[place : place + 1] == end:
            if text[place + 1 :].strip():
                raise json.JSONDecodeError("Extra data", text, place + 1)
            return
        if not end and place == len(text):
            return
        if separator and not first:
            if text[place : place + 1] != separator:
                raise json.JSONDecodeError(f"Expecting '{separator}' delimiter", text, place)
            place = _skip_space(text, place + 1)
        value, after = _DECODER.raw_decode(text, place)
        line += text.count("\n", counted, place)
        counted, first = place, False
        yield line, value
        place = after


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


# --- tables ------------------------------------------------------------------------------------------------


def _delimiter(path: Path, header: bytes) -> str | None:
    """The sign between a table's cells, seen from its first line; None where the file is no table."""
    endings = [ending.lower() for ending in path.suffixes]
    named = ".csv" in endings or ".tsv" in endings
    if not named and header[:1] in (b"[", b"{"):
        return None
    text = header.decode("utf-8", errors="replace")
    counts = {sign: len(next(csv.reader([text], delimiter=sign), [])) for sign in (",", ";", "\t")}
    best = max(counts, key=lambda sign: counts[sign])
    cells = [cell.strip().lower() for cell in next(csv.reader([text], delimiter=best), [])]
    if named:
        return best if counts[best] > 1 else "\t" if ".tsv" in endings else ","
    return best if counts[best] > 1 and any(cell in (*PROMPTS, *ANSWERS, *CHATS) for cell in cells) else None


def _table_rows(path: Path, raw: bytes, delimiter: str) -> Iterator[Row]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise GemmaLoraError(f"{path}:{line}: not UTF-8. Save the table as CSV in UTF-8.") from None
    rows: list[Row] = []
    before = csv.field_size_limit(sys.maxsize)  # by default a cell has at most 131,072 characters
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        start = 1
        for cells in reader:
            if header is None:
                header = _header(path, cells) if any(cells) else None
            elif any(cells):
                rows.append((start, _record(header, cells)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise GemmaLoraError(f"{path}:{reader.line_num}: not CSV ({error}). Mend the quotes of that line.") from None
    finally:
        csv.field_size_limit(before)
    return iter(rows)


def _header(path: Path, cells: list[str]) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise GemmaLoraError(f"{path}: two columns are called {twice!r}. Rename one.")
    _check_columns(path, cells)
    return cells


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    """Raises if a table has no prompts or no answers: once, for every row would say the same."""
    known = {column.strip().lower() for column in columns}
    if not known & {*CHATS} and not (known & {*PROMPTS, "input"} and known & {*ANSWERS}):
        listed = ", ".join(map(repr, columns))
        raise GemmaLoraError(f"{path}: the columns are {listed}; needed are prompt and response. Rename them.")


def _record(header: list[str], cells: list[str]) -> Any:
    if len(cells) > len(header):
        return Unreadable(
            f"has {len(cells)} cells, the header {len(header)}. Put a cell that holds the delimiter in quotes"
        )
    return {name: cell if cell else None for name, cell in zip(header, cells, strict=False)}
