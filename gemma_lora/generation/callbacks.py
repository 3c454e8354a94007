"""The task's own score while training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template
from gemma_lora.generation.evaluation import evaluate
from gemma_lora.generation.metrics import Scores, metric_of


class ScoreAfterEpoch(keras.callbacks.Callback):
    """Answers some examples after each epoch and puts their score into the logs, as `val_score`.

    More is better: it is the metric's main score, and of `loss` the negative. Give it before callbacks that read it.

    Args:
        examples: Examples that are not trained on, such as `dataset.validation`.
        metric: See `evaluate`; by default the one that suits all examples.
        limit: Integer, the first so many examples are answered; None for all.
        template: The text around a prompt; defaults to the one the model is trained with.
        max_new_tokens, batch_size, mixed_precision: See `evaluate`.

    Attributes:
        history: The `Scores` of each epoch so far; with a `FineTuner`'s `run_dir` a run that goes on has those from
            before it was stopped, too.

    Raises:
        GemmaLoraError: If there are no examples, or the metric does not suit them or needs a package that is missing.

    Example:

    >>> stop = keras.callbacks.EarlyStopping(monitor="val_score", mode="max")             # doctest: +SKIP
    >>> tuner.fit(x, y, epochs=9, callbacks=[ScoreAfterEpoch(dataset.validation), stop])     # doctest: +SKIP
    """

    def __init__(
        self,
        examples: Sequence[Example],
        metric: str | None = None,
        limit: int | None = 64,
        template: Template | None = None,
        max_new_tokens: int | None = DEFAULTS.max_new_tokens,
        batch_size: int = DEFAULTS.batch_size,
        mixed_precision: bool | None = DEFAULTS.mixed_precision,
    ):
        super().__init__()
        if limit is not None and limit < 1:
            raise ValueError(f"`limit` must be at least 1, or None. Received: limit={limit}")
        if not examples:
            raise GemmaLoraError("There are no examples to score after each epoch.")
        self.metric = metric_of(metric, [example.response for example in examples])
        self.examples = list(examples)[:limit]
        self.template = template
        self.named: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "mixed_precision": mixed_precision,
        }
        self._kept: list[dict[str, Any]] = []  # as data, which a checkpoint keeps

    @property
    def history(self) -> list[Scores]:
        return [Scores.of_dict(values) for values in self._kept]

    def on_train_begin(self, logs=None):
        self._kept = []

    def on_epoch_end(self, epoch, logs=None):
        self.model.jax_state_sync()  # Keras keeps the values apart while it trains
        trained = getattr(self.model, "causal_lm", self.model)  # a FineTuner holds the Gemma
        scores = evaluate(trained, self.examples, self.template, metric=self.metric, **self.named)
        self._kept.append(dataclasses.asdict(scores))
        if logs is not None:
            logs["val_score"] = -scores.value if self.metric == "loss" else scores.value
