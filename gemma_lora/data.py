"""Datasets for fine-tuning: splits, templates, tokens and the mask that says which tokens carry loss."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.files import GemmaLoraError
from gemma_lora.formats import BadLines, Example, from_records, read_jsonl
from gemma_lora.templates import CONTROL_TOKENS, Template

__all__ = ["Dataset", "Encoded", "Example", "Template", "encode", "encode_prompt", "load_dataset", "read_jsonl", "show_mask"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples by split, and the template around them.

    Invariants: `train` and `validation` are not empty; `skipped` counts bad lines by file.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    template: Template
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        tests = ", ".join(f"{name} {len(examples)}" for name, examples in self.tests.items())
        return f"Dataset({self.name}: train {len(self.train)}, validation {len(self.validation)}{tests and ', ' + tests})"


def load_dataset(
    source: Any,
    template: Template | None = None,
    skip_bad_lines: bool = False,
    validation_fraction: float = 0.05,
) -> Dataset:
    """Reads a dataset.

    Args:
        source: A folder with `train.jsonl` and, if there are, `validation.jsonl`, `test*.jsonl` and
            `template.json`; one JSONL file; a list of dictionaries; a Hugging Face `Dataset` or `DatasetDict`.
        template: The text around a prompt. Defaults to the folder's, else Gemma's chat template.
        skip_bad_lines: Leave bad lines out and count them in `skipped`.
        validation_fraction: Float in (0, 1), the share split off where there is no validation split. Which
            examples go is decided by a hash of each, so it does not change when lines are added.

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
            raise GemmaLoraError(f"{path}: no such file or folder. Give a JSONL file, or a folder with train.jsonl.")
        splits = _read_folder(path, bad) if path.is_dir() else {"train": read_jsonl(path, bad=bad)}
        template = template or _read_template(path / "template.json" if path.is_dir() else None)
        name = path.stem
    else:
        splits, name = _read_objects(source, bad), "examples"
    bad.finish()
    train = splits.pop("train")
    validation = splits.pop("validation", None)
    if validation is None:
        train, validation = _split(train, validation_fraction)
    if not train or not validation:
        raise GemmaLoraError(f"{name}: {len(train) + len(validation)} usable examples; at least 2 are needed.")
    return Dataset(name, train, validation, splits, template or Template.gemma_chat(), bad.files)


def _read_folder(folder: Path, bad: BadLines) -> dict[str, list[Example]]:
    if not (folder / "train.jsonl").is_file():
        raise GemmaLoraError(f"{folder}: holds no train.jsonl. Put the training lines there, or give a JSONL file.")
    names = ["train", *(["validation"] if (folder / "validation.jsonl").is_file() else [])]
    names += sorted(path.stem for path in folder.glob("test*.jsonl"))
    return {name: read_jsonl(folder / f"{name}.jsonl", bad=bad) for name in names}


def _read_template(path: Path | None) -> Template | None:
    if path is None or not path.is_file():
        return None
    try:
        return Template.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise GemmaLoraError(f"{path}: not a template ({error}).") from error


def _read_objects(source: Any, bad: BadLines) -> dict[str, list[Example]]:
    if isinstance(source, Mapping):  # a DatasetDict, or splits in a dictionary
        if "train" not in source:
            raise GemmaLoraError(f"The dataset has no split 'train' (it has {', '.join(map(str, source))}).")
        kept = {name: source[name] for name in source if name in ("train", "validation") or name.startswith("test")}
        return {name: from_records(records, name, bad) for name, records in kept.items()}
    try:
        records = iter(source)
    except TypeError:
        raise GemmaLoraError(f"A dataset cannot be read from {type(source).__name__}. Give a path or dictionaries.") from None
    return {"train": from_records(records, "train", bad)}


def _split(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Splits by each example's hash: stable when lines are added, never empty on either side."""

    def key(example: Example) -> int:
        text = json.dumps([example.prompt, example.response, example.turns], ensure_ascii=False)
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])

    if len(examples) < 2:
        return examples, []
    limit = int(fraction * 2**64)
    chosen = {i for i, example in enumerate(examples) if key(example) < limit}
    if not chosen or len(chosen) == len(examples):
        chosen = {min(range(len(examples)), key=lambda i: key(examples[i]))}
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids (int32, `<bos>` first) and loss masks (bool, True on tokens to be predicted), one an example."""

    tokens: list[np.ndarray]
    loss_mask: list[np.ndarray]


_Part = tuple[str, bool]  # text, and whether its tokens carry loss


def _parts(example: Example, template: Template) -> list[_Part]:
    """An example as template literals and user text, control tokens of the template apart."""
    parts: list[_Part] = []
    turns = example.turns or (("user", example.prompt), ("model", example.response))
    around = Template.gemma_chat() if example.turns else template
    for number, (role, text) in enumerate(turns):
        name = "prompt" if role == "user" else "response"
        literal = getattr(around, name)
        if number and role == "user":
            literal = "\n" + literal  # Gemma puts a line's end between turns
        parts += _pieces(literal, "{" + name + "}", text, role == "model")
    return parts


def _pieces(literal: str, slot: str, text: str, loss: bool) -> list[_Part]:
    """Cuts a template's text at control tokens; a user's text is never cut, so it cannot bring one in."""
    before, after = literal.split(slot)
    pieces: list[_Part] = []
    left, right = _cut(before), _cut(after)
    # What stands around the user's text is tokenized together with it, as plain text.
    pieces += [(piece, loss) for piece in left[:-1]]
    pieces.append(("\0" + left[-1] + text + right[0], loss))
    pieces += [(piece, loss) for piece in right[1:]]
    return [piece for piece in pieces if piece[0] not in ("", "\0")]


def _cut(literal: str) -> list[str]:
    """Splits at control tokens and keeps them; begins and ends with plain text (which may be empty)."""
    found = [""]
    while literal:
        token = next((t for t in CONTROL_TOKENS if literal.startswith(t)), None)
        if token:
            found += [token, ""]
            literal = literal[len(token) :]
        else:
            found[-1] += literal[0]
            literal = literal[1:]
    return found


def _tokenize(texts: Sequence[str], tokenizer) -> list[list[int]]:
    """Token ids of plain texts. A control token's name in a text stays text."""
    control = {int(tokenizer.token_to_id(token)) for token in CONTROL_TOKENS}
    rows = []
    for text in texts:
        ids = [int(i) for i in np.asarray(tokenizer.tokenize(text)).reshape(-1)]
        if control & set(ids):
            ids = _tokenize_apart(text, tokenizer)
        rows.append(ids)
    return rows


