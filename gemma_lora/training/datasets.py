"""What a training reads: lines from wherever they are, packed into batches, epoch by epoch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data.dataset import Dataset, load_dataset
from gemma_lora.data.encoding import Encoded, encode
from gemma_lora.data.formats import Example
from gemma_lora.data.packing import Batch, pack
from gemma_lora.data.splits import find_splits, split_of
from gemma_lora.data.templates import Template
from gemma_lora.training.replay import with_replay


def is_lines(source: Any) -> bool:
    """Whether this is lines of text (a `Dataset`, or what `load_dataset` reads) and not Keras's arrays."""
    if isinstance(source, Dataset | str | os.PathLike):
        return True
    if isinstance(source, list | tuple):
        return bool(source) and all(isinstance(part, Example) or _is_record(part) for part in source)
    if isinstance(source, Mapping):  # a DatasetDict, or splits in a dictionary; arrays have no split "train"
        return "train" in source
    return hasattr(source, "column_names") and hasattr(source, "to_list")  # a `datasets.Dataset`


def _is_record(part: Any) -> bool:
    return isinstance(part, Mapping) and not any(hasattr(value, "shape") for value in part.values())


def as_dataset(source: Any, all_lines: bool = False, skip_bad_lines: bool = False) -> Dataset:
    """A `Dataset` of any lines.

    Args:
        source: A `Dataset`, or what `load_dataset` reads; a list may hold `Example`s.
        all_lines: Train on the lines too that would have been split off where there is no validation split.
        skip_bad_lines: As in `load_dataset`.
    """
    if isinstance(source, Dataset):
        return source
    known: dict[tuple, Example] = {}
    if isinstance(source, list | tuple):  # an example goes in as a record, and comes out as itself
        known = {_key(part): part for part in source if isinstance(part, Example)}
        source = [_record(part) if isinstance(part, Example) else part for part in source]
    dataset = load_dataset(source, skip_bad_lines=skip_bad_lines, on_notice=_unsaid)
    train = [known.get(_key(example), example) for example in dataset.train]
    validation = [known.get(_key(example), example) for example in dataset.validation]
    if all_lines and not _has_validation(source):
        train = train + validation
    return dataclasses.replace(dataset, train=train, validation=validation)


def _unsaid(notice: str) -> None:
    """Notices are for who reads lines; here they have been read, or a split is made only to be put together again."""


def _key(example: Example) -> tuple:
    return example.prompt, example.response, example.turns


def _record(example: Example) -> dict[str, Any]:
    if not example.turns:
        return {"prompt": example.prompt, "response": example.response}
    return {"messages": [{"role": role, "content": text} for role, text in example.turns]}


def _has_validation(source: Any) -> bool:
    """Whether a source of `load_dataset` has a validation split of its own."""
    if isinstance(source, Mapping):
        return any(split_of(str(name)) == "validation" for name in source)
    is_folder = isinstance(source, str | os.PathLike) and Path(source).is_dir()
    return is_folder and "validation" in find_splits(Path(source)).files


def examples_of(source: Any, skip_bad_lines: bool = False) -> list[Example]:
    """The lines that a loss is computed on: the validation split of a dataset or folder, all lines of anything else."""
    if isinstance(source, list | tuple):
        records = [_record(part) if isinstance(part, Example) else part for part in source]
        read = load_dataset(
            {"train": records, "validation": records}, skip_bad_lines=skip_bad_lines, on_notice=_unsaid
        ).validation
        known = {_key(part): part for part in source if isinstance(part, Example)}
        return [known.get(_key(example), example) for example in read]
    dataset = as_dataset(source, skip_bad_lines=skip_bad_lines)
    if isinstance(source, Dataset) or _has_validation(source):
        return dataset.validation
    return dataset.train + dataset.validation


