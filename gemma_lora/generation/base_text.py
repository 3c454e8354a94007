"""Text that a model writes from `<bos>` on: what `training/replay.py` mixes in against forgetting."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import BUILTIN_NAME, Answering
from gemma_lora.generation.engine import generate_tokens

#: Texts that are drawn, and their length in tokens, `<bos>` included.
COUNT, LENGTH = 128, 64


def base_text(
    model: keras.Model,
    count: int = COUNT,
    length: int = LENGTH,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Texts drawn from a model as it is now: call it before the training, on the base model.

    Those of the built-in weights are stored with the package, drawn from them once in the same way. Of any other model
    they are drawn now, from the likeliest tokens with 95 % of the probability.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        count: Integer, texts. Of the built-in weights at most `COUNT` are stored.
        length: Integer, the most tokens of a text, `<bos>` included, at least 2.
        seed: Integer, for texts that are drawn.
        on_progress: Called with (texts drawn, all).

    Returns:
        A list of int32 arrays of up to `length` token ids, each with `<bos>` first.

    Raises:
        ValueError: If `count` or `length` is too small.

    Example:

    >>> tuner.fit(lines, epochs=4, replay=base_text(model))    # doctest: +SKIP
    """
    if count < 1 or length < 2:
        raise ValueError(
            f"`count` must be at least 1 and `length` at least 2. Received: count={count!r}, length={length!r}"
        )
    if getattr(model, "gemma_lora_source", None) == BUILTIN_NAME:
        return [np.asarray(ids[:length], np.int32) for ids in _stored()[:count]]
    bos, eos = (int(model.preprocessor.tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>"))
    start = np.array([bos], np.int32)
    drawn = generate_tokens(
        model,
        [start] * count,
        [eos],
        length - 1,
        batch_size=min(count, 64),
        on_progress=on_progress,
        answering=Answering(temperature=1.0, top_p=0.95, seed=seed),
    )
    texts = [np.concatenate([start, ids]) for ids in drawn]
    return [text for text in texts if len(text) > 1]


def _stored() -> list[list[int]]:
    file = importlib.resources.files("gemma_lora.generation") / "base_text.json"
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return stored["texts"]
