"""`FineTuner`: a `keras.Model` around a Gemma whose loss never forms all the logits.

`compile`, `fit`, callbacks and the progress bar are Keras's own. Ours are the loss (`loss.py`), the packing
of examples into rows (`packing.py`), and the learning rate's course.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from gemma_lora import data as data_module
from gemma_lora.files import GemmaLoraError, write_json_atomic
from gemma_lora.hardware import memory_bytes, use_compilation_cache
from gemma_lora.loss import chunked_cross_entropy
from gemma_lora.packing import Batch, pack


@keras.saving.register_keras_serializable(package="gemma_lora")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly to its peak, then falls to zero along a cosine.

    Args:
        peak: Float, the highest rate.
        steps: Integer, optimizer steps of the whole training.
        warmup: Float, the share of steps that rise.
    """

    def __init__(self, peak: float, steps: int, warmup: float = 0.06):
        self.peak, self.steps, self.warmup = float(peak), int(steps), float(warmup)

    def __call__(self, step):
        ops = keras.ops
        step = ops.cast(step, "float32")
        rising = max(1.0, self.warmup * self.steps)
        progress = ops.clip((step - rising) / max(1.0, self.steps - rising), 0.0, 1.0)
        return self.peak * ops.minimum((step + 1.0) / rising, 0.5 * (1.0 + ops.cos(math.pi * progress)))

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "warmup": self.warmup}


class _Batches(keras.utils.PyDataset):
    """Packed batches as Keras wants them."""

    def __init__(self, batches: list[Batch]):
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int):
        return self.batches[index].as_keras()


class TrainingLog(keras.callbacks.Callback):
    """Writes one JSON line a step: step, loss, learning rate, tokens per second, memory in bytes.

    Args:
        path: The JSON Lines file; an older one is replaced.
        tokens: Tokens that carry loss, a number a batch; None where it is not known.
    """

    def __init__(self, path: str | os.PathLike | None = None, tokens: list[int] | None = None):
        super().__init__()
        self.path = Path(path) if path else None
        self.tokens = tokens
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, logs=None):
        self._file = None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "w", encoding="utf-8")

    def on_epoch_begin(self, epoch, logs=None):
        self._seen, self._sum = 0, 0.0
        self._clock = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the epoch's running mean; a step's own loss is the difference of two sums.
        running = float(logs["loss"]) * (self._seen + 1)
        loss, self._sum, self._seen = running - self._sum, running, self._seen + 1
        if not math.isfinite(loss):
            self.model.stop_training = True
            raise GemmaLoraError(
                f"The loss is {loss} at step {len(self.rows) + 1}. Lower the learning rate, or look at the data "
                "with show_mask."
            )
        now = time.perf_counter()
        row = {
            "step": len(self.rows) + 1,
            "loss": round(loss, 6),
            "seconds": round(now - self._clock, 3),
        }
        if self.tokens:
            row["tokens_per_second"] = round(self.tokens[batch % len(self.tokens)] / (now - self._clock), 1)
        row["memory_bytes"] = memory_bytes()
        self._clock = now
        self.rows.append(row)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def on_train_end(self, logs=None):
        if self._file:
            self._file.close()


