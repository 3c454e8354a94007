"""Datasets for fine-tuning: their splits, read from files, folders or objects, and the template that goes with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.encoding import Encoded as Encoded
from gemma_lora.data.encoding import batches as batches
from gemma_lora.data.encoding import encode as encode
from gemma_lora.data.encoding import encode_prompt as encode_prompt
from gemma_lora.data.formats import BadLines, Example, from_records, read_jsonl, summary
from gemma_lora.data.mask import show_mask as show_mask
from gemma_lora.data.templates import Template
from gemma_lora.data.templates import template_of as template_of


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples by split, and the template around them.

    Invariants: `train` and `validation` are not empty; `skipped` counts bad lines by file. `template` is None where
    neither caller nor folder names one: the model's own is used then (`templates.template_of`).
    """

    name: str
    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    template: Template | None
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def skipped_summary(self) -> str:
        """One line about what was left out; empty if nothing was."""
        return summary(self.skipped)

    @property
    def digest(self) -> str:
        """SHA-256 of all examples and the template: another one means other data."""
        splits = {"train": self.train, "validation": self.validation, **self.tests}
        rows = {name: [(e.prompt, e.response, e.turns) for e in examples] for name, examples in splits.items()}
        template = None if self.template is None else self.template.to_dict()
        return hashlib.sha256(json.dumps([template, rows]).encode()).hexdigest()

    def __repr__(self) -> str:
        splits = {"train": self.train, "validation": self.validation, **self.tests}
        return f"Dataset({self.name}: {', '.join(f'{name} {len(rows)}' for name, rows in splits.items())})"


def load_dataset(
    source: Any,
    template: Template | None = None,
    skip_bad_lines: bool = False,
    validation_fraction: float = 0.05,
    seed: int = 0,
) -> Dataset:
    """Reads a dataset.

    Args:
        source: A folder with `train.jsonl` and, if there are, `validation.jsonl`, `test*.jsonl` and
            `template.json`; one JSONL file; a list of dictionaries; a `datasets.Dataset` or `DatasetDict`.
        template: The text around a prompt. Defaults to the folder's, else to None: that of the model.
        skip_bad_lines: Leave bad lines out and count them in `skipped`.
        validation_fraction: Float in (0, 1), the share split off where there is no validation split. Which
            examples go is decided by a hash of each, so it does not change when lines are added.
        seed: Integer; each gives another validation split.

    Returns:
        A `Dataset`.

    Raises:
        GemmaLoraError: If a file is missing, a line is bad, or there are too few examples.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"`validation_fraction` must be between 0 and 1. Received: {validation_fraction!r}")
    bad = BadLines(skip_bad_lines)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise GemmaLoraError(f"{path}: not found. Give a JSONL file, or a folder with train.jsonl.")
        splits = _read_folder(path, bad) if path.is_dir() else {"train": read_jsonl(path, bad=bad)}
        template = template or _read_template(path / "template.json" if path.is_dir() else None)
        name = path.stem
    else:
        splits, name = _read_objects(source, bad), "examples"
    bad.finish()
    train = splits.pop("train")
    validation = splits.pop("validation", None)
    if validation is None:
        train, validation = _split(train, validation_fraction, seed)
    if not train or not validation:
        counts = f"{len(train)} usable training and {len(validation)} validation examples"
        raise GemmaLoraError(
            f"{name}: {counts}; at least one of each is needed, so 2 where there is no validation split. "
            f"Add examples. {summary(bad.files)}".rstrip()
        )
    return Dataset(name, train, validation, splits, template, bad.files)


def _read_folder(folder: Path, bad: BadLines) -> dict[str, list[Example]]:
    if not (folder / "train.jsonl").is_file():
        raise GemmaLoraError(f"{folder}: holds no train.jsonl. Put the lines there, or give a JSONL file.")
    names = ["train", *(["validation"] if (folder / "validation.jsonl").is_file() else [])]
    names += sorted(path.stem for path in folder.glob("test*.jsonl"))
    return {name: read_jsonl(folder / f"{name}.jsonl", bad=bad) for name in names}


def _read_template(path: Path | None) -> Template | None:
    if path is None or not path.is_file():
        return None
    try:
        return Template.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise GemmaLoraError(
            f"{path}: not a template ({error}). It needs the fields prompt and response, and may have stop."
        ) from error


def _read_objects(source: Any, bad: BadLines) -> dict[str, list[Example]]:
    if isinstance(source, Mapping):  # a DatasetDict, or splits in a dictionary
        if "train" not in source:
            raise GemmaLoraError(
                f"The dataset has no split 'train' (it has {', '.join(map(str, source)) or 'none'}). "
                "Give {'train': dataset}, or one split alone."
            )
        kept = [name for name in source if name in ("train", "validation") or str(name).startswith("test")]
        return {name: from_records(_records(source[name]), name, bad) for name in kept}
    return {"train": from_records(_records(source), "train", bad)}


def _records(source: Any) -> Iterable[Any]:
    """The rows of anything that yields dictionaries, or that has `to_list()`, as a `datasets.Dataset` has."""
    if hasattr(source, "__iter__") and not isinstance(source, str | bytes):
        return source
    if hasattr(source, "to_list"):
        return source.to_list()
    raise GemmaLoraError(f"No dataset can be read from {type(source).__name__}. Give a path or dictionaries.")


def _split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits by each example's hash: stable when lines are added, equal examples together, no side empty."""

    def key(example: Example) -> int:
        text = json.dumps([seed, example.prompt, example.response, example.turns])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    if len(examples) < 2:
        return examples, []
    keys = [key(example) for example in examples]
    limit = max(int(fraction * 2**64), min(keys) + 1)
    if max(keys) < limit:  # few examples: the one of smallest hash, or, if all are equal, the first
        limit = min(keys) + 1
    chosen = {i for i, value in enumerate(keys) if value < limit}
    if len(chosen) == len(examples):
        chosen = {0}
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]
