"""Examples and prompts as tokens, and the mask that says which tokens carry loss."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.formats import BadLines, Example, Prompt, summary, turns_before_answer
from gemma_lora.data.templates import CONTROL_TOKENS, Template


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids and loss masks, one array an example.

    Invariants: `tokens` are int32 and begin with `<bos>`; `loss_mask` is as long and True on the tokens to be
    predicted, never on `<bos>`; `skipped` counts by file the examples that were too long.
    """

    tokens: list[np.ndarray]
    loss_mask: list[np.ndarray]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def skipped_summary(self) -> str:
        """One line about what was left out; empty if nothing was."""
        return summary(self.skipped)


class _Part(NamedTuple):
    """A control token of the template, or plain text; `loss` if the model is to write it."""

    text: str
    control: bool
    loss: bool


def _required(template: Template | None) -> Template:
    if template is None:
        raise ValueError(
            "`template` must be a Template. Received: None. Where a dataset names none, `template_of(model)` of "
            "gemma_lora.data gives the model's own."
        )
    return template


def parts_of(example: Example, template: Template | None) -> list[_Part]:
    """An example as the template's control tokens and the plain text between them."""
    return _turn_parts(
        example.turns or (("user", example.prompt), ("model", example.response)), template, example.learn
    )


def _turn_parts(turns: Iterable[tuple[str, str]], template: Template | None, learn: Sequence[bool] = ()) -> list[_Part]:
    parts: list[_Part] = []
    for number, (role, text) in enumerate(turns):
        name = "prompt" if role == "user" else "response"
        literal = getattr(_required(template), name)
        if number and role == "user":  # Gemma puts a line's end between turns; <bos> is the first turn's alone
            literal = "\n" + literal.removeprefix("<bos>")
        parts += _pieces(literal, "{" + name + "}", text, learn[number] if learn else role == "model")
    return parts


_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


def _pieces(literal: str, slot: str, text: str, loss: bool) -> list[_Part]:
    """Cuts a template's text at control tokens; a user's text is never cut, so it cannot bring one in.

    The literal text around the user's is joined to it: the tokenizer sees `Expense: 12 lug` as a whole.
    """
    # Splitting on one group gives plain text at even places and control tokens at odd ones.
    left, right = (_CONTROL.split(side) for side in literal.split(slot))
    joined = [*left[:-1], left[-1] + text + right[0], *right[1:]]
    parts = [_Part(piece, place % 2 == 1, loss) for place, piece in enumerate(joined)]
    return [part for part in parts if part.text]


