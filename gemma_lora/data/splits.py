"""Which file of a folder, or which part of a dictionary, is which split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.containers import ENDINGS

#: Names that other tools give the validation split.
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
TEMPLATE_FILE = "template.json"
# Endings of files that may hold lines, but are not read: they are named, so that nobody takes them for used.
_UNREAD = (".txt", ".arrow", ".xlsx", ".zip", ".zst", ".bz2", ".xz", ".db", ".sqlite")
_PIECE = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00002.parquet, as the Hugging Face Hub has them


class Splits(NamedTuple):
    """Files by split, in pieces where a split has several, and the files that belong to none."""

    files: dict[str, list[Path]]
    others: list[str]


def split_of(name: str) -> str | None:
    """The split that a name stands for: train, validation, a test's own name, or None."""
    lower = name.lower()
    if lower in VALIDATION_NAMES:
        return "validation"
    if lower == "train" or lower.startswith("test"):
        return lower if lower == "train" else name
    return None


def find_splits(folder: Path, validation: bool = True) -> Splits:
    """Finds a folder's splits by the names of its files.

    Args:
        folder: The folder.
        validation: Whether to look for a validation split; if not, its files are among the others.

    Raises:
        GemmaLoraError: If there is no train split, or two files could be one split.
    """
    found: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == TEMPLATE_FILE or not path.is_file():
            continue
        stem, ending = _stem(path)
        split = split_of(_PIECE.sub("", stem)) if ending in ENDINGS else None
        if split is None or (split == "validation" and not validation):
            others += [path.name] if ending in (*ENDINGS, *_UNREAD) else []
        else:
            found.setdefault(split, []).append(path)
    for split, files in found.items():
        if len(files) > 1 and not _are_pieces(files):
            names = " and ".join(path.name for path in files)
            hint = ", or give the right one as --validation" if split == "validation" else ""
            raise GemmaLoraError(f"{folder}: {names} could each be the {split} split. Rename all but one{hint}.")
    if "train" not in found:
        raise GemmaLoraError(_no_train(folder, [*found, *others]))
    first = [name for name in ("train", "validation") if name in found]
    return Splits({name: found[name] for name in (*first, *sorted(set(found) - set(first)))}, others)


def not_used(name: str, others: Iterable[str], what: str = "files") -> str:
    """The sentence that names what is passed over."""
    listed = ", ".join(map(str, others))
    return f"{name}: {what} that belong to no split are not used: {listed}."


def _stem(path: Path) -> tuple[str, str]:
    """A file's name without its endings, and the ending that says its form."""
    plain = Path(path.name[: -len(".gz")]) if path.name.lower().endswith(".gz") else Path(path.name)
    return plain.stem, plain.suffix.lower()


def _are_pieces(files: list[Path]) -> bool:
    stems = [_stem(path) for path in files]
    whole = {(_PIECE.sub("", stem), ending) for stem, ending in stems}
    return all(_PIECE.search(stem) for stem, _ in stems) and len(whole) == 1


def _no_train(folder: Path, there: list[str]) -> str:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return (
            f"{folder}: is what `save_to_disk` of datasets wrote. Load it with datasets.load_from_disk, and give "
            "load_dataset the object."
        )
    holds = f" It has {', '.join(there)}." if there else ""
    return f"{folder}: holds no train.jsonl. Put the lines there, or give a JSONL file.{holds}"
