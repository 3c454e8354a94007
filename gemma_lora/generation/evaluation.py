"""How good are the answers: exact match, generated or teacher-forced, a score a field, perplexity on unrelated text."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS
from gemma_lora.data.encoding import encode
from gemma_lora.data.formats import Example
from gemma_lora.data.packing import Batch, pack
from gemma_lora.data.templates import Template, template_of
from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.forward import packed_hidden
from gemma_lora.gemma.weights import Weights, collect
from gemma_lora.generation.engine import generate
from gemma_lora.layers.loss import chunked_cross_entropy, token_scores


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object a text consists of, or None if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_match(answer: str, reference: str) -> bool:
    """Whether an answer equals its reference: as JSON objects where the reference is one, else as text."""
    expected = parse_object(reference)
    return answer.strip() == reference.strip() if expected is None else parse_object(answer) == expected


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that equal their reference, 0 to 1.

    Args:
        answers: Generated texts.
        references: The right ones. A JSON object is compared field by field, order and white space aside.

    Raises:
        ValueError: If the lengths differ or are 0.

    Example:

    >>> exact_match(['{"a": 1,  "b": 2}', "x"], ['{"b": 2, "a": 1}', "y"])
    0.5
    """
    if len(answers) != len(references) or not len(answers):
        raise ValueError(
            f"`answers` and `references` must be equally many, and some. Received: {len(answers)}, {len(references)}"
        )
    return sum(map(is_match, answers, references)) / len(answers)


def field_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """For each field of the reference objects, the share of answers that have it right.

    Returns:
        `{field: share}` in the references' order; empty where the references are not objects.
    """
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    for answer, reference in zip(answers, references, strict=True):
        given = parse_object(answer) or {}
        for field, value in (parse_object(reference) or {}).items():
            total[field] = total.get(field, 0) + 1
            right[field] = right.get(field, 0) + (field in given and given[field] == value)
    return {field: right[field] / total[field] for field in total}


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result of `evaluate`. Shares are between 0 and 1."""

    exact_match: float
    fields: dict[str, float]
    valid_json: float | None  # None where the references are not JSON objects
    count: int
    answers: list[str] = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the answers."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "answers"}


def evaluate(
    model: keras.Model,
    examples: Sequence[Example],
    template: Template | None = None,
    max_new_tokens: int = 128,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
) -> Scores:
    """Answers every example greedily, a chat with all turns before its last answer, and scores the answers.

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        examples: Examples whose responses are the references.
        template: The text around a prompt; see `generate`.
        max_new_tokens, batch_size, on_progress, mixed_precision: See `generate`.

    Returns:
        `Scores`.
    """
    if not examples:
        raise GemmaLoraError("There are no examples to evaluate on.")
    answers = generate(model, list(examples), template, max_new_tokens, batch_size, on_progress, mixed_precision)
    return score(answers, [example.response for example in examples])


def score(answers: Sequence[str], references: Sequence[str]) -> Scores:
    """The `Scores` of answers that are there already.

    Args:
        answers: Generated texts.
        references: The right ones, as many.
    """
    objects = [reference for reference in references if parse_object(reference) is not None]
    parsed = [parse_object(answer) is not None for answer in answers]
    return Scores(
        exact_match=exact_match(answers, references),
        fields=field_scores(answers, references),
        valid_json=sum(parsed) / len(parsed) if len(objects) == len(references) else None,
        count=len(answers),
        answers=list(answers),
    )


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


@partial(jax.jit, static_argnames=("architecture",))
def _mean_loss(architecture: Architecture, weights: Weights, token_ids, targets, counted):
    """Mean loss of the tokens that count, in rows of one text each."""
    hidden = packed_hidden(architecture, weights, token_ids, counted > 0)
    return chunked_cross_entropy(hidden, weights.head, targets, counted, soft_cap=architecture.logit_soft_cap)


_ROWS = 4  # rows that are scored together: packed kernels are decoded once for all of them


def _as_equal(count: int, most: int) -> int:
    """The size of groups of at most `most` that hold `count` things with as few empty places as can be."""
    return -(-count // -(-count // most))


def _stacked(batches: list[Batch], rows: int) -> list[np.ndarray]:
    """Token ids, segment ids, targets and weights of batches of one row, (rows, T), filled up with zeros."""
    fields = ("token_ids", "segment_ids", "targets", "weights")
    stacks = [np.concatenate([getattr(batch, field) for batch in batches]) for field in fields]
    return [np.pad(stack, ((0, rows - len(batches)), (0, 0))) for stack in stacks]


def few_shot_template(template: Template, examples: Sequence[Example]) -> Template:
    """A template that shows worked examples before the question: a fair chance for a model that was not tuned.

    Args:
        template: The task's template.
        examples: The examples to show, in this order.

    Returns:
        A `Template` whose answers also end at a line's end.
    """
    shown = []
    for example in examples:
        prompt = template.prompt.replace("{prompt}", example.prompt)
        response = template.response.replace("{response}", example.response)
        for token in template.stop:
            response = response.replace(token, "")
        shown.append(f"{prompt}{response}\n")
    return dataclasses.replace(template, prompt="".join(shown) + template.prompt, stop=(*template.stop, "\n"))


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
