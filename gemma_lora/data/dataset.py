"""Datasets for fine-tuning: splits, templates, tokens and the mask that says which tokens carry loss."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.formats import BadLines, Example, from_records, read_jsonl
from gemma_lora.data.templates import CONTROL_TOKENS, Template, template_of

__all__ = [
    "Dataset",
    "Encoded",
    "Example",
    "Template",
    "batches",
    "encode",
    "encode_prompt",
    "load_dataset",
    "read_jsonl",
    "show_mask",
    "template_of",
]


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
        return _summary(self.skipped)

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


def _summary(skipped: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} in {file}" for file, count in skipped.items())
    return f"Bad lines skipped: {counts}." if counts else ""


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
            f"Add examples. {_summary(bad.files)}".rstrip()
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


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids and loss masks, one array an example.

    Invariants: `tokens` are int32 and begin with `<bos>`; `loss_mask` is as long and True on the tokens to be
    predicted, never on `<bos>`; `skipped` counts by file the examples that were too long.
    """

    tokens: list[np.ndarray]
    loss_mask: list[np.ndarray]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def skipped_summary(self) -> str:
        """One line about what was left out; empty if nothing was."""
        return _summary(self.skipped)


class _Part(NamedTuple):
    """A control token of the template, or plain text; `loss` if the model is to write it."""

    text: str
    control: bool
    loss: bool


def _required(template: Template | None) -> Template:
    if template is None:
        raise ValueError(
            "`template` must be a Template. Received: None. Where a dataset names none, `template_of(model)` of "
            "gemma_lora.data gives the model's own."
        )
    return template


def _parts(example: Example, template: Template | None) -> list[_Part]:
    """An example as the template's control tokens and the plain text between them."""
    parts: list[_Part] = []
    turns = example.turns or (("user", example.prompt), ("model", example.response))
    for number, (role, text) in enumerate(turns):
        name = "prompt" if role == "user" else "response"
        literal = getattr(_required(template), name)
        if number and role == "user":  # Gemma puts a line's end between turns; <bos> is the first turn's alone
            literal = "\n" + literal.removeprefix("<bos>")
        parts += _pieces(literal, "{" + name + "}", text, role == "model")
    return parts


_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


def _pieces(literal: str, slot: str, text: str, loss: bool) -> list[_Part]:
    """Cuts a template's text at control tokens; a user's text is never cut, so it cannot bring one in.

    The literal text around the user's is joined to it: the tokenizer sees `Expense: 12 lug` as a whole.
    """
    # Splitting on one group gives plain text at even places and control tokens at odd ones.
    left, right = (_CONTROL.split(side) for side in literal.split(slot))
    joined = [*left[:-1], left[-1] + text + right[0], *right[1:]]
    parts = [_Part(piece, place % 2 == 1, loss) for place, piece in enumerate(joined)]
    return [part for part in parts if part.text]


# Names that some tokenizer turns into one control token wherever it meets them. In plain text they are broken
# after "<", so that what a user writes cannot end a turn or begin one.
_NAMES = (*CONTROL_TOKENS, "<pad>", "<unk>", "<mask>", "<start_of_image>", "<end_of_image>")
_BREAK = re.compile("(?<=<)(?=" + "|".join(re.escape(name[1:]) for name in _NAMES) + ")")


def _tokenize(texts: Iterable[str], tokenizer) -> dict[str, list[int]]:
    """Token ids of plain texts, each text tokenized once, all in one call if the tokenizer takes lists."""
    broken = {text: _BREAK.split(text) for text in texts}
    pieces = list(dict.fromkeys(piece for split in broken.values() for piece in split))
    if _takes_lists(tokenizer):
        rows = tokenizer.tokenize(pieces)
        rows = rows.to_list() if hasattr(rows, "to_list") else rows
    else:
        rows = [tokenizer.tokenize(piece) for piece in pieces]
    lists = [np.asarray(row, np.int32).reshape(-1).tolist() for row in rows]
    ids = dict(zip(pieces, lists, strict=True))
    return {text: [i for piece in split for i in ids[piece]] for text, split in broken.items()}


