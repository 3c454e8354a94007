"""How likely a model finds texts that are given: answers after their prompts, plain English."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS
from gemma_lora.data.encoding import encode
from gemma_lora.data.formats import Example
from gemma_lora.data.packing import Batch, pack
from gemma_lora.data.templates import Template, template_of
from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.attention import Attend, Keys, attention, in_window
from gemma_lora.gemma.forward import forward, packed_hidden
from gemma_lora.gemma.weights import Weights, collect
from gemma_lora.layers.loss import chunked_cross_entropy, token_scores

_ROWS = 4  # rows that are scored together: packed kernels are decoded once for all of them
_PIECE = 16  # rows of `answer_losses` have a multiple of so many tokens


# --- answers after prompts ---------------------------------------------------------------------------------


class AnswerLoss(NamedTuple):
    """An answer's -ln probability, its number of tokens, and whether greedy generation would write it."""

    loss: float
    tokens: int
    likeliest: bool


class _Item(NamedTuple):
    """A prompt and answers to it, as tokens."""

    prompt: np.ndarray
    answers: Sequence[np.ndarray]

    @property
    def length(self) -> int:
        """Places in a row: an answer's last token is only ever a target."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


def answer_losses(
    model: keras.Model, prompts: Sequence[np.ndarray], answers: Sequence[Sequence[np.ndarray]]
) -> list[list[AnswerLoss]]:
    """How likely each of several answers is after its prompt.

    A prompt stands once in a row, and its answers stand behind it. A token of an answer sees the prompt and the earlier
    tokens of its own answer, and has the position it would have directly behind the prompt. Several prompts share a
    row. All rows have one shape, so XLA compiles once.

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        prompts: Tokens of each prompt, at least one.
        answers: For each prompt, the tokens of its answers, at least one each.

    Returns:
        For each prompt, an `AnswerLoss` per answer.
    """
    items = [_Item(prompt, some) for prompt, some in zip(prompts, answers, strict=True)]
    if not items:
        return []
    filled, length = _filled([item.length for item in items])
    rows = _as_equal(len(filled), _ROWS)
    groups = [filled[start : start + rows] for start in range(0, len(filled), rows)]
    most = max(sum(len(a) for row in group for index in row for a in items[index].answers) for group in groups)
    architecture, weights = architecture_of(model.backbone), collect(model)
    found: dict[int, list[AnswerLoss]] = {}
    for group in groups:
        layout = _Layout(rows, length, most)
        for row, members in enumerate(group):
            layout.add(row, [(index, items[index]) for index in members])
        losses, likeliest = _branch_scores(architecture, weights, *layout.arrays())
        losses, likeliest = np.asarray(losses, np.float64), np.asarray(likeliest)
        for index, spans in layout.spans.items():
            found[index] = [AnswerLoss(losses[s].sum(), s.stop - s.start, bool(likeliest[s].all())) for s in spans]
    return [found[index] for index in range(len(items))]


def _filled(lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """Which items share a row, the longest first, each in the first row with room; and the length of all rows."""
    length = max(max(lengths), min(DEFAULTS.row_length, sum(lengths)))
    length = -(-length // _PIECE) * _PIECE
    rows: list[list[int]] = []
    room: list[int] = []
    for index in np.argsort([-needed for needed in lengths], kind="stable"):
        row = next((number for number, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(int(index))
        room[row] -= lengths[index]
    return rows, length


class _Layout:
    """A batch of rows that is being filled.

    Invariants: `segments` is 1, 2, … for a row's items and 0 on padding; `branches` is 0 on a prompt and 1, 2, … for
    its answers; `places` are those in the flattened rows whose next token is one of `targets`; `spans` says for each
    item which of them are which answer's.
    """

    def __init__(self, rows: int, length: int, most: int):
        self.token_ids, self.segments, self.branches, self.positions = np.zeros((4, rows, length), np.int32)
        self.places, self.targets = np.zeros((2, most), np.int32)
        self.spans: dict[int, list[slice]] = {}
        self._scored = 0

    def add(self, row: int, members: Sequence[tuple[int, _Item]]) -> None:
        start = 0
        for segment, (index, item) in enumerate(members, start=1):
            last = start + len(item.prompt) - 1
            end = self._put(row, start, item.prompt, segment, 0, 0)
            self.spans[index] = []
            for branch, answer in enumerate(item.answers, start=1):
                begin, end = end, self._put(row, end, answer[:-1], segment, branch, len(item.prompt))
                here = slice(self._scored, self._scored + len(answer))
                # The prompt's last token is followed by the first one of every answer.
                self.places[here] = row * self.token_ids.shape[1] + np.array([last, *range(begin, end)])
                self.targets[here] = answer
                self.spans[index].append(here)
                self._scored = here.stop
            start = end

    def _put(self, row: int, start: int, tokens: np.ndarray, segment: int, branch: int, position: int) -> int:
        here = slice(start, start + len(tokens))
        self.token_ids[row, here] = tokens
        self.segments[row, here], self.branches[row, here] = segment, branch
        self.positions[row, here] = position + np.arange(len(tokens))
        return here.stop

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.token_ids, self.segments, self.branches, self.positions, self.places, self.targets


@partial(jax.jit, static_argnames=("architecture",))
def _branch_scores(
    architecture: Architecture, weights: Weights, token_ids, segments, branches, positions, places, targets
):
    """Losses and whether they are the likeliest, of the targets at some places of a `_Layout`'s rows: (P,) each."""
    attend = _branching(architecture, segments, branches, positions)
    hidden = forward(architecture, weights, token_ids, positions, attend)
    hidden = hidden.reshape(-1, hidden.shape[-1])[places]  # (P, D)
    return token_scores(hidden, weights.head, targets, soft_cap=architecture.logit_soft_cap)


