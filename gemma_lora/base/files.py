"""Files that are whole or absent: atomic writes, checksums, and the one error a user may cause."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20  # bytes read at a time when hashing


class GemmaLoraError(Exception):
    """Something outside the program is wrong: a file, a setting, a missing package.

    The message names what is wrong, where, and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` on success.

    On an exception the temporary file is removed and whatever stood at `path` is unchanged.

    Args:
        path: Where the file is to stand. Missing parent folders are made.

    Yields:
        A `pathlib.Path` to write to.

    Example:

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _settle(path: Path) -> None:
    """Puts a finished file on the disk and gives it the rights of any new file, as far as the file system goes along.

    Mounts of cloud storage (Google Drive's, buckets) refuse one or the other; the file is whole there all the same.
    """
    with contextlib.suppress(OSError), open(path, "rb+") as written:
        os.fsync(written.fileno())
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):
        os.chmod(path, 0o666 & ~umask)  # mkstemp makes files private to the user


def require_writable(path: str | os.PathLike, option: str) -> None:
    """Raises if no file can be written at `path`: to be called before slow work whose result goes there.

    Nothing is made: where folders are missing, it asks whether the nearest one that is there could hold them.

    Args:
        path: Where the file is to stand.
        option: The option that gave the path, for the message.

    Raises:
        GemmaLoraError: It names the path, the reason and the option.
    """
    path = Path(path)
    there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        reason = "it is a folder" if path.is_dir() else None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise GemmaLoraError(f"{path}: cannot be written ({reason}). Give another {option}.")


def cache_dir() -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/gemma_lora`, by default `~/.cache/gemma_lora`.

    Raises:
        GemmaLoraError: If there is no home folder, or the folder is missing and cannot be made.
    """
    remedy = "Set XDG_CACHE_HOME to a folder that can be written (`export XDG_CACHE_HOME=/path/to/cache`)."
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise GemmaLoraError(f"There is no home folder for the weights and compiled programs. {remedy}") from None
    folder = base / "gemma_lora"
    if not folder.is_dir():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise GemmaLoraError(f"{folder}: cannot be made, since {there} cannot be written. {remedy}")
    return folder


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON to `path`, whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl_atomic(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Writes each of `rows` as a line of UTF-8 JSON to `path`, whole or not at all."""
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256_of(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
