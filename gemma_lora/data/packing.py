"""Packing: several examples share a row, so that hardly a token is padding.

An example of n tokens takes n - 1 places: its last token is only ever a target. A row carries segment ids (1, 2, … for
its examples, 0 for padding); `gemma.attention.packed_rows` keeps an example from seeing its neighbours. All batches
have one shape, so XLA compiles the training step once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_LOOK_AHEAD = 64  # examples among which those are sought that fill a row best


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of shape (rows, row_length).

    Invariants: `segment_ids` is 0 on padding; `targets[t]` is the next token of the same example;
    `weights` is 1 where that next token carries loss, and 0 elsewhere and on padding.
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
    """Puts examples into batches of `rows` × `row_length` tokens, filled as well as can be, in a shuffled order.

    Args:
        tokens: One int array an example, `<bos>` first.
        loss_masks: One bool array an example: True on tokens that are to be predicted.
        rows, row_length: The shape of every batch.
        seed: Integer to shuffle by, or None to keep the order.

    Returns:
        The batches. Each example stands in exactly one, whole but for its last token, which is a target.

    Raises:
        ValueError: If an example of n tokens needs more places than `row_length`: n - 1.

    Reference: Krell et al. 2021, "Efficient sequence packing without cross-contamination"
    (https://arxiv.org/abs/2107.02027), section 3, for the problem. What fills a row is found by a sum over subsets.
    """
    needed = [max(len(ids) - 1, 0) for ids in tokens]
    if (longest := max(needed, default=0)) > row_length:
        raise ValueError(
            f"`row_length` must be at least {longest}, for the longest example has {longest + 1} tokens, of which the "
            f"last is a target only. Received: {row_length}"
        )
    order = list(range(len(tokens)))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    filled: list[list[int]] = []
    while order:
        places = _fullest([needed[index] for index in order[:_LOOK_AHEAD]], row_length)
        filled.append([order[place] for place in places])
        for place in reversed(places):
            del order[place]
    groups = [filled[start : start + rows] for start in range(0, len(filled), rows)]
    return [_fill(group + [[]] * (rows - len(group)), tokens, loss_masks, row_length) for group in groups]


def _fullest(lengths: Sequence[int], room: int) -> list[int]:
    """The places of those lengths that together come nearest to `room`, in order; the first is always among them.

    The first one waits no longer, so that none waits for ever. Of choices that fill as much, early ones are taken.
    """
    room -= lengths[0]
    sums = [1]  # after k lengths: an integer whose bit n says that some of them add up to n
    for length in lengths[1:]:
        sums.append((sums[-1] | sums[-1] << length) & ((1 << room + 1) - 1))
    left, chosen = sums[-1].bit_length() - 1, []
    for place in range(len(lengths) - 1, 0, -1):
        if not sums[place - 1] >> left & 1:  # not to be had from earlier ones alone
            chosen.append(place)
            left -= lengths[place]
    return [0, *reversed(chosen)]


def _fill(current: list[list[int]], tokens, loss_masks, row_length: int) -> Batch:
    shape = (len(current), row_length)
    token_ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, members in enumerate(current):
        start = 0
        for number, index in enumerate(members, start=1):
            ids, mask = tokens[index], loss_masks[index]
            here = slice(start, start + len(ids[1:]))
            token_ids[row, here] = ids[:-1]
            segments[row, here] = number
            targets[row, here] = ids[1:]
            weights[row, here] = mask[1:]
            start = here.stop
    return Batch(token_ids, segments, targets, weights, sum(map(len, current)))
