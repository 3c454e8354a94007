"""A Keras model whose steps may be made of several batches, and whose compiled programs follow the model's state."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.training.accumulation import Accumulation, accumulates_itself
from gemma_lora.training.programs import Fingerprint, evaluation_program, train_program
from gemma_lora.training.schedule import default_optimizer, optimizer_steps

#: What a step's logs carry beside Keras's: the batch's own loss.
_BATCH_LOSS = "batch_loss"


class SteppedModel(keras.Model):
    """What `FineTuner` is but for its forward pass, its loss and its `fit`: optimizer, steps, compiled programs.

    Invariants: `train_function`, `test_function` and `predict_function` were compiled for the model's layers and
    variables as `_fingerprint` has them; while a step is made `_accumulation` is the present optimizer's.

    Args:
        model: A KerasHub `CausalLM`, which may change between calls.
        settings: Of these `accumulate`, `learning_rate` and `warmup` are used here.
    """

    def __init__(self, model: keras.Model, settings: dict[str, Any]):
        super().__init__(name="fine_tuner")
        self.settings = settings
        self.causal_lm = model
        self.batch_losses: tuple[Any, ...] = ()  # each training batch's own, of the last execution
        self.compiles_next = self.compiled_last = False  # whether a training step has yet to be, or was just compiled
        self._shown: dict[str, Any] = {"loss": 0.0}  # the last step's logs
        self._fingerprint = Fingerprint(model.backbone)
        self.train_function: Any = None
        self.test_function: Any = None
        self._optimizer_is_default = False
        self._default_steps: int | None = None  # of the default optimizer's schedule
        self._accumulation: Accumulation | None = None

    @property
    def batch_loss(self) -> Any:
        """The last training batch's own loss; None before there is one."""
        return self.batch_losses[-1] if self.batch_losses else None

    def check_trainable(self) -> None:
        """Raises where the model cannot be trained as it is now."""

    def model_changed(self) -> None:
        """Is called once the model is built of other layers or variables, before it is compiled anew."""

    def _follow_model(self) -> None:
        """Forgets what was made from the model if it is built of other layers or variables by now."""
        if not self._fingerprint.matches(self.causal_lm.backbone):
            self.train_function = self.test_function = self.predict_function = None
            self.model_changed()
            self._fingerprint = Fingerprint(self.causal_lm.backbone)

    def compile(self, optimizer="adam", loss=None, **kwargs):
        """As `keras.Model.compile`; the loss is this class's own and cannot be given.

        Raises:
            ValueError: If a loss or metrics are given, or an optimizer that accumulates gradients itself.
        """
        if loss is not None:
            raise ValueError("FineTuner's loss is chunked_cross_entropy; leave `loss` out.")
        for name in ("metrics", "weighted_metrics"):
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}` need all the logits, which FineTuner never forms. It shows the loss; how many answers "
                    f"are right is said by `gemma_lora.evaluate`. Received: {name}={kwargs[name]!r}"
                )
        optimizer = keras.optimizers.get(optimizer)
        if accumulates_itself(optimizer):
            raise ValueError(
                "Give the number of batches that make a step to `FineTuner(accumulate=…)`: with "
                "`gradient_accumulation_steps` Keras averages the batches however many tokens of each carry loss. "
                f"Received: gradient_accumulation_steps={optimizer.gradient_accumulation_steps!r}"
            )
        super().compile(optimizer=optimizer, loss=None, **kwargs)
        self._optimizer_is_default = False

    def compile_for(self, batches: int) -> None:
        """Compiles with Adam on a warm-up and cosine schedule over the steps that so many batches make.

        For `train_on_batch`; `fit` does it by itself, for its own batches.

        Args:
            batches: Integer, batches of the whole training.
        """
        if not isinstance(batches, int) or batches < 1:
            raise ValueError(f"`batches` must be an integer of at least 1. Received: batches={batches!r}")
        self.compile_default(optimizer_steps([batches], self.settings["accumulate"]))

    def compile_default(self, steps: int | None) -> None:
        """Compiles with Adam: warm-up and cosine over so many optimizer steps, or a constant rate where it is None."""
        self.compile(optimizer=self.new_default_optimizer(steps))
        self._optimizer_is_default, self._default_steps = True, steps

    def new_default_optimizer(self, steps: int | None) -> keras.optimizers.Optimizer:
        """The optimizer that `compile_default` would compile with."""
        return default_optimizer(self.settings["learning_rate"], self.settings["warmup"], steps)

    def chooses_optimizer(self) -> bool:
        """Whether nobody has compiled this model with an optimizer of their own."""
        return not self.compiled or self._optimizer_is_default

    def build_optimizer(self) -> None:
        """Makes the optimizer's variables, those that several batches are summed in among them.

        Raises:
            GemmaLoraError: If the optimizer was built for variables that are no longer the model's.
        """
        variables = self.trainable_variables
        if not self.optimizer.built:
            self.optimizer.build(variables)
        elif [id(v) for v in self.optimizer._trainable_variables] != [id(v) for v in variables]:
            if not self._optimizer_is_default:
                raise GemmaLoraError(
                    "The model's trainable weights are others than those the optimizer was built for. Call "
                    "`compile(optimizer=…)` again, with a new optimizer."
                )
            self.compile_default(self._default_steps)
            self.optimizer.build(variables)
        sums = self._accumulation
        if self.settings["accumulate"] > 1 and (sums is None or sums.optimizer is not self.optimizer):
            self._accumulation = Accumulation(self.optimizer, variables, self.settings["accumulate"])

    def begin_steps(self) -> None:
        """Builds the optimizer; batches that made no step yet, of a training that was broken off, are dropped."""
        self.build_optimizer()
        if self._accumulation is not None:
            self._accumulation.forget()

    def train_step(self, state, data):
        """As Keras's; several batches may make an optimizer step, and the logs hold the batch's own loss too."""
        trainable, frozen, optimizer, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        gradient_of = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (_, (loss, y_pred, frozen, metrics)), gradients = gradient_of(
            trainable, frozen, metrics, x, y, sample_weight, training=True, optimizer_variables=optimizer
        )
        if self._accumulation is None:
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        else:
            trainable, optimizer = self._accumulation.add(trainable, optimizer, gradients, _weight(y, sample_weight))
        logs, metrics = self._update_metrics_variables(metrics, loss, x, y, y_pred, sample_weight)
        return {**logs, _BATCH_LOSS: loss}, (trainable, frozen, optimizer, metrics)

    def test_step(self, state, data):
        """As Keras's, but the loss of several batches is the mean over all their tokens, however they are cut."""
        trainable, frozen, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        _, (loss, _, frozen, metrics) = self.compute_loss_and_updates(
            trainable, frozen, metrics, x, y, sample_weight, training=False
        )
        held = self.metrics_variables
        with keras.StatelessScope(state_mapping=list(zip(held, metrics, strict=True))) as scope:
            self._loss_tracker.update_state(loss, sample_weight=_weight(y, sample_weight))
            logs = self.get_metrics_result()
        after = [scope.get_current_value(variable) for variable in held]
        metrics = [old if new is None else new for old, new in zip(metrics, after, strict=True)]
        return logs, (trainable, frozen, metrics)

    def end_step(self) -> None:
        """Makes an optimizer step of the batches since the last one, where they are fewer than `accumulate`.

        `fit` does it at the end of an epoch. After a loop of `train_on_batch` it is for you to call: a `fit` that
        follows begins with a whole step and drops what was left of one.
        """
        if self._accumulation is not None:
            self._accumulation.end()

    def make_train_function(self, force=False):
        """As Keras's, but weights that do not change stay where they are (see `train_program`), and a function that
        was made for another state of the model is made anew."""
        self._follow_model()
        if self.train_function is not None and not force:
            return
        one: Any
        if self._keras_compiles():
            super().make_train_function(force=True)
            of_iterator = self.train_function

            def one(state, data):
                return of_iterator(state, iter((data,)))
        else:
            one = train_program(self.train_step)

        def train_function(state, iterator):
            losses = []
            block = list(itertools.islice(iterator, self.steps_per_execution))
            if not block:
                raise StopIteration  # which Keras takes for the end of the data
            for data in block:
                if not _rows(data):
                    continue  # no batch: see `datasets.Epochs`
                logs, state = one(state, data)
                losses.append(logs.pop(_BATCH_LOSS))  # Keras would show it and return it from `train_on_batch`
                self._shown = logs
            if losses:
                self.batch_losses = tuple(losses)
                self.compiles_next, self.compiled_last = False, self.compiles_next
            return dict(self._shown), state

        self.train_function, self.compiles_next = train_function, True

    def make_test_function(self, force=False):
        """As `make_train_function`, for evaluation."""
        self._follow_model()
        if self._keras_compiles():
            return super().make_test_function(force)
        if self.test_function is None or force:
            self.test_function = self._make_function(evaluation_program(self.test_step))

    def make_predict_function(self, force=False):
        """As Keras's, but made anew for another state of the model."""
        self._follow_model()
        return super().make_predict_function(force)

    def _keras_compiles(self) -> bool:
        """Whether steps are left to Keras: uncompiled ones, and those on several devices, whose shardings it knows."""
        return self.run_eagerly or not self.jit_compile or keras.distribution.distribution() is not None

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """As `keras.Model.train_on_batch`. Without `compile`, Adam at a constant rate, `learning_rate`.

        Raises:
            GemmaLoraError: If the update is merged, or the optimizer was built for other variables.
        """
        self.check_trainable()
        self._compile_if_needed()
        self.build_optimizer()
        return super().train_on_batch(x, y, sample_weight, **kwargs)

    def test_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """As `keras.Model.test_on_batch`; needs no `compile`."""
        self._compile_if_needed()
        return super().test_on_batch(x, y, sample_weight, **kwargs)

    def _compile_if_needed(self) -> None:
        if not self.compiled:
            self.compile_default(None)

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Within, steps are those of a new default optimizer at its constant rate; afterwards the present one is back.

        An optimizer of the caller's, given to `compile`, is left as it is.
        """
        if not self.chooses_optimizer():
            yield
            return
        kept = (self.optimizer, self._default_steps, self._accumulation) if self.compiled else None
        self.compile_default(None)
        try:
            yield
        finally:
            optimizer, steps, sums = kept or (self.new_default_optimizer(None), None, None)
            self.compile(optimizer=optimizer)
            self._optimizer_is_default, self._default_steps, self._accumulation = True, steps, sums


def _weight(y: Any, sample_weight: Any) -> Any:
    """Σ of the weights of a batch's tokens."""
    return y.size if sample_weight is None else keras.ops.sum(keras.ops.cast(sample_weight, "float32"))


def _rows(data: Any) -> int:
    """How many rows a batch has."""
    return next(leaf for leaf in jax.tree.leaves(data) if hasattr(leaf, "shape")).shape[0]
