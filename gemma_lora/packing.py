"""Packing: several examples share a row, so that hardly a token is padding.

A row carries segment ids (1, 2, … for its examples, 0 for padding); `gemma.enable_segments` keeps an example
from seeing its neighbours. All batches have one shape, so XLA compiles the training step once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of shape (rows, row_length).

    Invariants: `segment_ids` is 0 on padding; `targets[t]` is the next token of the same example;
    `weights` is 1 where that next token carries loss, and 0 on an example's last token and on padding.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    examples: int

    def as_keras(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """`(x, y, sample_weight)`; the segment ids travel as KerasHub's `padding_mask`."""
        x = {"token_ids": self.token_ids, "padding_mask": self.segment_ids}
        return x, self.targets, self.weights


def pack(
    tokens: Sequence[np.ndarray],
    loss_masks: Sequence[np.ndarray],
    rows: int,
    row_length: int,
    seed: int | None = None,
) -> list[Batch]:
    """Puts examples into batches of `rows` × `row_length` tokens, first fit, in a shuffled order.

    Args:
        tokens: One int array an example, `<bos>` first.
        loss_masks: One bool array an example: True on tokens that are to be predicted.
        rows, row_length: The shape of every batch.
        seed: Integer to shuffle by, or None to keep the order.

    Returns:
        The batches. Each example stands in exactly one, whole.

    Raises:
        ValueError: If an example is longer than `row_length`.
    """
    longest = max((len(t) for t in tokens), default=0)
    if longest > row_length:
        raise ValueError(f"`row_length` must hold the longest example ({longest} tokens). Received: {row_length}")
    order = list(range(len(tokens)))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    batches: list[Batch] = []
    current: list[list[int]] = [[] for _ in range(rows)]
    used = np.zeros(rows, int)
    for index in order:
        fitting = np.flatnonzero(used + len(tokens[index]) <= row_length)
        if not len(fitting):
            batches.append(_fill(current, tokens, loss_masks, row_length))
            current, used = [[] for _ in range(rows)], np.zeros(rows, int)
            fitting = np.array([0])
        # The fullest row that still has room: fewer scraps of free space at the end.
        row = max(fitting, key=lambda r: used[r])
        current[row].append(index)
        used[row] += len(tokens[index])
    if used.any():
        batches.append(_fill(current, tokens, loss_masks, row_length))
    return batches


def _fill(current: list[list[int]], tokens, loss_masks, row_length: int) -> Batch:
    shape = (len(current), row_length)
    token_ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, members in enumerate(current):
        start = 0
        for number, index in enumerate(members, start=1):
            ids, mask = tokens[index], loss_masks[index]
            end = start + len(ids)
            token_ids[row, start:end] = ids
            segments[row, start:end] = number
            targets[row, start : end - 1] = ids[1:]
            weights[row, start : end - 1] = mask[1:]
            start = end
    return Batch(token_ids, segments, targets, weights, sum(map(len, current)))