class FineTuner(keras.Model):
    """Trains what is trainable in a KerasHub Gemma (after `apply_lora`: A and B) on packed examples.

    Args:
        model: A KerasHub Gemma `CausalLM`, usually after `apply_lora`.
        run_dir: Optional folder for `training.jsonl` and `settings.json`.
        learning_rate: Float, the peak rate of the default optimizer, Adam.
        warmup: Float, the share of steps in which the rate rises.
        rows, row_length: Integers, a batch is `rows` × `row_length` tokens.
        chunk_size: Integer, tokens whose logits exist together; see `chunked_cross_entropy`.
        seed: Integer, the order of the examples.

    Raises:
        GemmaLoraError: If nothing in the model is trainable.

    Example:

    >>> model = load_gemma()                                              # doctest: +SKIP
    >>> apply_lora(model, rank=8)                                         # doctest: +SKIP
    >>> tuner = FineTuner(model, run_dir="runs/expenses")                 # doctest: +SKIP
    >>> tuner.fit(load_dataset("data/expenses"), epochs=1)                # doctest: +SKIP
    """

    def __init__(
        self,
        model: keras.Model,
        run_dir: str | os.PathLike | None = None,
        learning_rate: float = 2e-3,
        warmup: float = 0.06,
        rows: int = 4,
        row_length: int = 256,
        chunk_size: int = 256,
        seed: int = 0,
    ):
        super().__init__(name="fine_tuner")
        if not model.trainable_variables:
            raise GemmaLoraError("Nothing in the model is trainable. Call `apply_lora(model, …)` first.")
        self.causal_lm = model
        self.run_dir = Path(run_dir) if run_dir else None
        self.settings: dict[str, Any] = {
            "learning_rate": learning_rate,
            "warmup": warmup,
            "rows": rows,
            "row_length": row_length,
            "chunk_size": chunk_size,
            "seed": seed,
        }
        self.log: TrainingLog | None = None

    def call(self, inputs, training=None):
        # Inputs that the backbone does not know (KerasHub's preprocessor of Gemma 3 may add some) are left out.
        wanted = {name: inputs[name] for name in ("token_ids", "padding_mask")}
        return self.causal_lm.backbone(wanted, training=training)  # (B, T, D)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        embedding = self.causal_lm.backbone.token_embedding
        embeddings = keras.ops.convert_to_tensor(embedding.embeddings)
        if sample_weight is None:
            sample_weight = keras.ops.ones(y.shape, "float32")
        return chunked_cross_entropy(
            y_pred,
            keras.ops.cast(embeddings, y_pred.dtype),
            y,
            keras.ops.cast(sample_weight, "float32"),
            chunk_size=self.settings["chunk_size"],
            soft_cap=embedding.logit_soft_cap,
            train_embeddings=any(v.trainable for v in embedding.trainable_variables),
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return self.get_metrics_result()

    def batches(self, dataset: data_module.Dataset, epoch: int = 0, limit: int | None = None) -> list[Batch]:
        """A dataset's training examples, encoded and packed.

        Args:
            dataset: A `Dataset` of `load_dataset`.
            epoch: Integer; each epoch has an order of its own.
            limit: Take the first so many examples only.
        """
        encoded = data_module.encode(
            dataset.train[:limit],
            self.causal_lm.preprocessor.tokenizer,
            dataset.template,
            max_length=self.settings["row_length"],
        )
        return self._pack(encoded, epoch)

    def _pack(self, encoded, epoch: int) -> list[Batch]:
        settings = self.settings
        seed = settings["seed"] + epoch
        return pack(encoded.tokens, encoded.loss_mask, settings["rows"], settings["row_length"], seed)

    def compile_for(self, steps: int) -> None:
        """Compiles with Adam on a warm-up and cosine course of `steps` steps."""
        schedule = WarmupCosine(self.settings["learning_rate"], steps, self.settings["warmup"])
        self.compile(optimizer=keras.optimizers.Adam(schedule, beta_2=0.99, clipnorm=1.0))

    def compile(self, optimizer="adam", loss=None, **kwargs):
        """As `keras.Model.compile`; the loss is this class's own and cannot be given."""
        if loss is not None:
            raise ValueError("FineTuner's loss is chunked_cross_entropy; leave `loss` out.")
        super().compile(optimizer=optimizer, loss=None, **kwargs)

    def fit(self, x=None, y=None, *args, limit: int | None = None, callbacks=None, epochs: int = 1, **kwargs):
        """Trains. As `keras.Model.fit`, and `x` may be a `Dataset` of `load_dataset`.

        Args:
            x: A `Dataset`, or what Keras's `fit` takes: `(x, y, sample_weight)` arrays of KerasHub's form.
            limit: With a `Dataset`: train on its first so many examples.
            callbacks, epochs: As in Keras.

        Returns:
            Keras's `History`.
        """
        use_compilation_cache()
        tokens = None
        if isinstance(x, data_module.Dataset):
            self.causal_lm.gemma_lora_template = x.template
            batches = [batch for epoch in range(epochs) for batch in self.batches(x, epoch, limit)]
            tokens = [int(np.count_nonzero(batch.weights)) for batch in batches]
            # One pass over all epochs' batches: each epoch is packed in an order of its own.
            x, epochs, kwargs["shuffle"] = _Batches(batches), 1, False
            if not self.compiled:
                self.compile_for(len(batches))
        elif not self.compiled:
            raise GemmaLoraError("Call `compile(optimizer=…)` before `fit` with arrays.")
        self.log = TrainingLog(self.run_dir / "training.jsonl" if self.run_dir else None, tokens)
        if self.run_dir:
            write_json_atomic(self.run_dir / "settings.json", self.settings | {"epochs": epochs, "limit": limit})
        callbacks = [self.log, *(callbacks or [])]
        return super().fit(x, y, *args, callbacks=callbacks, epochs=epochs, **kwargs)
