"""`FineTuner`: a `keras.Model` around a Gemma whose loss never forms all the logits.

`compile`, `fit`, callbacks and the progress bar are Keras's own. Ours are the loss (`loss.py`), the packing
of examples into rows (`packing.py`), the learning rate's course, and checkpoints that a killed run goes on from
(`checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, write_json_atomic, write_text_atomic
from gemma_lora.base.hardware import Program, memory_bytes, use_compilation_cache
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data import dataset as data_module
from gemma_lora.data.packing import Batch, pack
from gemma_lora.gemma.architectures import architecture_of
from gemma_lora.gemma.attention import packed_rows
from gemma_lora.gemma.forward import forward
from gemma_lora.gemma.weights import collect, head_table
from gemma_lora.layers.linear import is_one_product, kernel_matrix
from gemma_lora.layers.loss import chunked_cross_entropy
from gemma_lora.layers.products import EXACT, Precision
from gemma_lora.lora.apply import lora_layers, plain_layers
from gemma_lora.lora.qlora import packed_layers
from gemma_lora.quantization.rows import Bfloat16Rows, Int8Rows
from gemma_lora.training import checkpoint


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
        rows: Rows of steps that were made before; the numbering goes on after them.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        tokens: list[int] | None = None,
        rows: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.path = Path(path) if path else None
        self.tokens = tokens
        self.rows: list[dict[str, Any]] = list(rows or [])

    def on_train_begin(self, logs=None):
        self._file = None
        if self.path:
            write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = open(self.path, "a", encoding="utf-8")

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


class _Checkpoints(keras.callbacks.Callback):
    """Writes a checkpoint every so many seconds and after the last step."""

    def __init__(self, tuner: FineTuner, record: dict[str, Any], log: TrainingLog, last_step: int, seconds: float):
        super().__init__()
        self.tuner, self.record, self.log, self.last_step, self.seconds = tuner, record, log, last_step, seconds
        self._written = time.monotonic()
        self.saved_step = 0

    def state(self) -> str:
        """What is on disk, for whoever has to know because training ended early."""
        if not self.saved_step:
            return f"{self.tuner.run_dir} holds no checkpoint yet."
        return f"{self.tuner.run_dir} holds the checkpoint of step {self.saved_step} of {self.last_step}."

    def on_train_batch_end(self, batch, logs=None):
        step = len(self.log.rows)
        if step == self.last_step or time.monotonic() - self._written >= self.seconds:
            self.model.jax_state_sync()  # Keras keeps the values apart while it trains
            arrays = {name: np.asarray(v.value) for name, v in self.tuner.changing_variables().items()}
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise GemmaLoraError(f"A weight is not a finite number after step {step}. Lower the learning rate.")
            checkpoint.save(self.tuner.run_dir, checkpoint.Checkpoint(step, self.record, self.log.rows, arrays))
            self._written, self.saved_step = time.monotonic(), step


class FineTuner(keras.Model):
    """Trains what is trainable in a KerasHub Gemma (after `apply_lora`: A, B, DoRA's magnitude) on packed examples.

    Args:
        model: A KerasHub Gemma `CausalLM`, usually after `apply_lora` or `apply_adapters`.
        run_dir: Optional folder for `training.jsonl`, `training_settings.json` and the checkpoint. `fit` with a
            `Dataset` goes on from the checkpoint it finds there.
        learning_rate: Float, the peak rate of the default optimizer, Adam.
        warmup: Float, the share of steps in which the rate rises.
        rows, row_length: Integers, a batch is `rows` × `row_length` tokens.
        chunk_size: Integer, tokens whose loss is computed together; see `chunked_cross_entropy`. By default what
            fits the batches of `fit`'s `Dataset` with few places left empty, else 64.
        accumulate: Integer, batches whose gradients make one optimizer step; the step is that of one batch of
            all their rows.
        remat: If True, activations inside a block are computed again in the backward pass instead of kept: less
            memory, more time.
        mixed_precision: If True, the products with frozen kernels, LoRA's, attention's and the loss's are formed in
            bfloat16 with sums in float32, which is faster on processors with AVX512-BF16 or AMX; see
            `chunked_cross_entropy`. Rounded copies of the frozen weights are kept for it. A, B, DoRA's magnitude and
            norms and the optimizer stay float32, and so does everything outside training.
        filter_gradient: If True, blocks of the vocabulary are left out of the gradient of tokens in whose softmax they
            have next to no share; see `chunked_cross_entropy`. By default as `mixed_precision`.
        checkpoint_seconds: Float, seconds between checkpoints.
        seed: Integer, the order of the examples.

    Raises:
        GemmaLoraError: If nothing in the model is trainable.
        ValueError: If `accumulate` is below 1, or `remat` meets dropout.

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
        learning_rate: float = 5e-4,
        warmup: float = 0.06,
        rows: int = 1,
        row_length: int = 384,
        chunk_size: int | None = None,
        accumulate: int = 1,
        remat: bool = False,
        mixed_precision: bool = False,
        filter_gradient: bool | None = None,
        checkpoint_seconds: float = 30.0,
        seed: int = 0,
    ):
        super().__init__(name="fine_tuner")
        if not model.trainable_variables:
            raise GemmaLoraError("Nothing in the model is trainable. Call `apply_lora` or `apply_adapters` first.")
        if accumulate < 1:
            raise ValueError(f"`accumulate` must be at least 1. Received: accumulate={accumulate!r}")
        if remat and any(layer.dropout_rate for layer in lora_layers(model)):
            raise ValueError("`remat` computes a block twice, and dropout would differ. Use one of the two.")
        if isinstance(preprocessor := getattr(model, "preprocessor", None), keras.layers.Layer):
            # KerasHub never marks it as built, and Keras traces the whole model anew at every call for that.
            for layer in preprocessor._flatten_layers():
                layer.built = True
        self.causal_lm = model
        self._round_kernels(mixed_precision)
        self.run_dir = Path(run_dir) if run_dir else None
        self.settings: dict[str, Any] = {
            "learning_rate": learning_rate,
            "warmup": warmup,
            "rows": rows,
            "row_length": row_length,
            "chunk_size": chunk_size,
            "accumulate": accumulate,
            "remat": remat,
            "mixed_precision": mixed_precision,
            "filter_gradient": mixed_precision if filter_gradient is None else filter_gradient,
            "seed": seed,
        }
        self.checkpoint_seconds = checkpoint_seconds
        self.log: TrainingLog | None = None

    def _round_kernels(self, mixed_precision: bool) -> None:
        """Makes room for frozen kernels and the embedding in bfloat16, for mixed precision; see `_refresh_copies`."""
        self.copies: list[keras.Variable] = []
        self._copied: list[tuple[Any, Any, keras.Variable, list[Any]]] = []  # layer, source, its copy, what was copied
        self.rounded_embeddings: keras.Variable | None = None  # the bits of bfloat16: see `rows.Bfloat16Rows`
        if not mixed_precision:
            return

        def room(layer, source, array):
            copy = keras.Variable(array, dtype=str(array.dtype), trainable=False)
            self.copies.append(copy)
            self._copied.append((layer, source, copy, [source.value]))
            return copy

        for layer in _plain_bases(self.causal_lm):
            if not layer._kernel.trainable and layer._kernel.dtype == "float32":
                room(layer, layer._kernel, keras.ops.cast(kernel_matrix(layer), "bfloat16"))
        embedding = self.causal_lm.backbone.token_embedding
        if not any(v.trainable for v in embedding.trainable_variables) and hasattr(embedding, "_embeddings"):
            bits = Bfloat16Rows.of(embedding.embeddings.value).bits
            self.rounded_embeddings = room(None, embedding.embeddings, bits)

    def _refresh_copies(self) -> None:
        """Rounds anew what has been assigned to since it was rounded."""
        for layer, source, copy, seen in self._copied:
            if source.value is seen[0]:
                continue
            seen[0] = source.value
            made = Bfloat16Rows.of(source.value).bits if layer is None else kernel_matrix(layer)
            copy.assign(keras.ops.cast(made, copy.dtype))

    def _precision(self, training: bool | None) -> Precision:
        if not training or not self.settings["mixed_precision"]:
            return EXACT
        return Precision(True, {id(layer): copy for layer, _, copy, _ in self._copied if layer is not None})

    def call(self, inputs, training=None):
        # Inputs that the forward pass does not know (KerasHub's preprocessor of Gemma 3 may add some) are left out.
        backbone = self.causal_lm.backbone
        architecture, precision = architecture_of(backbone), self._precision(training)
        token_ids, segments = (keras.ops.convert_to_tensor(inputs[name]) for name in ("token_ids", "padding_mask"))
        weights = collect(backbone, precision, bool(training))
        attend = packed_rows(architecture, segments, precision.mixed)
        positions = np.arange(token_ids.shape[1])[None]
        remat = self.settings["remat"] and bool(training)
        return forward(architecture, weights, token_ids, positions, attend, remat)  # (B, T, D)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        embedding = self.causal_lm.backbone.token_embedding
        mixed = bool(training and self.settings["mixed_precision"])
        rounded = self.rounded_embeddings if mixed else None  # validation takes the weights as they are
        embeddings = head_table(embedding) if rounded is None else Bfloat16Rows(rounded.value)
        if rounded is None and not isinstance(embeddings, Int8Rows):
            embeddings = keras.ops.cast(embeddings, y_pred.dtype)
        if sample_weight is None:
            sample_weight = keras.ops.ones(y.shape, "float32")
        return chunked_cross_entropy(
            y_pred,
            embeddings,
            y,
            keras.ops.cast(sample_weight, "float32"),
            chunk_size=self.settings["chunk_size"] or 64,
            soft_cap=embedding.logit_soft_cap,
            train_embeddings=any(v.trainable for v in embedding.trainable_variables),
            # While training, weights of batches that make a step together are shares of the step: see `_shares`.
            normalizer=1.0 if training and self.settings["accumulate"] > 1 else None,
            mixed_precision=mixed,
            filter_gradient=self.settings["filter_gradient"],
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return self.get_metrics_result()

    def batches(
        self, dataset: data_module.Dataset, epoch: int = 0, limit: int | None = None, skip_bad_lines: bool = False
    ) -> list[Batch]:
        """A dataset's training examples, encoded and packed.

        Args:
            dataset: A `Dataset` of `load_dataset`.
            epoch: Integer; each epoch has an order of its own.
            limit: Take the first so many examples only.
            skip_bad_lines: Leave out examples that are longer than a row, instead of raising.
        """
        encoded = data_module.encode(
            dataset.train[:limit],
            self.causal_lm.preprocessor.tokenizer,
            data_module.template_of(self.causal_lm, dataset.template),
            max_length=self.settings["row_length"],
            skip_bad_lines=skip_bad_lines,
        )
        return self._pack(encoded, epoch)

    def _pack(self, encoded, epoch: int) -> list[Batch]:
        settings = self.settings
        seed = settings["seed"] + epoch
        return pack(encoded.tokens, encoded.loss_mask, settings["rows"], settings["row_length"], seed)

    def compile_for(self, batches: int) -> None:
        """Compiles with Adam on a warm-up and cosine course of the steps that so many batches make."""
        accumulate = self.settings["accumulate"]
        schedule = WarmupCosine(self.settings["learning_rate"], -(-batches // accumulate), self.settings["warmup"])
        together = accumulate if accumulate > 1 else None
        optimizer = keras.optimizers.Adam(
            schedule, beta_2=0.99, global_clipnorm=1.0, gradient_accumulation_steps=together
        )
        self.compile(optimizer=optimizer)

    def changing_variables(self) -> dict[str, keras.Variable]:
        """What a training changes, by name: trainable weights, dropout's seeds, the optimizer's state."""
        seeds = [v for v in self.causal_lm.non_trainable_variables if "seed_generator" in v.path]
        return {
            **{f"weight.{i:04d}": v for i, v in enumerate(self.causal_lm.trainable_variables)},
            **{f"seed.{i:04d}": v for i, v in enumerate(seeds)},
            **{f"optimizer.{i:04d}": v for i, v in enumerate(self.optimizer.variables)},
        }

    def _record(self, batches: list[Batch], **more) -> dict[str, Any]:
        """Every setting that the result depends on, as a checkpoint keeps it."""
        digest = hashlib.sha256()
        for batch in batches:
            for array in (batch.token_ids, batch.segment_ids, batch.weights):
                digest.update(array.tobytes())
        optimizer = json.loads(json.dumps(keras.saving.serialize_keras_object(self.optimizer), default=str))
        optimizer["config"].pop("name", None)  # Keras numbers its objects: another name each time
        backbone = self.causal_lm.backbone
        base = hashlib.sha256(np.asarray(backbone.layer_norm.scale).tobytes())
        some_tokens = np.arange(min(64, backbone.token_embedding.input_dim))
        base.update(np.asarray(backbone.token_embedding(some_tokens)).tobytes())
        packed = sorted({type(layer.encoding).__name__ for layer in packed_layers(self.causal_lm)})
        layers = lora_layers(self.causal_lm)
        lora = sorted({(layer.name, layer.rank, layer.alpha, layer.dropout_rate, layer.rslora) for layer in layers})
        dora = sorted({layer.name for layer in layers if layer.dora})
        return {
            **self.settings,
            **more,
            "lora (layer, rank, alpha, dropout, rslora)": [list(row) for row in lora],
            "optimizer": optimizer,
            "batches": len(batches),
            "data (SHA-256 of the batches)": digest.hexdigest(),
            "base model (SHA-256 of some weights)": base.hexdigest(),
            # Named only where they are, so that runs from before there were such settings go on.
            **({"dora (layer)": dora} if dora else {}),
            **({"base model's encodings": packed} if packed else {}),
        }

    def _resume(self, record: dict[str, Any]) -> checkpoint.Checkpoint | None:
        """Takes over the run folder's checkpoint, if there is one."""
        if self.run_dir is None or (found := checkpoint.load(self.run_dir)) is None:
            return None
        if changed := checkpoint.changed_settings(found.settings, record):
            raise GemmaLoraError(
                f"{self.run_dir}: holds a run with other settings: {'; '.join(changed)}. Set them back to go on with "
                f"it, choose another run folder, or delete {checkpoint.FILE} to begin anew."
            )
        self.optimizer.build(self.causal_lm.trainable_variables)
        variables = self.changing_variables()
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        if shapes != {name: array.shape for name, array in found.arrays.items()}:
            raise GemmaLoraError(f"{self.run_dir}/{checkpoint.FILE}: is of another model. Choose another run folder.")
        for name, variable in variables.items():
            variable.assign(found.arrays[name])
        return found

    def compile(self, optimizer="adam", loss=None, **kwargs):
        """As `keras.Model.compile`; the loss is this class's own and cannot be given."""
        if loss is not None:
            raise ValueError("FineTuner's loss is chunked_cross_entropy; leave `loss` out.")
        super().compile(optimizer=optimizer, loss=None, **kwargs)

    def make_train_function(self, force=False):
        """As Keras's, but weights that do not change stay where they are.

        Keras gives all of them to each step (donates them) and takes them back. Those mapped from a file cannot be
        given away, so XLA would copy them: a second model in memory.
        """
        self._refresh_copies()
        if self._keras_compiles():
            return super().make_train_function(force)
        if self.train_function is not None and not force:
            return

        def step(trainable, frozen, optimizer, metrics, data):
            logs, (trainable, after, optimizer, metrics) = self.train_step(
                (trainable, frozen, optimizer, metrics), data
            )
            return logs, (trainable, _changed(frozen, after), optimizer, metrics)

        compiled = Program(step, donate=(0, 2, 3))

        def train_step(state, data):
            logs, (trainable, changed, optimizer, metrics) = compiled(*state, data)
            return logs, (trainable, _with_changes(state[1], changed), optimizer, metrics)

        self.train_function = self._make_function(train_step)

    def make_test_function(self, force=False):
        """As Keras's, but weights stay where they are: see `make_train_function`."""
        if self._keras_compiles():
            return super().make_test_function(force)
        if self.test_function is not None and not force:
            return

        def step(trainable, frozen, metrics, data):
            logs, (_, after, metrics) = self.test_step((trainable, frozen, metrics), data)
            return logs, (_changed(frozen, after), metrics)

        compiled = Program(step, donate=(2,))

        def test_step(state, data):
            logs, (changed, metrics) = compiled(*state, data)
            return logs, (state[0], _with_changes(state[1], changed), metrics)

        self.test_function = self._make_function(test_step)

    def _keras_compiles(self) -> bool:
        """Whether steps are left to Keras: uncompiled ones, and those on several devices, whose shardings it knows."""
        return self.run_eagerly or not self.jit_compile or keras.distribution.distribution() is not None

    def fit(
        self,
        x=None,
        y=None,
        *args,
        limit: int | None = None,
        skip_bad_lines: bool = False,
        callbacks=None,
        epochs: int = 1,
        **kwargs,
    ):
        """Trains. As `keras.Model.fit`, and `x` may be a `Dataset` of `load_dataset`.

        Args:
            x: A `Dataset`, or what Keras's `fit` takes: `(x, y, sample_weight)` arrays of KerasHub's form.
            limit, skip_bad_lines: With a `Dataset`: see `batches`.
            callbacks, epochs: As in Keras.

        Returns:
            Keras's `History`.
        """
        use_compilation_cache()
        if not isinstance(x, data_module.Dataset):
            if not self.compiled:
                raise GemmaLoraError("Call `compile(optimizer=…)` before `fit` with arrays.")
            self.log = TrainingLog(self.run_dir / "training.jsonl" if self.run_dir else None)
            return super().fit(x, y, *args, callbacks=[self.log, *(callbacks or [])], epochs=epochs, **kwargs)
        self.causal_lm.gemma_lora_template = data_module.template_of(self.causal_lm, x.template)
        # One pass over all epochs' batches: each epoch is packed in an order of its own.
        batches = [batch for epoch in range(epochs) for batch in self.batches(x, epoch, limit, skip_bad_lines)]
        if self.settings["chunk_size"] is None:
            self.settings["chunk_size"] = _fitting_chunk([int(np.count_nonzero(b.weights)) for b in batches])
        if not self.compiled:
            self.compile_for(len(batches))
        record = self._record(batches, epochs=epochs, limit=limit)
        found = self._resume(record)
        done = found.step if found else 0
        batches = _shares(batches, self.settings["accumulate"])
        tokens = [int(np.count_nonzero(batch.weights)) for batch in batches[done:]]
        log_path = self.run_dir / "training.jsonl" if self.run_dir else None
        self.log = TrainingLog(log_path, tokens, found.log if found else None)
        callbacks = [self.log, *(callbacks or [])]
        if self.run_dir:
            if found:
                what = "is finished" if done == len(batches) else f"goes on after step {done}"
                print(f"{self.run_dir}: the run {what} of {len(batches)}.")
            write_json_atomic(self.run_dir / "training_settings.json", record)
            checkpoints = _Checkpoints(self, record, self.log, len(batches), self.checkpoint_seconds)
            checkpoints.saved_step = done
            callbacks.append(checkpoints)
        if done == len(batches):
            return keras.callbacks.History()
        try:
            return super().fit(_Batches(batches[done:]), callbacks=callbacks, epochs=1, shuffle=False, **kwargs)
        except KeyboardInterrupt:
            if self.run_dir:
                print(f"\nStopped. {checkpoints.state()} The same command or call goes on from there.")
            raise
        except (GemmaLoraError, OSError) as error:  # no number any more; a full disk
            if not self.run_dir:
                raise
            raise GemmaLoraError(f"{str(error).rstrip('.')}. {checkpoints.state()}") from error


def _plain_bases(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that hold a kernel in floats, those beside LoRA too."""
    beside = [layer.base for layer in lora_layers(model) if not layer.is_packed]
    return beside + [layer for _, _, layer in plain_layers(model) if is_one_product(layer)]


def _changed(before: list, after: list) -> list:
    """What a traced step made anew; None where it hands back what it was given."""
    return [None if new is old else new for old, new in zip(before, after, strict=True)]


def _with_changes(before: list, changed: list) -> list:
    return [old if new is None else new for old, new in zip(before, changed, strict=True)]


def _fitting_chunk(tokens: list[int]) -> int:
    """The chunk in which nineteen of twenty batches fit with little room to spare: at most 256, a multiple of 16.

    A matrix product over fewer tokens is slower a token, and the last chunk's empty places are computed too.
    """
    most = max(1, int(np.quantile(tokens, 0.95)))
    return -(-most // (-(-most // 256)) // 16) * 16


def _shares(batches: list[Batch], accumulate: int) -> list[Batch]:
    """Batches whose gradients, averaged by Keras over `accumulate` of them, are the gradient of one large batch.

    The loss of one large batch divides by the weights of all its tokens. So a token's weight becomes its share
    of that sum, times `accumulate` for the average; the last step is filled up with batches of no weight.
    """
    if accumulate == 1:
        return batches
    shared: list[Batch] = []
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        total = sum(float(batch.weights.sum()) for batch in group) or 1.0
        shared += [
            dataclasses.replace(batch, weights=batch.weights * np.float32(accumulate / total)) for batch in group
        ]
        empty = dataclasses.replace(group[-1], weights=np.zeros_like(group[-1].weights), examples=0)
        shared += [empty] * (accumulate - len(group))
    return shared
