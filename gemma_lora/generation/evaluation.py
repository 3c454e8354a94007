"""How good a model's answers are: it answers examples, and the answers are scored by what suits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS, LEAST_NEW_TOKENS, MOST_NEW_TOKENS, check
from gemma_lora.data.encoding import encode, encode_prompt
from gemma_lora.data.formats import Example, Prompt
from gemma_lora.data.templates import Template, template_of
from gemma_lora.generation.engine import generate_tokens
from gemma_lora.generation.likelihood import AnswerLoss, answer_losses
from gemma_lora.generation.likelihood import TeacherForced as TeacherForced
from gemma_lora.generation.likelihood import english_text as english_text
from gemma_lora.generation.likelihood import perplexity as perplexity
from gemma_lora.generation.likelihood import teacher_forced as teacher_forced
from gemma_lora.generation.matching import exact_match as exact_match
from gemma_lora.generation.matching import field_scores as field_scores
from gemma_lora.generation.matching import is_match as is_match
from gemma_lora.generation.matching import parse_object as parse_object
from gemma_lora.generation.metrics import Scores as Scores
from gemma_lora.generation.metrics import loss_scores, metric_of
from gemma_lora.generation.metrics import score as score
from gemma_lora.generation.stops import Stops
from gemma_lora.generation.worked_examples import before, separator_of
from gemma_lora.generation.worked_examples import few_shot_template as few_shot_template

_ANY_LENGTH = 1 << 30


def evaluate(
    model: keras.Model,
    examples: Sequence[Example],
    template: Template | None = None,
    max_new_tokens: int | None = DEFAULTS.max_new_tokens,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
    metric: str | None = DEFAULTS.metric,
    shots: Sequence[Example] = (),
) -> Scores:
    """Answers every example greedily, a chat with all turns before its last answer, and scores the answers.

    | metric | scores, each with a 95 % interval |
    |---|---|
    | `exact` | exact match |
    | `json` | exact match, valid JSON, each field's share |
    | `classification` | accuracy, macro F1; precision, recall, F1 per class and the confusion matrix |
    | `text` | chrF by sacrebleu, exact match |
    | `loss` | the right answers' mean loss in nats per token; nothing is generated |

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        examples: Examples whose responses are the references.
        template: The text around a prompt; see `generate`.
        max_new_tokens: Integer, the most tokens of an answer; by default what the longest reference needs. `cut` in
            the result counts the answers that were not done then.
        batch_size, on_progress, mixed_precision: See `generate`.
        metric: One of the above; by default the one that suits the references, see `choose_metric`.
        shots: Worked examples to show before each prompt, for a model that was not tuned. Not with `loss`.

    Returns:
        `Scores`.

    Raises:
        GemmaLoraError: If there are no examples, or the metric does not suit them or needs a package that is missing.
        ValueError: If an argument is not as above.

    Example:

    >>> evaluate(model, dataset.tests["test"]).scores["accuracy"]    # doctest: +SKIP
    Estimate(value=0.917, low=0.85, high=0.983)
    """
    if not examples:
        raise GemmaLoraError("There are no examples to evaluate on.")
    references = [example.response for example in examples]
    chosen = metric_of(metric, references)  # what cannot be computed is said before the slow work
    if chosen == "loss":
        found = reference_losses(model, examples, template)
        if on_progress is not None:
            on_progress(len(examples), len(examples))
        return loss_scores([(line.loss, line.tokens) for line in found], [line.likeliest for line in found])
    if max_new_tokens is None:
        max_new_tokens = tokens_needed(examples, model.preprocessor.tokenizer, template_of(model, template))
    given = answer(
        model, list(examples), template, max_new_tokens, batch_size, on_progress, mixed_precision, shots=shots
    )
    return score(given.texts, references, chosen, given.cut)


class Answers(NamedTuple):
    """Answers in the prompts' order, and for each whether it was not done when `max_new_tokens` were made."""

    texts: list[str]
    cut: list[bool]


