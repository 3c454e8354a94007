"""Datasets for fine-tuning: their splits, read from files, folders or objects, and the template that goes with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.encoding import Encoded as Encoded
from gemma_lora.data.encoding import batches as batches
from gemma_lora.data.encoding import encode as encode
from gemma_lora.data.encoding import encode_prompt as encode_prompt
from gemma_lora.data.formats import BadLines, Example, from_records, read_examples, summary, turns_before_answer
from gemma_lora.data.formats import read_jsonl as read_jsonl
from gemma_lora.data.mask import show_mask as show_mask
from gemma_lora.data.splits import TEMPLATE_FILE, find_splits, not_used, split_of
from gemma_lora.data.templates import Template, find_template, read_template
from gemma_lora.data.templates import template_of as template_of


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples by split, and the template around them.

    Invariants: `train` and `validation` are not empty; `skipped` counts bad lines by file; `notices` are sentences on
    what was changed or left aside while reading. `template` is None where neither caller nor folder names one: the
    model's own is used then (`templates.template_of`). `template_origin` says in words where another is from.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    template: Template | None
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    notices: tuple[str, ...] = ()
    template_origin: str = "the dataset's own"

    @property
    def skipped_summary(self) -> str:
        """One line about what was left out; empty if nothing was."""
        return summary(self.skipped)

    @property
    def digest(self) -> str:
        """SHA-256 of all examples and the template: another one means other data."""
        splits = {"train": self.train, "validation": self.validation, **self.tests}
        rows = {name: [_content(example) for example in examples] for name, examples in splits.items()}
        template = None if self.template is None else self.template.to_dict()
        return hashlib.sha256(json.dumps([template, rows]).encode()).hexdigest()

    def __repr__(self) -> str:
        splits = {"train": self.train, "validation": self.validation, **self.tests}
        return f"Dataset({self.name}: {', '.join(f'{name} {len(rows)}' for name, rows in splits.items())})"


def load_dataset(
    source: Any,
    template: Template | str | os.PathLike | None = None,
    skip_bad_lines: bool = False,
    validation_fraction: float = 0.05,
    seed: int = 0,
    validation: Any = None,
    on_notice: Callable[[str], None] = print,
) -> Dataset:
    """Reads a dataset.

    Args:
        source: A file (`formats.read_examples` says which); a folder with `train.jsonl` and, if there are,
            `validation.jsonl` (or valid, val, dev, eval), `test*.jsonl` and `template.json`; a list of dictionaries,
            a pandas table, a `datasets.Dataset` or `DatasetDict`.
        template: The text around a prompt: a `Template`, the path of a `template.json`, or "base" or "chat". Defaults
            to the folder's, else to None: that of the model.
        skip_bad_lines: Leave bad lines out and count them in `skipped`.
        validation_fraction: Float in (0, 1), the share split off where there is no validation split. Which
            examples go is decided by a hash of each, so it does not change when lines are added.
        seed: Integer; each gives another validation split.
        validation: The validation split, as a file or as rows, in place of the source's own.
        on_notice: Called with each sentence of `notices`, and on bad lines that were left out.

    Returns:
        A `Dataset`.

    Raises:
        GemmaLoraError: If a file is missing, a line is bad, or there are too few examples.
        ValueError: If an argument is not as above.

    Example:

    >>> rows = [{"prompt": f"{n} + 1 =", "response": f"{n + 1}", "id": n} for n in range(40)]
    >>> load_dataset(rows[:30], template="base", validation=rows[30:])
    Not used for training, as neither prompt nor answer: 'id' (40 lines).
    Dataset(examples: train 30, validation 10)
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"`validation_fraction` must be between 0 and 1. Received: {validation_fraction!r}")
    chosen, origin = find_template(template), "as asked for"
    bad = BadLines(skip_bad_lines)
    splits, name, own = _read(source, bad, own_validation=validation is None)
    if chosen is None and own is not None:
        chosen, origin = own, "the dataset's own"
    if validation is not None:
        splits["validation"] = _read_validation(validation, bad)
    bad.finish()
    train, held = splits.pop("train"), splits.pop("validation", None)
    if held is None:
        train, held = _split(train, validation_fraction, seed)
        of = f"{len(held)} of {len(train) + len(held)} lines"
        bad.notices.say(f"There is no validation split, so {of}, chosen by a hash, are kept for it.")
    if not train or not held:
        counts = f"{len(train)} usable training and {len(held)} validation examples"
        raise GemmaLoraError(
            f"{name}: {counts}; at least one of each is needed, so 2 where there is no validation split. "
            f"Add examples. {summary(bad.files)}".rstrip()
        )
    _note_leaks(train, {"validation": held, **splits}, bad)
    dataset = Dataset(name, train, held, splits, chosen, bad.files, bad.notices.sentences(), origin)
    for sentence in filter(None, (*dataset.notices, dataset.skipped_summary)):
        on_notice(sentence)
    return dataset