def _tokenize_apart(text: str, tokenizer) -> list[int]:
    """Tokenizes a text that names control tokens: each name is broken after its first character."""
    for token in CONTROL_TOKENS:
        text = text.replace(token, token[0] + "\0" + token[1:])
    ids: list[int] = []
    for piece in text.split("\0"):
        ids += [int(i) for i in np.asarray(tokenizer.tokenize(piece)).reshape(-1)]
    return ids


def _encode_parts(parts: Sequence[_Part], tokenizer) -> tuple[list[int], list[bool]]:
    ids, mask = [int(tokenizer.token_to_id("<bos>"))], [False]
    for text, loss in parts:
        new = [int(tokenizer.token_to_id(text))] if text in CONTROL_TOKENS else _tokenize([text.lstrip("\0")], tokenizer)[0]
        ids += new
        mask += [loss] * len(new)
    return ids, mask


def encode(
    examples: Sequence[Example],
    tokenizer,
    template: Template,
    max_length: int = 512,
    skip_bad_lines: bool = False,
) -> Encoded:
    """Turns examples into tokens and loss masks.

    Prompt and response are tokenized apart, so that generation sees the very tokens training saw. Loss is on
    the response and on the token that ends it; in a chat, on every turn of the model.

    Args:
        examples: The examples.
        tokenizer: KerasHub's Gemma tokenizer, or anything with `tokenize(text)` and `token_to_id(token)`.
        template: The text around a prompt.
        max_length: Integer, the most tokens of an example. A longer one is bad: nothing is cut off.
        skip_bad_lines: Leave too long examples out instead of raising.

    Raises:
        GemmaLoraError: If examples are too long; it names file and line.
    """
    bad = BadLines(skip_bad_lines)
    tokens, masks = [], []
    for example in examples:
        ids, mask = _encode_parts(_parts(example, template), tokenizer)
        if len(ids) > max_length:
            prompt = mask.index(True) if True in mask else len(ids)
            what = "the prompt leaves no room for the answer" if prompt >= max_length else "prompt and answer are too long"
            bad.add(example.file or "example", example.line, f"{what}: {len(ids)} tokens, at most {max_length} fit")
            continue
        tokens.append(np.asarray(ids, np.int32))
        masks.append(np.asarray(mask, bool))
    bad.finish()
    if not tokens:
        raise GemmaLoraError("No example is left to train on.")
    return Encoded(tokens, masks)


def encode_prompt(text: str, tokenizer, template: Template) -> np.ndarray:
    """The tokens a model sees before it answers: exactly those of training, up to the response. (T,) int32."""
    ids, _ = _encode_parts(_pieces(template.prompt, "{prompt}", text, False), tokenizer)
    return np.asarray(ids, np.int32)


@dataclasses.dataclass(frozen=True)
class MaskView:
    """Tokens coloured by loss weight; see `show_mask`."""

    pieces: list[tuple[str, bool]]

    def _repr_html_(self) -> str:
        spans = []
        for piece, loss in self.pieces:
            style = (
                "background:#0b5394;color:#fff;font-weight:bold;text-decoration:underline"
                if loss
                else "background:#e8e8e8;color:#444"
            )
            spans.append(f'<span style="{style};padding:1px 2px;margin:1px;border-radius:2px">{html.escape(piece)}</span>')
        legend = "bold and underlined on blue: carries loss (the model learns to write it); grey: read only"
        return f'<div style="font-family:monospace;line-height:1.9">{"".join(spans)}<br><small>{legend}</small></div>'

    def __str__(self) -> str:
        if os.environ.get("NO_COLOR"):
            return " ".join(f"[{piece}]" if loss else piece for piece, loss in self.pieces)
        return "".join(f"\x1b[1;4;97;44m{p}\x1b[0m" if loss else f"\x1b[2m{p}\x1b[0m" for p, loss in self.pieces)

    def print(self) -> None:
        """Prints the coloured tokens to a terminal."""
        print(str(self))


def show_mask(example: Example, tokenizer, template: Template) -> MaskView:
    """Shows which tokens of an example carry loss, in a notebook (its value) or a terminal (`print(...)`).

    Args:
        example: The example.
        tokenizer: As in `encode`, with `id_to_token`.
        template: The text around a prompt.

    Returns:
        A view with an HTML form and a text form. With NO_COLOR set, brackets stand for colour.
    """
    ids, mask = _encode_parts(_parts(example, template), tokenizer)
    words = [str(tokenizer.id_to_token(i)).replace("▁", " ").replace("\n", "↵") for i in ids]
    return MaskView(list(zip(words, mask, strict=True)))