def answer(
    model: keras.Model,
    prompts: Sequence[Prompt],
    template: Template | None = None,
    max_new_tokens: int = MOST_NEW_TOKENS,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
    shots: Sequence[Example] = (),
    separator: str | None = None,
) -> Answers:
    """Answers prompts as `generate` does, says which answers were cut off, and may show worked examples first.

    Args:
        model, max_new_tokens, batch_size, on_progress, mixed_precision: See `generate`.
        prompts: A list of what `generate` takes.
        template: The text around a prompt; see `generate`.
        shots: Worked examples; a chat is shown with all its turns.
        separator: Text that ends an answer, and stands between worked examples; by default none, or where examples are
            shown the plainest that occurs in none of their answers, see `separator_of`.
    """
    check(max_new_tokens=max_new_tokens, batch_size=batch_size)
    template, tokenizer = template_of(model, template), model.preprocessor.tokenizer
    ends = Stops.of(tokenizer, template)
    stops = set(ends.ids)
    between = "\n"
    if shots and not separator:
        separator = separator_of([shot.response for shot in shots], template)
    if separator:
        # Where a control token ends an answer, turns follow each other as in a chat.
        between = "\n" if template.response.endswith(_turn_ends(template)) else separator
        ids = list(map(int, np.reshape(tokenizer.tokenize(separator), -1)))
        stops |= set(ids if len(ids) == 1 and separator not in template.response else ())
    asked = [np.asarray(encode_prompt(p, tokenizer, template, shots, between), np.int32) for p in prompts]
    said = (lambda tokens: ends.are_in(tokenizer, tokens)) if ends.texts else None
    rows = generate_tokens(
        model, asked, sorted(stops), max_new_tokens, batch_size, on_progress, mixed_precision, ended=said
    )
    texts, cut = [], []
    for row in rows:
        text = tokenizer.detokenize([int(i) for i in row]) if len(row) else ""
        end = ends.end_of(text)
        text, ended = before(separator, text[:end]) if separator else (text[:end], False)
        ended |= end is not None
        texts.append(text.strip())
        cut.append(len(row) >= max_new_tokens and not ended)
    return Answers(texts, cut)


def _turn_ends(template: Template) -> tuple[str, ...]:
    return tuple(token for token in template.stop if token != "<eos>")


def tokens_needed(
    examples: Sequence[Example], tokenizer, template: Template, learned: Sequence[np.ndarray] = ()
) -> int:
    """What `max_new_tokens` must be for these examples' answers: a quarter more than the longest one, at least 16.

    Args:
        examples: Examples; of a chat, the last answer counts.
        tokenizer, template: As in `encode`.
        learned: Loss masks of training lines, whose last answers count too.
    """
    lengths = [len(tokens) for tokens in response_tokens(examples, tokenizer, template)]
    lengths += [int(np.argmin([*mask[::-1], False])) for mask in learned]  # of a chat, the mask's last stretch
    longest = max(lengths, default=0)
    return max(LEAST_NEW_TOKENS, longest + longest // 4 + 1)


def response_tokens(examples: Sequence[Example], tokenizer, template: Template) -> list[np.ndarray]:
    """The tokens of each example's last answer, with the one that ends it if the template has one."""
    alone = [Example("", example.response, example.file, example.line) for example in examples]
    if not alone:
        return []
    encoded = encode(alone, tokenizer, template, _ANY_LENGTH)
    return [ids[mask] for ids, mask in zip(encoded.tokens, encoded.loss_mask, strict=True)]


def reference_losses(
    model: keras.Model, examples: Sequence[Example], template: Template | None = None
) -> list[AnswerLoss]:
    """How likely the model finds each example's right answer, of a chat the last one; see `answer_losses`."""
    template, tokenizer = template_of(model, template), model.preprocessor.tokenizer
    asked = [np.asarray(encode_prompt(example, tokenizer, template), np.int32) for example in examples]
    answers = [[tokens] for tokens in response_tokens(examples, tokenizer, template)]
    return [line for (line,) in answer_losses(model, asked, answers)]