def held_out(
    examples: Sequence[Example], tokenizer: Any, template: Template | None, rows: int, row_length: int
) -> Epochs:
    """Packed lines for a loss: every line is whole, in rows as long as the longest needs.

    Args:
        examples: The lines.
        tokenizer, template: As in `encode`.
        rows, row_length: Integers, those of training; rows are made longer, by doubling, where a line needs it.
    """
    if not examples:
        raise ValueError("`validation_data` must hold at least one line. Received none.")
    encoded = encode(examples, tokenizer, template, max_length=_NO_LIMIT)
    longest = max(map(len, encoded.tokens)) - 1
    while row_length < longest:
        row_length *= 2
    return Epochs([pack(encoded.tokens, encoded.loss_mask, rows, row_length)])


_NO_LIMIT = 2**31 - 1


def epochs_of(
    encoded: Encoded,
    rows: int,
    row_length: int,
    seeds: Iterable[int | None],
    steps_per_epoch: int | None = None,
    replay: tuple[Sequence[np.ndarray] | None, float] = (None, 0.0),
    first: int = 0,
) -> list[list[Batch]]:
    """Packs lines once for each epoch, each time in an order of its own.

    Args:
        encoded: The lines.
        rows, row_length: Integers, the shape of a batch.
        seeds: One for each epoch; None keeps the order of the lines.
        steps_per_epoch: Integer: epochs are so many batches then, which go through the lines again and again.
        replay: Texts to mix in, and their share; see `with_replay`.
        first: Integer, the number of the first epoch, by which texts follow each other.

    Returns:
        A list of batches for each epoch. Their numbers may differ: another order may fill rows better.
    """
    seeds = list(seeds)

    def packed(seed: int | None, number: int) -> list[Batch]:
        texts, share = replay
        mixed = encoded if texts is None else with_replay(encoded, texts, share, number, row_length)
        return pack(mixed.tokens, mixed.loss_mask, rows, row_length, seed)

    if steps_per_epoch is None:
        return [packed(seed, number) for number, seed in enumerate(seeds, start=first)]
    stream: list[Batch] = []
    passes = 0
    while len(stream) < steps_per_epoch * len(seeds):
        seed = None if seeds[0] is None else seeds[0] + passes
        stream += packed(seed, first + passes)
        passes += 1
    starts = range(0, steps_per_epoch * len(seeds), steps_per_epoch)
    return [stream[start : start + steps_per_epoch] for start in starts]


class Epochs(keras.utils.PyDataset):
    """Packed batches as Keras wants them, of epochs that may have different numbers of batches.

    Keras asks once for the number of batches and then takes as many in every epoch. So an epoch is as long here as the
    longest one, and a place that holds no batch, or one that was trained before the run was stopped, is a batch
    without rows. `SteppedModel` passes over those, and callbacks do not see them.

    Args:
        epochs: Batches of each epoch.
        first: Integer, the number of the first epoch.
        done: Integer, batches that were trained before, counted from the first.
    """

    def __init__(self, epochs: list[list[Batch]], first: int = 0, done: int = 0):
        super().__init__()
        self.epochs, self.first, self.epoch = epochs, first, first
        self._done = done

    def __len__(self) -> int:
        return max(map(len, self.epochs))

    def __getitem__(self, index: int):
        if self.holds(self.epoch, index):
            return self.epochs[self.epoch - self.first][index].as_keras()
        shape = (0, self.epochs[0][0].token_ids.shape[1])
        empty = np.zeros(shape, np.int32)
        return {"token_ids": empty, "padding_mask": empty}, empty, np.zeros(shape, np.float32)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def holds(self, epoch: int, index: int) -> bool:
        """Whether there is a batch to train at this place of an epoch."""
        place = epoch - self.first
        before = sum(map(len, self.epochs[:place]))
        return index < len(self.epochs[place]) and before + index >= self._done

    @property
    def ends(self) -> list[int]:
        """How many batches there are up to the end of each epoch."""
        return [int(end) for end in np.cumsum([len(one) for one in self.epochs])]
