"""Classes as probabilities: how likely each label is as the answer, instead of an answer that may be none of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data.encoding import encode, encode_prompt
from gemma_lora.data.formats import Example, Prompt, as_prompts
from gemma_lora.data.templates import Template, template_of
from gemma_lora.generation.likelihood import answer_losses

_LABEL_TOKENS = 1024  # tokens of labels that stand behind one prompt; more labels are scored in several passes
_ANY_LENGTH = 1 << 30


def classify(
    model: keras.Model, prompts: Prompt | Sequence[Prompt], labels: Sequence[str], template: Template | None = None
) -> np.ndarray:
    """How likely each label is as the answer to each prompt.

    P(label) is the softmax over the labels of ln p(label, stop | prompt), the sum over the label's tokens and the
    token that ends the answer. So "in" and "in transit" are told apart. Nothing is divided by a label's length: the
    sum is the probability that the model answers just this, which is what training raised.

    Each prompt is computed once for all labels, and all rows have one shape: XLA compiles once.

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        prompts: One or a list of: text; an `Example`, of which everything before the last answer is taken; a chat.
        labels: The classes, at least two, as they stand in the training lines' answers.
        template: The text around a prompt; defaults to the adapter's, else the weights' own.

    Returns:
        (prompts, labels) float32; rows sum to 1.

    Raises:
        ValueError: If labels are fewer than two, empty, not text or named twice, or a chat is not as in `generate`.

    Example:

    >>> classify(model, ["Where is my parcel?"], ["billing", "shipping"]).round(2)    # doctest: +SKIP
    array([[0.02, 0.98]], dtype=float32)
    """
    labels = _checked(labels)
    tokenizer, template = model.preprocessor.tokenizer, template_of(model, template)
    asked = [np.asarray(encode_prompt(prompt, tokenizer, template), np.int32) for prompt in as_prompts(prompts)]
    answers = _as_answers(labels, tokenizer, template)
    passes = []
    for group in _groups(answers):
        found = answer_losses(model, asked, [group] * len(asked))
        passes.append(np.array([[-answer.loss for answer in row] for row in found]).reshape(len(asked), len(group)))
    logits = np.concatenate(passes, axis=1)  # (N, L), float64
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def _checked(labels: Sequence[str]) -> list[str]:
    given = [labels] if isinstance(labels, str) else list(labels)
    if len(given) < 2 or not all(isinstance(label, str) and label.strip() for label in given):
        raise ValueError(f"`labels` must be at least two texts that are not empty. Received: {given!r}")
    if twice := sorted({label for label in given if given.count(label) > 1}):
        raise ValueError(f"`labels` must differ. Received twice: {', '.join(map(repr, twice))}")
    return given


def _as_answers(labels: Sequence[str], tokenizer, template: Template) -> list[np.ndarray]:
    """The tokens of each label as an answer, and the one that ends it, which a template need not have."""
    if not template.response.endswith(template.stop):
        template = dataclasses.replace(template, response=template.response + template.stop[0])
    encoded = encode([Example("", label) for label in labels], tokenizer, template, _ANY_LENGTH)
    return [ids[mask] for ids, mask in zip(encoded.tokens, encoded.loss_mask, strict=True)]


def _groups(answers: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The answers in order, in groups that are short enough to stand behind one prompt."""
    groups: list[list[np.ndarray]] = [[]]
    room = _LABEL_TOKENS
    for answer in answers:
        if groups[-1] and room < len(answer):
            groups.append([])
            room = _LABEL_TOKENS
        groups[-1].append(answer)
        room -= len(answer)
    return groups