# Names that some tokenizer turns into one token wherever it meets them, and that mean something to the model. In plain
# text they are broken after their first sign, so that what a user writes cannot end a turn or begin one. Pieces of
# ordinary text stay whole: runs of spaces and of lines, HTML tags.
_NAMES = [*CONTROL_TOKENS, "<pad>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "[multimodal]"]
_NAMES += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
_BREAK = re.compile(
    "|".join(["(?<=<)(?=unused[0-9]+>)", *(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in _NAMES)])
)


def _tokenize(texts: Iterable[str], tokenizer) -> dict[str, list[int]]:
    """Token ids of plain texts, each text tokenized once, all in one call if the tokenizer takes lists."""
    broken = {text: _BREAK.split(text) for text in texts}
    pieces = list(dict.fromkeys(piece for split in broken.values() for piece in split))
    if _takes_lists(tokenizer):
        rows = tokenizer.tokenize(pieces)
        rows = rows.to_list() if hasattr(rows, "to_list") else rows
    else:
        rows = [tokenizer.tokenize(piece) for piece in pieces]
    lists = [np.asarray(row, np.int32).reshape(-1).tolist() for row in rows]
    ids = dict(zip(pieces, lists, strict=True))
    return {text: [i for piece in split for i in ids[piece]] for text, split in broken.items()}


def _takes_lists(tokenizer) -> bool:
    """Whether `tokenize` gives one row of ids a text; tried out, as tokenizers differ."""
    probe = ["a b", "a"]
    try:
        rows = tokenizer.tokenize(probe)
        rows = rows.to_list() if hasattr(rows, "to_list") else rows
        return len(rows) == 2 and all(
            np.array_equal(row, tokenizer.tokenize(text)) for row, text in zip(rows, probe, strict=True)
        )
    except Exception:  # whatever a tokenizer of single texts does with a list
        return False


def encode_parts(examples: Sequence[list[_Part]], tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (int32, `<bos>` first) and loss mask (bool) of each example's parts."""
    plain = _tokenize((part.text for parts in examples for part in parts if not part.control), tokenizer)
    control = {token: [int(tokenizer.token_to_id(token))] for token in CONTROL_TOKENS}
    encoded = []
    for parts in examples:
        ids, mask = list(control["<bos>"]), [False]
        if parts and parts[0].control and parts[0].text == "<bos>":
            parts = parts[1:]  # a template may write it out; one is enough
        for part in parts:
            new = (control if part.control else plain)[part.text]
            ids += new
            mask += [part.loss] * len(new)
        encoded.append((np.asarray(ids, np.int32), np.asarray(mask, bool)))
    return encoded


def encode(
    examples: Sequence[Example],
    tokenizer,
    template: Template | None,
    max_length: int = 512,
    skip_bad_lines: bool = False,
) -> Encoded:
    """Turns examples into tokens and loss masks.

    Prompt and response are tokenized apart, so that generation sees the very tokens training saw. Loss is on
    the response and on the token that ends it; in a chat, on every turn of the model that is learned.

    Args:
        examples: The examples.
        tokenizer: KerasHub's Gemma tokenizer, or anything with `tokenize(text)` and `token_to_id(token)`.
        template: The text around a prompt; in a chat of several turns, around each pair of turns.
        max_length: Integer, the most tokens of an example. A longer one is bad: nothing is cut off.
        skip_bad_lines: Leave too long examples out, and count them in `skipped`, instead of raising.

    Returns:
        An `Encoded`.

    Raises:
        GemmaLoraError: If examples are too long; it names file and line.
    """
    bad = BadLines(skip_bad_lines)
    tokens, masks = [], []
    rows = encode_parts([parts_of(example, template) for example in examples], tokenizer)
    for example, (ids, mask) in zip(examples, rows, strict=True):
        if len(ids) > max_length:
            bad.add(example.file or "example", example.line, _too_long(mask, max_length))
            continue
        tokens.append(ids)
        masks.append(mask)
    bad.finish()
    if not tokens:
        raise GemmaLoraError(f"No example is left to train on. {summary(bad.files)}".rstrip())
    return Encoded(tokens, masks, bad.files)


def _too_long(mask: np.ndarray, max_length: int) -> str:
    prompt = int(mask.argmax()) if mask.any() else len(mask)
    fits = prompt < max_length
    what = "prompt and answer are too long" if fits else "the prompt leaves no room for the answer"
    return f"{what}: {len(mask)} tokens ({prompt} before the answer), max_length is {max_length}"


def encode_prompt(
    prompt: Prompt, tokenizer, template: Template | None, shots: Sequence[Example] = (), between: str = "\n"
) -> np.ndarray:
    """The tokens a model sees before it answers, exactly those of training: (T,) int32.

    Args:
        prompt: Text; an `Example`, of which everything before the last answer is taken; or a chat, as a list of
            `{"role", "content"}` whose last turn is the user's.
        tokenizer: As in `encode`.
        template: The text around a prompt, and in a chat around each turn.
        shots: Worked examples, shown first, for a model that was not tuned. `<eos>` after their answers is left out.
        between: Text between worked examples, and between the last one and the prompt.

    Raises:
        ValueError: If a chat is not as above; it says why.
    """
    parts: list[_Part] = []
    for shot in shots:
        shown = [part for part in parts_of(shot, template) if part[:2] != ("<eos>", True)]
        parts += [*_behind(parts, shown), _Part(between, False, False)]
    parts += _behind(parts, _turn_parts(turns_before_answer(prompt), template))
    return encode_parts([_joined(parts)], tokenizer)[0][0]


def _behind(before: list[_Part], parts: list[_Part]) -> list[_Part]:
    """Parts without a `<bos>` of their own if something stands before them."""
    return [part for part in parts if not (before and part.control and part.text == "<bos>")]


def _joined(parts: list[_Part]) -> list[_Part]:
    """Neighbours that are plain text as one part, without loss: the tokenizer then sees them as a whole."""
    joined: list[_Part] = []
    for part in parts:
        if joined and not part.control and not joined[-1].control:
            joined[-1] = _Part(joined[-1].text + part.text, False, False)
        else:
            joined.append(_Part(part.text, part.control, False))
    return joined


_Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def batches(
    encoded: Encoded,
    batch_size: int,
    length: int | None = None,
    seed: int | None = None,
) -> Iterator[_Batch]:
    """One example a row, padded: KerasHub's `(x, y, sample_weight)`. `packing.pack` wastes less.

    Args:
        encoded: Examples of `encode`.
        batch_size: Integer, rows of every batch. The last one is filled up with rows of no weight.
        length: Integer, tokens of a row. Defaults to the longest example's.
        seed: Integer to shuffle by, or None to keep the order.

    Returns:
        An iterator of `({"token_ids", "padding_mask"}, y, sample_weight)`, each array `(batch_size, length)`:
        int32, bool, int32, float32. `y[:, t]` is `token_ids[:, t + 1]`, and its weight is that token's.

    Raises:
        ValueError: If an example does not fit into `length`, or `batch_size` is below 1.
    """
    longest = max(map(len, encoded.tokens), default=0)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"`length` must hold the longest example ({longest} tokens). Received: {length}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}")
    order = np.arange(len(encoded.tokens))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    starts = range(0, len(order), batch_size)
    return (_padded(encoded, order[start : start + batch_size], (batch_size, length)) for start in starts)


def _padded(encoded: Encoded, members: np.ndarray, shape: tuple[int, int]) -> _Batch:
    token_ids, y = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    padding_mask, weight = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, index in enumerate(members):
        ids, mask = encoded.tokens[index], encoded.loss_mask[index]
        token_ids[row, : len(ids)] = ids
        padding_mask[row, : len(ids)] = True
        y[row, : len(ids) - 1] = ids[1:]
        weight[row, : len(ids) - 1] = mask[1:]
    return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weight