def _read(source: Any, bad: BadLines, own_validation: bool) -> tuple[dict[str, list[Example]], str, Template | None]:
    """A source's splits, its name, and a folder's template."""
    if not isinstance(source, str | os.PathLike):
        return _read_objects(source, bad, own_validation), "examples", None
    path = Path(source)
    if not path.exists():
        raise GemmaLoraError(f"{path}: not found. Give a JSONL file, or a folder with train.jsonl.")
    if not path.is_dir():
        return {"train": read_examples(path, bad=bad)}, path.stem, None
    own = path / TEMPLATE_FILE
    template = read_template(own) if own.is_file() else None
    return _read_folder(path, bad, own_validation), path.stem, template


def _read_folder(folder: Path, bad: BadLines, own_validation: bool) -> dict[str, list[Example]]:
    found = find_splits(folder, own_validation)
    if found.others:
        bad.notices.say(not_used(folder.name, found.others))
    return {
        name: [example for path in files for example in read_examples(path, bad=bad)]
        for name, files in found.files.items()
    }


def _read_validation(source: Any, bad: BadLines) -> list[Example]:
    if not isinstance(source, str | os.PathLike):
        return from_records(_records(source), "validation", bad)
    path = Path(source)
    if not path.is_file():
        raise GemmaLoraError(f"{path}: no such file. Give the validation lines' file as --validation.")
    return read_examples(path, bad=bad)


def _note_leaks(train: list[Example], splits: Mapping[str, list[Example]], bad: BadLines) -> None:
    """Notes how many examples of each split ask what an example of train asks."""
    asked = {turns_before_answer(example) for example in train}
    for split, examples in splits.items():
        if leaked := sum(turns_before_answer(example) in asked for example in examples):
            bad.notices.say(f"Prompts of train are in {split} too: {leaked} of its {len(examples)} lines.")


def _content(example: Example) -> tuple:
    """What an example is made of; the marks of what is learned only where there are some."""
    plain = (example.prompt, example.response, example.turns)
    return (*plain, example.learn) if example.learn else plain


def _read_objects(source: Any, bad: BadLines, own_validation: bool) -> dict[str, list[Example]]:
    if isinstance(source, Mapping):  # a DatasetDict, or splits in a dictionary
        if "train" not in source:
            raise GemmaLoraError(
                f"The dataset has no split 'train' (it has {', '.join(map(str, source)) or 'none'}). "
                "Give {'train': dataset}, or one split alone."
            )
        kept: dict[str, Any] = {}
        for name in source:
            split = split_of(str(name))
            if split in kept:
                raise GemmaLoraError(f"{name!r} and {kept[split]!r} could each be the {split} split. Leave one out.")
            if split is not None and (own_validation or split != "validation"):
                kept[split] = name
        if others := [name for name in source if name not in kept.values()]:
            bad.notices.say(not_used("examples", others, "parts"))
        return {split: from_records(_records(source[name]), split, bad) for split, name in kept.items()}
    return {"train": from_records(_records(source), "train", bad)}


def _records(source: Any) -> Iterable[Any]:
    """The rows of anything that yields dictionaries, or that gives them: a pandas or polars table, an Arrow table."""
    for method, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if hasattr(source, method) and hasattr(source, "columns"):
            return getattr(source, method)(*arguments)
    if hasattr(source, "__iter__") and not isinstance(source, str | bytes):
        return source
    if hasattr(source, "to_list"):
        return source.to_list()
    raise GemmaLoraError(f"No dataset can be read from {type(source).__name__}. Give a path or dictionaries.")


def _split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits by each example's hash: stable when lines are added, equal examples together, no side empty."""

    def key(example: Example) -> int:
        text = json.dumps([seed, *_content(example)])
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