def _takes_lists(tokenizer) -> bool:
    """Whether `tokenize` gives one row of ids a text; tried out, as tokenizers differ."""
    probe = ["a b", "a"]
    try:
        rows = tokenizer.tokenize(probe)
        rows = rows.to_list() if hasattr(rows, "to_list") else rows
        return len(rows) == 2 and all(
            np.array_equal(row, tokenizer.tokenize(text)) for row, text in zip(rows, probe, strict=True)
        )
    except Exception:  # whatever a tokenizer of single texts does with a list
        return False


def _encode_all(examples: Sequence[list[_Part]], tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (int32, `<bos>` first) and loss mask (bool) of each example's parts."""
    plain = _tokenize((part.text for parts in examples for part in parts if not part.control), tokenizer)
    control = {token: [int(tokenizer.token_to_id(token))] for token in CONTROL_TOKENS}
    encoded = []
    for parts in examples:
        ids, mask = list(control["<bos>"]), [False]
        if parts and parts[0].control and parts[0].text == "<bos>":
            parts = parts[1:]  # a template may write it out; one is enough
        for part in parts:
            new = (control if part.control else plain)[part.text]
            ids += new
            mask += [part.loss] * len(new)
        encoded.append((np.asarray(ids, np.int32), np.asarray(mask, bool)))
    return encoded


def encode(
    examples: Sequence[Example],
    tokenizer,
    template: Template | None,
    max_length: int = 512,
    skip_bad_lines: bool = False,
) -> Encoded:
    """Turns examples into tokens and loss masks.

    Prompt and response are tokenized apart, so that generation sees the very tokens training saw. Loss is on
    the response and on the token that ends it; in a chat, on every turn of the model.

    Args:
        examples: The examples.
        tokenizer: KerasHub's Gemma tokenizer, or anything with `tokenize(text)` and `token_to_id(token)`.
        template: The text around a prompt; in a chat of several turns, around each pair of turns.
        max_length: Integer, the most tokens of an example. A longer one is bad: nothing is cut off.
        skip_bad_lines: Leave too long examples out, and count them in `skipped`, instead of raising.

    Returns:
        An `Encoded`.

    Raises:
        GemmaLoraError: If examples are too long; it names file and line.
    """
    bad = BadLines(skip_bad_lines)
    tokens, masks = [], []
    rows = _encode_all([_parts(example, template) for example in examples], tokenizer)
    for example, (ids, mask) in zip(examples, rows, strict=True):
        if len(ids) > max_length:
            bad.add(example.file or "example", example.line, _too_long(mask, max_length))
            continue
        tokens.append(ids)
        masks.append(mask)
    bad.finish()
    if not tokens:
        raise GemmaLoraError(f"No example is left to train on. {_summary(bad.files)}".rstrip())
    return Encoded(tokens, masks, bad.files)


def _too_long(mask: np.ndarray, max_length: int) -> str:
    prompt = int(mask.argmax()) if mask.any() else len(mask)
    fits = prompt < max_length
    what = "prompt and answer are too long" if fits else "the prompt leaves no room for the answer"
    return f"{what}: {len(mask)} tokens ({prompt} before the answer), max_length is {max_length}"


def encode_prompt(text: str, tokenizer, template: Template | None) -> np.ndarray:
    """The tokens a model sees before it answers, exactly those of training: (T,) int32."""
    return _encode_all([_pieces(_required(template).prompt, "{prompt}", text, False)], tokenizer)[0][0]


_Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def batches(
    encoded: Encoded,
    batch_size: int,
    length: int | None = None,
    seed: int | None = None,
) -> Iterator[_Batch]:
    """One example a row, padded: KerasHub's `(x, y, sample_weight)`. `packing.pack` wastes less.

    Args:
        encoded: Examples of `encode`.
        batch_size: Integer, rows of every batch. The last one is filled up with rows of no weight.
        length: Integer, tokens of a row. Defaults to the longest example's.
        seed: Integer to shuffle by, or None to keep the order.

    Returns:
        An iterator of `({"token_ids", "padding_mask"}, y, sample_weight)`, each array `(batch_size, length)`:
        int32, bool, int32, float32. `y[:, t]` is `token_ids[:, t + 1]`, and its weight is that token's.

    Raises:
        ValueError: If an example does not fit into `length`, or `batch_size` is below 1.
    """
    longest = max(map(len, encoded.tokens), default=0)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"`length` must hold the longest example ({longest} tokens). Received: {length}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}")
    order = np.arange(len(encoded.tokens))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    starts = range(0, len(order), batch_size)
    return (_padded(encoded, order[start : start + batch_size], (batch_size, length)) for start in starts)


