"""`generate`: answers of a Gemma, with or without an adapter, in batches; and an answer's text as it grows.

KerasHub's `generate` compiles anew for every input shape. Here all batches of a call share one shape, so XLA compiles
two programs (`decoding.py`). The prompts of a batch are read together, some tokens of every row at a time; then each
row goes on at its own position, where its prompt ends. What all prompts begin with (a few-shot prompt's examples) is
computed and kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS, MOST_NEW_TOKENS, Answering
from gemma_lora.data.encoding import encode_prompt
from gemma_lora.data.formats import Prompt, as_prompts
from gemma_lora.data.templates import Template, template_of
from gemma_lora.generation.decoding import PIECE, STEPS, Engine, Rows
from gemma_lora.generation.sampling import sampling_of
from gemma_lora.generation.stops import Stops, streamed
from gemma_lora.lora.named import adapter_names, adapter_used

_MIN_PREFIX = 32  # a shared beginning shorter than this is not worth its own pass
_STEPS_ALONE = 4  # new tokens of a single prompt made at a time: few, so that a reader need not wait

#: How tokens are chosen where nothing else is asked for: the likeliest.
GREEDY = Answering()


@overload
def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    template: Template | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
    *,
    temperature: float | None = GREEDY.temperature,
    top_k: int | None = GREEDY.top_k,
    top_p: float | None = GREEDY.top_p,
    seed: int = GREEDY.seed,
    stop: str | Sequence[str] = (),
    adapters: Sequence[str | None] | None = None,
    stream: Literal[False] = False,
) -> list[str]:
    """All answers, in a list."""


@overload
def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    template: Template | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
    *,
    temperature: float | None = GREEDY.temperature,
    top_k: int | None = GREEDY.top_k,
    top_p: float | None = GREEDY.top_p,
    seed: int = GREEDY.seed,
    stop: str | Sequence[str] = (),
    adapters: Sequence[str | None] | None = None,
    stream: Literal[True],
) -> Iterator[str]:
    """One answer, as it is made."""


def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    template: Template | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
    *,
    temperature: float | None = GREEDY.temperature,
    top_k: int | None = GREEDY.top_k,
    top_p: float | None = GREEDY.top_p,
    seed: int = GREEDY.seed,
    stop: str | Sequence[str] = (),
    adapters: Sequence[str | None] | None = None,
    stream: bool = False,
) -> list[str] | Iterator[str]:
    """Answers prompts: greedily, or by drawing tokens.

    Args:
        model: A KerasHub Gemma `CausalLM`, with an adapter or without.
        prompts: One or a list of: text as a user writes it (without the template's text); an `Example`, or a chat as
            a list of `{"role", "content"}`, whose last turn is the user's.
        template: A `Template`; defaults to the adapter's, else the one the weights were made with.
        max_new_tokens: Integer, the most tokens of an answer; by default what the adapter's training lines needed, if
            the model says so, else 128.
        batch_size: Integer, prompts answered together.
        on_progress: Called with (answered, all) after each batch.
        mixed_precision: Boolean; rounds the factors of large products of a float32 model to bfloat16, packed
            layers' excepted. Faster where the CPU multiplies bfloat16 faster; an answer here and there is another.
        temperature: Float; 0 or None takes the likeliest token each time. Above, a token is drawn from
            softmax(logits / temperature): below 1 likely ones more often than the model finds them, above 1 less.
        top_k: Integer; draws from the k likeliest tokens only.
        top_p: Float up to 1; draws from the likeliest tokens only, as few as have this probability together. With
            `top_k`, of the probability that is left.
        seed: Integer; the same seed draws the same answer to the n-th prompt, whatever batch it is in.
        stop: Text or several: an answer ends before the first of them. So it does at the template's `stop`.
        adapters: For each prompt the name of the adapter that answers it, or None for the base model alone; see
            `use_adapter`. Prompts of one adapter are answered together, one adapter after the other, each with its own
            template: every prompt gets what it gets alone. By default what is in use answers all.
        stream: Boolean; gives the answer to one prompt in pieces, as it is made.

    Returns:
        The answers, in the prompts' order, without what ended them, stripped of outer white space. With `stream` an
        iterator of pieces of text, which joined are the answer.

    Raises:
        ValueError: If an argument is not as above, or `stream` is asked for with several prompts.
        GemmaLoraError: If `adapters` names one that the model does not have.

    Example:

    >>> generate(load_gemma(), "The capital of France is", max_new_tokens=3)               # doctest: +SKIP
    ['the capital of']
    >>> for piece in generate(model, "Tell me a story.", temperature=0.8, stream=True):    # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    """
    most = most_new_tokens(model, max_new_tokens)
    if most < 1 or batch_size < 1:
        raise ValueError(
            "`max_new_tokens` and `batch_size` must be at least 1. "
            f"Received: max_new_tokens={max_new_tokens}, batch_size={batch_size}"
        )
    answering = Answering(temperature or 0.0, top_k, top_p, seed)
    asked = as_prompts(prompts)
    groups = None if adapters is None else _by_adapter(model, asked, adapters)
    if stream:
        if groups is not None:
            raise ValueError("`stream` goes with what is in use. Call `use_adapter` instead of giving `adapters`.")
        tokenizer, stops, encoded = _encoded(model, asked, template, stop)
        if len(encoded) != 1:
            raise ValueError(f"`stream` takes one prompt. Ask several one after the other. Received: {len(encoded)}")
        return streamed(_one(model, encoded[0], stops.ids, most, mixed_precision, answering), tokenizer, stops)

    def answered(numbers: Sequence[int], done: int) -> list[str]:
        """Answers to some of the prompts, by what is in use."""
        tokenizer, stops, encoded = _encoded(model, [asked[number] for number in numbers], template, stop)
        ended = (lambda tokens: stops.are_in(tokenizer, tokens)) if stops.texts else None
        told = None if on_progress is None else lambda now, _: on_progress(done + now, len(asked))
        how = (mixed_precision, answering, ended, numbers)
        rows = generate_tokens(model, encoded, stops.ids, most, batch_size, told, *how)
        return [stops.answer(tokenizer, row) for row in rows]

    if groups is None:
        return answered(range(len(asked)), 0)
    answers, done = [""] * len(asked), 0
    for which, numbers in groups.items():
        with adapter_used(model, which):
            for number, answer in zip(numbers, answered(numbers, done), strict=True):
                answers[number] = answer
        done += len(numbers)
    return answers


def _encoded(model: Any, asked: Sequence[Any], template: Template | None, stop: str | Sequence[str]):
    """The tokenizer, what ends an answer, and each prompt's tokens with its template's text."""
    template = template_of(model, template)
    tokenizer = model.preprocessor.tokenizer
    encoded = [np.asarray(encode_prompt(prompt, tokenizer, template), np.int32) for prompt in asked]
    return tokenizer, Stops.of(tokenizer, template, stop), encoded


def _by_adapter(model: Any, asked: Sequence[Any], adapters: Sequence[str | None]) -> dict[str | None, list[int]]:
    """The prompts' numbers for each adapter, in the order in which the adapters occur first."""
    if isinstance(adapters, str) or len(adapters) != len(asked):
        count = f"{adapters!r}" if isinstance(adapters, str) else f"{len(adapters)} for {len(asked)} prompts"
        raise ValueError(f"`adapters` must name one adapter, or None, for each prompt. Received: {count}")
    there = adapter_names(model)
    groups: dict[str | None, list[int]] = {}
    for number, name in enumerate(adapters):
        if name is not None and name not in there:
            raise GemmaLoraError(f"There is no adapter {name!r}. There are {', '.join(there) or 'none with names'}.")
        groups.setdefault(name, []).append(number)
    return groups


def most_new_tokens(model: Any, max_new_tokens: int | None) -> int:
    """The most tokens of an answer: the given number, else what the model's adapter says, else 128."""
    if max_new_tokens is not None:
        return max_new_tokens
    return getattr(model, "gemma_lora_max_new_tokens", None) or MOST_NEW_TOKENS


def generate_tokens(
    model: keras.Model,
    prompts: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = DEFAULTS.batch_size,
    on_progress: Callable[[int, int], None] | None = None,
    mixed_precision: bool | None = DEFAULTS.mixed_precision,
    answering: Answering = GREEDY,
    ended: Callable[[np.ndarray], bool] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Continuations of token sequences; see `generate`.

    Args:
        answering: How tokens are chosen.
        ended: Told a row's new tokens so far, says whether they are enough; asked after every few tokens.
        numbers: The prompts' numbers, by which answers are drawn; by default 0, 1, …

    Returns:
        One int32 array a prompt: the new tokens before the first stop token.
    """
    if not prompts:
        return []
    prefix = _shared_prefix(prompts) if len(prompts) > 1 else 0
    length = _places(max(len(p) for p in prompts) - prefix)  # one for all batches: one program
    engine = Engine.of(model, mixed_precision)
    shared = engine.shared_keys(prompts[0][:prefix])
    order = np.argsort([len(p) for p in prompts], kind="stable")
    batch_size = min(batch_size, len(prompts))
    answers = [np.zeros(0, np.int32)] * len(prompts)
    named = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first prompt: one compiled shape serves all.
        filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])
        rows = engine.read([prompts[i] for i in filled], length, shared, max_new_tokens)
        made = np.zeros((batch_size, 0), np.int32)
        for new in continued(engine, rows, stop_ids, max_new_tokens, answering, named[filled]):
            made = np.concatenate([made, new], axis=1)
            if ended is not None:
                rows.done |= [ended(_until_stop(row, stop_ids)) for row in made]
        for index, row in zip(chosen, made, strict=False):
            answers[index] = _until_stop(row, stop_ids)
        if on_progress is not None:
            on_progress(min(start + batch_size, len(order)), len(order))
    return answers


def continued(
    engine: Engine,
    rows: Rows,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    answering: Answering = GREEDY,
    numbers: Sequence[int] | np.ndarray = (0,),
) -> Iterator[np.ndarray]:
    """New tokens of rows that have been read, a few at a time: (B, n) int32, filled up with a stop token.

    It ends where all rows are done; the caller may set more of `rows.done`.

    Args:
        numbers: (B,) integers, each row's number among all prompts; see `sampling_of`.
    """
    sampling, stops = sampling_of(answering, numbers), jnp.asarray(stop_ids, jnp.int32)
    while rows.made < max_new_tokens and not rows.done.all():
        # After a short piece there must be room for a whole one, which is what the program writes.
        short = len(rows.last) == 1 and rows.made + _STEPS_ALONE + STEPS <= rows.room
        most = min(_STEPS_ALONE if short else STEPS, max_new_tokens - rows.made)
        yield engine.advance(rows, stops, most, sampling)


def before_stop(pieces: Iterator[np.ndarray], stop_ids: Sequence[int]) -> Iterator[np.ndarray]:
    """A single row's new tokens (n,), of pieces (1, n), up to the first stop token."""
    return (_until_stop(piece[0], stop_ids) for piece in pieces)


def _one(model, prompt: np.ndarray, stop_ids, most: int, mixed_precision, answering: Answering) -> Iterator[np.ndarray]:
    """A single prompt's new tokens as they are made, by the programs of `generate_tokens`."""
    engine = Engine.of(model, mixed_precision)
    rows = engine.read([prompt], _places(len(prompt)), engine.shared_keys(prompt[:0]), most)
    yield from before_stop(continued(engine, rows, stop_ids, most, answering), stop_ids)


def _places(tokens: int) -> int:
    return -(-tokens // PIECE) * PIECE


def _shared_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Number of tokens all prompts begin with, leaving each at least one of its own; 0 if too few."""
    shortest = min(len(p) for p in prompts)
    stacked = np.stack([p[:shortest] for p in prompts])
    equal = (stacked == stacked[0]).all(axis=0)
    length = int(np.argmin(equal)) if not equal.all() else shortest
    length = min(length, shortest - 1)
    return length if length >= _MIN_PREFIX else 0


def _until_stop(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, stop_ids))
    return row[: ends[0]] if len(ends) else row
