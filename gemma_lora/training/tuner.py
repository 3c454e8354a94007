"""`FineTuner`: a `keras.Model` around a Gemma whose loss never forms all the logits.

`compile`, `fit`, callbacks and the progress bar are Keras's own. Ours are the loss (`layers/loss.py`), the packing
of examples into rows (`data/packing.py`), the learning rate's schedule (`schedule.py`), steps made of several batches
(`accumulation.py`), and checkpoints that a killed run goes on from (`checkpoint.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.hardware import choose, use_compilation_cache
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.settings import DEFAULTS, REPLAY_SHARE, check
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.encoding import Encoded, encode
from gemma_lora.data.packing import Batch, pack
from gemma_lora.data.templates import template_of
from gemma_lora.gemma.architectures import architecture_of
from gemma_lora.gemma.attention import packed_rows
from gemma_lora.gemma.forward import forward
from gemma_lora.gemma.origin import is_known
from gemma_lora.gemma.weights import backbone_of, collect, head_table
from gemma_lora.layers.linear import is_one_product, kernel_matrix
from gemma_lora.layers.loss import chunked_cross_entropy, fitting_chunk
from gemma_lora.layers.products import EXACT, Precision
from gemma_lora.lora.apply import lora_layers, plain_layers
from gemma_lora.quantization.rows import Bfloat16Rows, Int8Rows
from gemma_lora.training import devices, fitting
from gemma_lora.training.callbacks import TrainingLog
from gemma_lora.training.datasets import as_dataset, examples_of, held_out, is_lines
from gemma_lora.training.schedule import WarmupCosine as WarmupCosine
from gemma_lora.training.steps import SteppedModel


class FineTuner(SteppedModel):
    """Trains what is trainable in a KerasHub Gemma (after `apply_lora`: A, B, DoRA's magnitude) on packed examples.

    `fit` needs no `compile`: its default is Adam, with a warm-up and a cosine over the steps of that `fit`. Each `fit`
    is then a training of its own, with a schedule and an optimizer state of its own, unless it goes on from a
    checkpoint in `run_dir`. An optimizer that you `compile` with is left alone, as in Keras: a second `fit` goes on
    with its state and its schedule. A schedule of yours is handed the optimizer's count of updates; with `accumulate`
    there is one update per `accumulate` batches.

    The model may change between calls (`merge_lora`, `load_adapter`, `detach_lora` and `apply_lora`,
    `quantize_base`): the compiled steps are made anew where they no longer fit it.

    Args:
        model: A KerasHub Gemma `CausalLM`, usually after `apply_lora` or `apply_adapters`.
        run_dir: Optional folder for `training.jsonl`, `training_settings.json` and the checkpoint. `fit` with a
            `Dataset` goes on from the checkpoint it finds there; a run that is finished is left as it is.
        learning_rate: Float, the peak rate of the default optimizer, Adam.
        warmup: Float in [0, 1), the share of steps in which the rate rises.
        rows, row_length: Integers, a batch is `rows` × `row_length` tokens.
        chunk_size: Integer, tokens whose loss is computed together; see `chunked_cross_entropy`. By default what
            fits the batches of `fit`'s `Dataset` with few places left empty; with arrays what fits their shape.
        accumulate: Integer, batches whose gradients make one optimizer step; the step is that of one batch of
            all their rows, whatever the data come from and whichever the optimizer is. An epoch ends a step.
        remat: If True, activations inside a block are computed again in the backward pass instead of kept: less
            memory, more time.
        mixed_precision: By default what is faster on this machine; `choice` says what that is, and why. If True, the
            products with frozen kernels, LoRA's, attention's and the loss's round their factors to bfloat16 and sum in
            float32, which is faster on processors with AVX512-BF16 or AMX. Rounded copies of the frozen weights are
            kept for it. A, B, DoRA's magnitude and norms and the optimizer stay float32, and so does everything
            outside training.
        filter_gradient: If True, blocks of the vocabulary are left out of the gradient of tokens in whose softmax they
            have next to no share; see `chunked_cross_entropy`. By default where that is faster.
        checkpoint_seconds: Float, seconds between checkpoints.
        seed: Integer, the order of the examples.

    Raises:
        GemmaLoraError: If nothing in the model is trainable.
        ValueError: If an argument is not as above, or `remat` meets dropout.

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
        learning_rate: float = DEFAULTS.learning_rate,
        warmup: float = DEFAULTS.warmup,
        rows: int = DEFAULTS.rows,
        row_length: int = DEFAULTS.row_length,
        chunk_size: int | None = DEFAULTS.chunk_size,
        accumulate: int = DEFAULTS.accumulate,
        remat: bool = DEFAULTS.remat,
        mixed_precision: bool | None = DEFAULTS.mixed_precision,
        filter_gradient: bool | None = DEFAULTS.filter_gradient,
        checkpoint_seconds: float = DEFAULTS.checkpoint_seconds,
        seed: int = DEFAULTS.seed,
    ):
        settings = check(
            learning_rate=learning_rate,
            warmup=warmup,
            rows=rows,
            row_length=row_length,
            chunk_size=chunk_size,
            accumulate=accumulate,
            remat=remat,
            mixed_precision=mixed_precision,
            filter_gradient=filter_gradient,
            seed=seed,
        )
        seconds = check(checkpoint_seconds=checkpoint_seconds)["checkpoint_seconds"]
        dtype = architecture_of(backbone_of(model)).dtype
        choice = choose(settings["mixed_precision"], settings["filter_gradient"], dtype)
        settings |= {"mixed_precision": choice.mixed_precision, "filter_gradient": choice.filter_gradient}
        super().__init__(model, settings)
        self.choice, self.checkpoint_seconds = choice, seconds
        self._check_model()
        _mark_built(getattr(model, "preprocessor", None))
        self._round_kernels(self.choice.mixed_precision)
        self.built = True  # all its parts are; Keras would trace the model once more to find that out
        self.run_dir = Path(run_dir) if run_dir else None
        self.log: TrainingLog | None = None
        self._fitted_chunk: tuple[tuple[int, ...], int] | None = None  # (rows, row_length) of `fit`'s batches, chunk

    # --- the model -----------------------------------------------------------------------------------------

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
            chunk_size=self._chunk(y.shape),
            soft_cap=embedding.logit_soft_cap,
            train_embeddings=any(v.trainable for v in embedding.trainable_variables),
            mixed_precision=mixed,
            filter_gradient=self.settings["filter_gradient"],
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return self.get_metrics_result()

    def _chunk(self, shape: tuple[int, ...]) -> int:
        """How many tokens of a batch of this shape are given to the loss together."""
        if self.settings["chunk_size"] is not None:
            return self.settings["chunk_size"]
        if self._fitted_chunk is not None and self._fitted_chunk[0] == tuple(shape):
            return self._fitted_chunk[1]
        return fitting_chunk(int(np.prod(shape)))

    def _check_model(self) -> None:
        devices.check_floatx()
        if not self.causal_lm.trainable_variables:
            raise GemmaLoraError(
                "Nothing in the model is trainable. Call `apply_lora` or `apply_adapters` first; of several adapters "
                "use a single one."
            )
        if self.settings["remat"] and any(layer.dropout_rate for layer in lora_layers(self.causal_lm)):
            raise ValueError("`remat` computes a block twice, and dropout would differ. Use one of the two.")

    def make_train_function(self, force=False):
        """As Keras's. Kernels that were assigned to are rounded anew. What is trained belongs to the base it is on."""
        self._refresh_copies()
        if is_known(self.causal_lm):
            for layer in lora_layers(self.causal_lm):
                layer.trained_on = None
        super().make_train_function(force)

    def check_trainable(self) -> None:
        """Raises where this tuner cannot train the model as it is now."""
        self._check_model()
        if any(layer.merged for layer in lora_layers(self.causal_lm)):
            raise GemmaLoraError(
                "The update is merged into the kernels, and training would move nothing. Call `unmerge_lora(model)` "
                "first."
            )

    def model_changed(self) -> None:
        """Rounds the kernels anew."""
        for variable in self.copies:
            self._untrack_variable(variable)
        locked = self._tracker.locked  # Keras lets nobody add variables to a model that is built
        self._tracker.unlock()
        try:
            self._round_kernels(self.settings["mixed_precision"])
        finally:
            if locked:
                self._tracker.lock()

    # --- training ------------------------------------------------------------------------------------------

    def changing_variables(self) -> dict[str, keras.Variable]:
        """What a training changes, by name: trainable weights, dropout's seeds, the optimizer's state."""
        seeds = [v for v in self.causal_lm.non_trainable_variables if "seed_generator" in v.path]
        return {
            **{f"weight.{i:04d}": v for i, v in enumerate(self.causal_lm.trainable_variables)},
            **{f"seed.{i:04d}": v for i, v in enumerate(seeds)},
            **{f"optimizer.{i:04d}": v for i, v in enumerate(self.optimizer.variables)},
        }

    def batches(
        self, dataset: Dataset, epoch: int = 0, limit: int | None = None, skip_bad_lines: bool = False
    ) -> list[Batch]:
        """A dataset's training examples, encoded and packed.

        Args:
            dataset: A `Dataset` of `load_dataset`.
            epoch: Integer; each epoch has an order of its own.
            limit: Take the first so many examples only.
            skip_bad_lines: Leave out examples that are longer than a row, instead of raising.
        """
        settings = self.settings
        encoded = self.encode(dataset, limit, skip_bad_lines)
        seed = settings["seed"] + epoch
        return pack(encoded.tokens, encoded.loss_mask, settings["rows"], settings["row_length"], seed)

    def encode(self, dataset: Dataset, limit: int | None = None, skip_bad_lines: bool = False) -> Encoded:
        """A dataset's training examples as tokens; `limit` and `skip_bad_lines` as in `batches`."""
        limit = check(limit=limit)["limit"]
        return encode(
            dataset.train[:limit],
            self.causal_lm.preprocessor.tokenizer,
            template_of(self.causal_lm, dataset.template),
            max_length=self.settings["row_length"],
            skip_bad_lines=skip_bad_lines,
        )

    def fit(
        self,
        x=None,
        y=None,
        batch_size: int | None = None,
        epochs: int | None = 1,
        verbose="auto",
        callbacks=None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        *,
        limit: int | None = None,
        skip_bad_lines: bool = False,
        encoded: Encoded | None = None,
        replay: Sequence[np.ndarray] | None = None,
        replay_share: float = REPLAY_SHARE,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        **kwargs,
    ):
        """Trains. As `keras.Model.fit`, and `x` may be lines of text.

        After each epoch of lines the loss on lines that are not trained on is computed: `val_loss`, the mean over all
        tokens that carry loss. Callbacks such as `EarlyStopping` find it where Keras puts it.

        Args:
            x: A `Dataset`, or what `load_dataset` reads (a path, a list of dictionaries or `Example`s, …), or what
                Keras's `fit` takes: arrays of KerasHub's form.
            y, batch_size, validation_split: As in Keras, with arrays.
            epochs: Integer; with lines None means as many as `default_epochs` gives for their number.
            verbose, callbacks: As in Keras: 0 is silent, 1 a moving line (plain lines in a file), 2 a line an epoch.
            validation_data: A `Dataset` or a folder, of which the validation split is taken; other lines, of which all
                are; or arrays, as in Keras. With lines to train on, None means their own validation split (the first
                `limit` lines of it), and False none. A list or file that has no validation split is trained on whole
                where this is given or False.
            shuffle: With lines: whether each epoch has an order of its own, else that of the lines.
            limit, skip_bad_lines: With lines: see `batches`.
            encoded: The training lines as tokens, where `encode` was called before.
            replay, replay_share: With lines: text of the base model's own (`gl.base_text(model)`, before `apply_lora`)
                that is mixed in, so that less is forgotten, and its share of all tokens. The loss of a step then
                includes that text's.
            initial_epoch, steps_per_epoch: As in Keras. With `steps_per_epoch`, epochs go on through the lines.
            **kwargs: As in Keras. With lines: `validation_steps` and `validation_freq`.

        Returns:
            Keras's `History`.

        Raises:
            ValueError: If an argument is not as above, or a callback cannot work; nothing was trained then.
            GemmaLoraError: If the update is merged, `run_dir` holds another run, the loss is no finite number, the
                device's memory is not enough, or the rows cannot be divided among Keras's devices.
        """
        lines = is_lines(x)
        if epochs is None and not lines:
            raise ValueError("`epochs` must be an integer of at least 1. Received: epochs=None")
        check(epochs=epochs, limit=limit)
        fitting.check_epochs(initial_epoch, epochs, steps_per_epoch)
        self.check_trainable()
        use_compilation_cache()
        self._initial_epoch = None  # what Keras's `BackupAndRestore` left behind
        asked = {"epochs": epochs, "initial_epoch": initial_epoch, "steps_per_epoch": steps_per_epoch}
        asked |= {"verbose": verbose, "shuffle": shuffle}
        if not lines:
            if limit is not None or skip_bad_lines or encoded is not None or replay is not None:
                raise ValueError(
                    "`limit`, `skip_bad_lines`, `encoded` and `replay` are for lines, such as a `Dataset`."
                )
            given = asked | kwargs | {"y": y, "batch_size": batch_size, "validation_split": validation_split}
            held = self._validation(validation_data)
            devices.check_arrays(x, batch_size or 32)
            with devices.answering_out_of_memory(self.causal_lm, self.settings):
                return fitting.fit_arrays(self, super().fit, x, callbacks, held, given)
        devices.check_rows(self.settings["rows"])
        refused = {"y": y, "batch_size": batch_size, "validation_split": validation_split or None}
        fitting.refuse_with_lines(refused | kwargs)
        dataset = as_dataset(x, all_lines=validation_data is not None, skip_bad_lines=skip_bad_lines)
        lines_read = self.encode(dataset, limit, skip_bad_lines) if encoded is None else encoded
        if validation_data is None:
            validation_data = dataset.validation[:limit]
        held = self._validation(validation_data, dataset, skip_bad_lines)
        prepared = encoded is not None
        mixed = (replay, replay_share if replay is not None else 0.0)
        with devices.answering_out_of_memory(self.causal_lm, self.settings):
            return fitting.fit_lines(
                self, super().fit, dataset, lines_read, callbacks, held, limit, prepared, mixed, asked | kwargs
            )

    def evaluate(self, x=None, y=None, batch_size=None, verbose="auto", sample_weight=None, **kwargs):
        """As `keras.Model.evaluate`, and `x` may be lines of text; needs no `compile`.

        Args:
            x: A `Dataset` or a folder, of which the validation split is taken; other lines, of which all are; or
                arrays, as in Keras.
            y, batch_size, sample_weight: As in Keras, with arrays.
            verbose: As in Keras.
            **kwargs: As in Keras.

        Returns:
            The loss: the mean over all tokens that carry loss.
        """
        self._compile_if_needed()
        if is_lines(x):
            fitting.refuse_with_lines({"y": y, "batch_size": batch_size, "sample_weight": sample_weight})
            x = self._validation(x, x if isinstance(x, Dataset) else None)
        return super().evaluate(x, y, batch_size, verbose, sample_weight, **kwargs)

    def _validation(self, source: Any, dataset: Dataset | None = None, skip_bad_lines: bool = False) -> Any:
        """What Keras validates with: packed lines, a caller's arrays, or None."""
        if source is None or source is False:
            return None
        if not is_lines(source):
            fitting.check_validation(source)
            return source
        template = source.template if isinstance(source, Dataset) else None
        if template is None and dataset is not None:
            template = dataset.template
        return held_out(
            examples_of(source, skip_bad_lines),
            self.causal_lm.preprocessor.tokenizer,
            template_of(self.causal_lm, template),
            self.settings["rows"],
            self.settings["row_length"],
        )

    def use_chunk(self, shape: tuple[int, ...], chunk: int) -> None:
        """Sets how many tokens of a batch of this shape the loss takes together, where `chunk_size` does not say."""
        if self._fitted_chunk != (shape, chunk):
            self._fitted_chunk, self.train_function = (shape, chunk), None


def _plain_bases(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that hold a kernel in floats, those beside LoRA too."""
    beside = [layer.base for layer in lora_layers(model) if not layer.is_packed]
    return beside + [layer for _, _, layer in plain_layers(model) if is_one_product(layer)]


def _mark_built(preprocessor: Any) -> None:
    """KerasHub never marks its preprocessor as built, and Keras traces the whole model anew at every call for that."""
    if isinstance(preprocessor, keras.layers.Layer):
        for layer in preprocessor._flatten_layers():
            layer.built = True