def _padded(encoded: Encoded, members: np.ndarray, shape: tuple[int, int]) -> _Batch:
    token_ids, y = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    padding_mask, weight = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, index in enumerate(members):
        ids, mask = encoded.tokens[index], encoded.loss_mask[index]
        token_ids[row, : len(ids)] = ids
        padding_mask[row, : len(ids)] = True
        y[row, : len(ids) - 1] = ids[1:]
        weight[row, : len(ids) - 1] = mask[1:]
    return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weight


@dataclasses.dataclass(frozen=True)
class MaskView:
    """Tokens coloured by loss weight; see `show_mask`."""

    pieces: list[tuple[str, bool]]

    def _repr_html_(self) -> str:
        box = "padding:1px 2px;margin:1px;border-radius:2px;white-space:pre-wrap;"
        styles = {  # colours of their own on both, so that a dark page changes nothing
            True: box + "background:#0b5394;color:#fff;font-weight:bold;text-decoration:underline",
            False: box + "background:#e8e8e8;color:#444",
        }
        spans = [f'<span style="{styles[loss]}">{html.escape(piece)}</span>' for piece, loss in self.pieces]
        legend = "bold and underlined on blue: carries loss (the model learns to write it); grey: read only"
        body = f"{''.join(spans)}<br><small>{legend}</small>"
        return f'<div style="font-family:monospace;line-height:1.9">{body}</div>'

    def __str__(self) -> str:
        if os.environ.get("NO_COLOR"):
            line = " ".join(f"[{piece}]" if loss else piece for piece, loss in self.pieces)
            return f"{line}\n(in brackets: carries loss)"
        line = "".join(f"\x1b[{'1;4;97;44' if loss else '2'}m{piece}\x1b[0m" for piece, loss in self.pieces)
        return f"{line}\n(bold, underlined: carries loss)"

    def print(self) -> None:
        """Prints the coloured tokens to a terminal."""
        print(str(self))


# What would break the line, or command the terminal, is shown as a sign: "↵", "␛" and their like.
_SIGNS = {code: 0x2400 + code for code in range(32)} | {ord("▁"): " ", ord("\n"): "↵", 0x7F: "␡"}
_SIGNS |= dict.fromkeys(range(0x80, 0xA0), "�")


def show_mask(example: Example, tokenizer, template: Template | None) -> MaskView:
    """Shows which tokens of an example carry loss, in a notebook (its value) or a terminal (`print(...)`).

    Args:
        example: The example.
        tokenizer: As in `encode`, with `id_to_token`.
        template: The text around a prompt.

    Returns:
        A view with an HTML form and a text form. With NO_COLOR set, brackets stand for colour.
    """
    ((ids, mask),) = _encode_all([_parts(example, template)], tokenizer)
    words = [str(tokenizer.id_to_token(int(i))).translate(_SIGNS) for i in ids]
    return MaskView(list(zip(words, mask.tolist(), strict=True)))
