"""Files are whole or absent, with the rights any new file has; a checksum is the one `hashlib` gives."""

import hashlib
import json
import os
import stat

import pytest

from gemma_lora.base.files import (
    GemmaLoraError,
    atomic_path,
    cache_dir,
    require_writable,
    sha256_of,
    write_json_atomic,
    write_text_atomic,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_exception_leaves_what_was_there_and_nothing_else(tmp_path, before, error):
    target = tmp_path / "a.txt"
    if before is not None:
        target.write_text(before)
    with pytest.raises(error):
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or target.read_text() == before


def test_success_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent  # a rename within one file system
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_missing_folders_are_made(tmp_path):
    write_text_atomic(tmp_path / "a" / "b" / "c.txt", "é\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "é\n".encode()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_text_atomic(tmp_path / "a.txt", "x")
        (tmp_path / "plain.txt").write_text("x")
        assert os.umask(umask) == umask  # it is left as it was
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "plain.txt")]
    assert modes[0] == modes[1] == 0o666 & ~umask


def test_a_failed_rename_removes_the_temporary_file(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_text_atomic(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_hold_is_refused_and_the_file_untouched(tmp_path, number):
    target = tmp_path / "a.json"
    write_json_atomic(target, {"a": 1})
    before = target.read_bytes(), target.stat().st_mtime_ns
    with pytest.raises(ValueError):
        write_json_atomic(target, {"a": {"b": [number]}})
    with pytest.raises(TypeError):
        write_json_atomic(target, {"a": object()})
    assert (target.read_bytes(), target.stat().st_mtime_ns) == before
    assert names(tmp_path) == ["a.json"]


def test_json_is_readable_utf8(tmp_path):
    value = {"città": "Zürich", "list": [1, 2.5, None, True]}
    write_json_atomic(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == value
    assert "Zürich" in text and text.endswith("}\n") and text.count("\n") > 2


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_the_checksum_is_hashlibs(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_asking_whether_a_file_can_be_written_makes_nothing(tmp_path):
    require_writable(tmp_path / "a" / "b" / "c.txt", "--output")
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file" / "c.txt", tmp_path / "file" / "d" / "c.txt", tmp_path):
        with pytest.raises(GemmaLoraError, match=f"{bad}: cannot be written .*--output"):
            require_writable(bad, "--output")
    assert names(tmp_path) == ["file"]


def test_a_folder_that_refuses_chmod_and_fsync_gets_the_whole_file(tmp_path, monkeypatch):
    """Mounts of Google Drive and of buckets do."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    write_text_atomic(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole" and names(tmp_path) == ["a.txt"]


def test_the_cache_is_where_the_user_says_or_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache/gemma_lora" and names(tmp_path) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "else"))
    assert cache_dir() == tmp_path / "else/gemma_lora"


def test_without_a_home_that_can_be_written_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "/")  # as for anybody but root
    monkeypatch.setenv("HOME", "/")
    with pytest.raises(GemmaLoraError, match="/.cache/gemma_lora: cannot be made.*XDG_CACHE_HOME"):
        cache_dir()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(GemmaLoraError, match="no home folder.*XDG_CACHE_HOME"):
        cache_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GemmaLoraError, match="file cannot be written.*XDG_CACHE_HOME"):
        cache_dir()