def _branching(architecture: Architecture, segments, branches, positions) -> Attend:
    """A token sees itself and the earlier ones of its item's prompt and of its own answer. Arrays are (B, T)."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)  # (B, T, T)
    same &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    distance = positions[:, :, None] - positions[:, None, :]

    def attend(number: int, q, k, v):
        seen = same & in_window(architecture.blocks[number], distance)
        keys = Keys(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))  # (B, kv_heads, T, H)
        return attention(architecture, q, [keys], seen)

    return attend


# --- whole rows, as in training ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """The result of `teacher_forced`: loss in nats a token, share of whole answers, and how many examples."""

    loss: float
    exact_match: float
    count: int


def teacher_forced(
    model: keras.Model, examples: Sequence[Example], template: Template | None, row_length: int = DEFAULTS.row_length
) -> TeacherForced:
    """Scores responses without generating: each of their tokens is predicted from the right tokens before it.

    An example counts as a match if every token of its response is the likeliest one. Greedy generation of a response
    goes wrong at its first wrong token, so that is the share of responses it would write to the letter, at the cost of
    one forward pass.

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        examples: Examples whose responses are the references.
        template: The text around a prompt and a response, as in training.
        row_length: Integer, tokens of a packed row; the longest example must fit.

    Returns:
        `TeacherForced`.
    """
    if not examples:
        raise GemmaLoraError("There are no examples to evaluate on.")
    encoded = encode(examples, model.preprocessor.tokenizer, template_of(model, template), row_length)
    alone = pack(encoded.tokens, encoded.loss_mask, 1, row_length)
    rows = _as_equal(len(alone), _ROWS)
    batches = [_stacked(alone[start : start + rows], rows) for start in range(0, len(alone), rows)]
    answers = [np.flatnonzero(weights) for _, _, _, weights in batches]
    most = max(map(len, answers))  # one shape, so that XLA compiles once
    architecture, weights = architecture_of(model.backbone), collect(model)
    losses, whole = [], []
    for (token_ids, segment_ids, targets, _), answer in zip(batches, answers, strict=True):
        places = np.pad(answer, (0, most - len(answer)))
        found = _scores_at(architecture, weights, token_ids, segment_ids, places, targets.flat[places])
        loss, right = (np.asarray(part)[: len(answer)] for part in found)
        losses.append(loss)
        example = segment_ids.flat[answer] + row_length * (answer // row_length)  # a number of its own in each row
        whole += [bool(right[example == number].all()) for number in np.unique(example)]
    return TeacherForced(float(np.concatenate(losses).mean()), sum(whole) / len(whole), len(whole))


@partial(jax.jit, static_argnames=("architecture",))
def _scores_at(architecture: Architecture, weights: Weights, token_ids, segment_ids, places, targets):
    """Losses and whether they are the likeliest, of the targets at some places of packed rows: (P,) each."""
    hidden = packed_hidden(architecture, weights, token_ids, segment_ids)
    hidden = hidden.reshape(-1, hidden.shape[-1])[places]  # (P, D)
    return token_scores(hidden, weights.head, targets, soft_cap=architecture.logit_soft_cap)


def _as_equal(count: int, most: int) -> int:
    """The size of groups of at most `most` that hold `count` things with as few empty places as can be."""
    return -(-count // -(-count // most))


def _stacked(batches: list[Batch], rows: int) -> list[np.ndarray]:
    """Token ids, segment ids, targets and weights of batches of one row, (rows, T), filled up with zeros."""
    fields = ("token_ids", "segment_ids", "targets", "weights")
    stacks = [np.concatenate([getattr(batch, field) for batch in batches]) for field in fields]
    return [np.pad(stack, ((0, rows - len(batches)), (0, 0))) for stack in stacks]


# --- plain text --------------------------------------------------------------------------------------------


def english_text() -> str:
    """About a thousand words of plain English prose, written for this project, on nothing in particular."""
    return (importlib.resources.files("gemma_lora.generation") / "english.txt").read_text(encoding="utf-8")


def perplexity(model: keras.Model, text: str, window: int = 256) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, in windows that each begin with `<bos>`.

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        text: The text.
        window: Integer, tokens that are predicted from one another; a last, shorter window counts too.

    Returns:
        The perplexity, at least 1.
    """
    tokenizer = model.preprocessor.tokenizer
    ids = np.asarray(tokenizer.tokenize(text), np.int32)
    if not len(ids):
        raise ValueError("`text` must hold at least one token.")
    rows = -(-len(ids) // window)
    targets = np.zeros((rows, window), np.int32)
    targets.flat[: len(ids)] = ids
    counted = (np.arange(rows * window) < len(ids)).astype(np.float32).reshape(rows, window)
    starts = np.full((rows, 1), tokenizer.token_to_id("<bos>"), np.int32)
    token_ids = np.concatenate([starts, targets[:, :-1]], axis=1)
    total = 0.0
    architecture, model_weights = architecture_of(model.backbone), collect(model)
    for row in range(rows):
        here = slice(row, row + 1)
        loss = _mean_loss(architecture, model_weights, token_ids[here], targets[here], counted[here])
        total += float(loss) * float(counted[row].sum())
    return math.exp(total / len(ids))


@partial(jax.jit, static_argnames=("architecture",))
def _mean_loss(architecture: Architecture, weights: Weights, token_ids, targets, counted):
    """Mean loss of the tokens that count, in rows of one text each."""
    hidden = packed_hidden(architecture, weights, token_ids, counted > 0)
    return chunked_cross_entropy(hidden, weights.head, targets, counted, soft_cap=architecture.logit_soft_cap)
