"""Packing: several examples share a row, so that hardly a token is padding.

A row carries segment ids (1, 2, … for its examples, 0 for padding); `blocks.enable_segments` keeps an example
from seeing its neighbours. All batches have one shape, so XLA compiles the training step once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_LOOK_AHEAD = 64  # examples among which one is sought that fits a row's end


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
    """Puts examples into batches of `rows` × `row_length` tokens, best fit, in a shuffled order.

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
    while order:
        members: list[list[int]] = [[] for _ in range(rows)]
        free = [row_length] * rows
        while (found := _best_fit(order, free, tokens)) is not None:
            place, row = found
            index = order.pop(place)
            members[row].append(index)
            free[row] -= len(tokens[index])
        batches.append(_fill(members, tokens, loss_masks, row_length))
    return batches


def _best_fit(order: list[int], free: list[int], tokens: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """`(place in order, row)` of the example to be put next, or None where none of the next ones fits.

    The first in the order comes first, so that none waits for ever; where it does not fit, the longest of the next
    ones that does. It goes to the row it fills best.
    """
    waiting = [(place, len(tokens[index])) for place, index in enumerate(order[:_LOOK_AHEAD])]
    if not waiting:
        return None
    room = max(free)
    place, length = waiting[0] if waiting[0][1] <= room else max(waiting, key=lambda w: w[1] * (w[1] <= room))
    if length > room:
        return None
    return place, min((row for row in range(len(free)) if free[row] >= length), key=lambda row: free[row])


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
