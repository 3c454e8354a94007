"""The two kinds of `FineTuner.fit`: on lines, which are packed and go on from a run's folder, and on Keras's arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, write_json_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.encoding import Encoded
from gemma_lora.data.packing import Batch
from gemma_lora.data.templates import template_of, template_reason
from gemma_lora.layers.loss import fitting_chunk
from gemma_lora.training import checkpoint, running
from gemma_lora.training.callbacks import Checkpoints, StepEnds, TrainingLog, epochs_ended
from gemma_lora.training.datasets import Epochs, epochs_of
from gemma_lora.training.epochs import default_epochs
from gemma_lora.training.progress import ProgressLine
from gemma_lora.training.record import run_record
from gemma_lora.training.schedule import batches_per_epoch, optimizer_steps

if TYPE_CHECKING:
    from gemma_lora.training.tuner import FineTuner

_Fit = Callable[..., keras.callbacks.History]

#: What `fit` takes with lines beside the arguments it names.
_WITH_LINES = {"validation_steps", "validation_freq"}
#: What to do instead of an argument of Keras's that packed rows have no use for.
_INSTEAD = {
    "batch_size": "`FineTuner(rows=…, row_length=…)` says how large a batch is",
    "validation_split": "`load_dataset(validation_fraction=…)` splits lines off",
    "validation_batch_size": "`FineTuner(rows=…, row_length=…)` says how large a batch is",
    "y": "the answers are in the lines",
    "sample_weight": "the loss is on the answers' tokens",
    "class_weight": "the loss is on the answers' tokens",
    "steps": "`validation_steps` of `fit` limits the batches",
}


def refuse_with_lines(given: dict[str, Any]) -> None:
    """Raises for arguments of Keras's that packed rows have no use for, and for unknown ones."""
    for name, value in given.items():
        if value is None or name in _WITH_LINES:
            continue
        if name not in _INSTEAD:
            raise TypeError(f"`fit` has no argument {name!r}.")
        raise ValueError(f"`{name}` does not go with lines of text: {_INSTEAD[name]}. Received: {name}={value!r}")


def check_epochs(initial_epoch: Any, epochs: int | None, steps_per_epoch: Any) -> None:
    """Raises where an epoch's number or length is none."""
    for name, value, least in (("initial_epoch", initial_epoch, 0), ("steps_per_epoch", steps_per_epoch, 1)):
        if value is None and name == "steps_per_epoch":
            continue
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}")
    if epochs is not None and initial_epoch >= epochs:
        raise ValueError(
            "`epochs` is the number of the last epoch, not how many are trained after `initial_epoch`; it must be "
            f"larger. Received: initial_epoch={initial_epoch!r}, epochs={epochs!r}"
        )


def check_validation(data: Any) -> None:
    """Raises where `validation_data` is nothing that a loss can be computed on."""
    if isinstance(data, tuple | list):
        if len(data) in (2, 3) and isinstance(data[0], dict) and {"token_ids", "padding_mask"} <= set(data[0]):
            return
    elif data is not True and not isinstance(data, int | float | dict) and data is not None:
        return  # a PyDataset or another of Keras's sources
    raise ValueError(
        "`validation_data` must be a Dataset, lines that `load_dataset` reads, or arrays `(x, y)` or `(x, y, "
        f"sample_weight)` with x a dictionary of token_ids and padding_mask. Received: {type(data).__name__}"
    )


def fit_arrays(tuner: FineTuner, keras_fit: _Fit, x: Any, callbacks: Any, validation: Any, given: dict[str, Any]):
    """`fit` on what Keras takes; `given` holds Keras's other arguments."""
    callbacks = running.as_list(callbacks)
    default = tuner.chooses_optimizer()
    running.check_callbacks(callbacks, None if default else tuner.optimizer, None)
    verbose = 1 if given["verbose"] == "auto" else int(given["verbose"])
    steps = batches = None
    if not isinstance(x, keras.utils.PyDataset) or x.num_batches is not None or given["steps_per_epoch"]:
        named = {name: given[name] for name in ("steps_per_epoch", "validation_split")}
        batches = batches_per_epoch(x, given["batch_size"], **named)
    if default and running.sets_the_rate(callbacks) is None:
        if not batches:
            raise GemmaLoraError(
                "How many batches the data hold is not known before, so the default learning rate has no "
                "schedule. Give `steps_per_epoch`, or call `compile(optimizer=…)` before `fit`."
            )
        left = given["epochs"] - given["initial_epoch"]
        steps = optimizer_steps([batches] * left, tuner.settings["accumulate"])
    if default:
        tuner.compile_default(steps)
    tuner.begin_steps()
    if verbose:
        print(f"Training with {tuner.choice}.")
    tuner.log = TrainingLog(tuner.run_dir / "training.jsonl" if tuner.run_dir else None)
    line = _progress(tuner, callbacks, given["epochs"], batches, verbose)
    run = running.RunningCallbacks(
        [StepEnds(tuner), tuner.log, *line], callbacks, [], None, model=tuner, epochs=given["epochs"], steps=batches,
        verbose=verbose,
    )  # fmt: skip
    return keras_fit(x, validation_data=validation, callbacks=run, **given | {"verbose": verbose})


def fit_lines(
    tuner: FineTuner,
    keras_fit: _Fit,
    dataset: Dataset,
    encoded: Encoded,
    callbacks: Any,
    validation: Any,
    limit: int | None,
    prepared: bool,
    replay: tuple[Sequence[np.ndarray] | None, float],
    given: dict[str, Any],
):
    """`fit` on lines of text; `given` holds Keras's other arguments.

    Who `prepared` the tokens has said already what template they have and which lines were left out. `replay` is
    texts, or None, and their share.
    """
    callbacks, settings = running.as_list(callbacks), tuner.settings
    first, default = given["initial_epoch"], tuner.chooses_optimizer()
    encoded = dataclasses.replace(encoded, tokens=encoded.tokens[:limit], loss_mask=encoded.loss_mask[:limit])
    epochs = default_epochs(len(encoded.tokens)) if given["epochs"] is None else given["epochs"]
    check_epochs(first, epochs, None)
    running.check_callbacks(callbacks, None if default else tuner.optimizer, tuner.run_dir)
    seeds = [settings["seed"] + epoch if given["shuffle"] else None for epoch in range(first, epochs)]
    packed = epochs_of(
        encoded, settings["rows"], settings["row_length"], seeds, given["steps_per_epoch"], replay=replay, first=first
    )
    steps = optimizer_steps(map(len, packed), settings["accumulate"])
    more = {"epochs": epochs, "limit": limit} | _unusual(tuner, given)
    found, record = _begin(tuner, packed, None if running.sets_the_rate(callbacks) else steps, more)
    run = _Run(tuner, Epochs(packed, first, found.step if found else 0), callbacks, found, record, epochs)
    verbose = 1 if given["verbose"] == "auto" else int(given["verbose"])
    if found and (found.step or found.finished):
        print(run.where())
    elif verbose:
        if not prepared:
            about = (template_reason(tuner.causal_lm, dataset.template), f"Training with {tuner.choice}.")
            skipped = (dataset.skipped_summary, encoded.skipped_summary)
            print("\n".join(line for line in (*about, *skipped) if line))
        print(_plan(tuner, encoded, packed, steps, validation))
        if replay[0] is not None and replay[1]:
            share = f"{100 * replay[1]:.0f} %"
            print(f"Replay: {share} of the tokens are the base model's own text. The training loss counts them.")
    tuner.causal_lm.gemma_lora_template = template_of(tuner.causal_lm, dataset.template)
    if run.finished:
        return run.history()
    keras_given = {name: given[name] for name in _WITH_LINES if name in given}
    return run.fit(keras_fit, verbose, validation_data=validation, **keras_given)


def _unusual(tuner: FineTuner, given: dict[str, Any]) -> dict[str, Any]:
    """Named in the record only where they are not the usual ones, so that older runs go on."""
    found = {
        "initial_epoch": given["initial_epoch"] or None,
        "steps_per_epoch": given["steps_per_epoch"],
        "shuffle": None if given["shuffle"] else False,
        "steps_per_execution": None if tuner.steps_per_execution == 1 else tuner.steps_per_execution,
    }
    return {name: value for name, value in found.items() if value is not None}


def _begin(
    tuner: FineTuner, epochs: list[list[Batch]], steps: int | None, more: dict[str, Any]
) -> tuple[checkpoint.Checkpoint | None, dict[str, Any]]:
    """Makes all ready for a training, or for the rest of the run folder's.

    Args:
        epochs: Batches of each epoch.
        steps: Integer, steps of the default optimizer's schedule; None for a constant rate.
        more: What the record holds beside the settings.

    Returns:
        `(checkpoint, record)`: the run folder's, if there is one, and what describes this training.

    Raises:
        GemmaLoraError: If the run folder holds another training; nothing was changed then.
    """
    default, batches = tuner.chooses_optimizer(), [batch for one in epochs for batch in one]
    chunk = tuner.settings["chunk_size"]
    if chunk is None:
        # What nineteen of twenty batches fit into with little room to spare.
        tokens = [np.count_nonzero(batch.weights) for batch in batches]
        chunk = fitting_chunk(int(np.quantile(tokens, 0.95)))
    optimizer = tuner.new_default_optimizer(steps) if default else tuner.optimizer
    record = run_record(tuner.settings | {"chunk_size": chunk} | more, tuner.causal_lm, optimizer, batches)
    found = checkpoint.of_run(tuner.run_dir, record) if tuner.run_dir else None
    if default:
        tuner.compile_default(steps)
    tuner.use_chunk(batches[0].token_ids.shape, chunk)
    tuner.begin_steps()
    if found and tuner.run_dir:
        checkpoint.assign(tuner.run_dir, found, tuner.changing_variables())
    return found, record


def _plan(tuner: FineTuner, encoded: Encoded, packed: list[list[Batch]], steps: int, validation: Any) -> str:
    """One line about what is going to be trained."""
    counts = sorted({len(one) for one in packed})
    batches = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    made = f" that make {steps} steps" if tuner.settings["accumulate"] > 1 else ""
    held = "no validation"
    if isinstance(validation, Epochs):
        held = f"validation on {sum(batch.examples for batch in validation.epochs[0])} lines after each"
    elif validation is not None:
        held = "validation after each"
    epochs = f"{len(packed)} epoch{'s' if len(packed) > 1 else ''}"
    return f"{len(encoded.tokens)} lines, {epochs} of {batches} batches{made}; {held}."


def _progress(tuner, callbacks, epochs: int, steps: Any, verbose: int) -> list[keras.callbacks.Callback]:
    given = any(isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks)
    return [ProgressLine(tuner, epochs, steps, verbose)] if verbose and not given else []


class _Run:
    """One training on lines, from its start or from a checkpoint.

    Args:
        tuner: The `FineTuner`.
        data: Its epochs.
        callbacks: The caller's callbacks.
        found: The run folder's checkpoint, or None.
        record: What describes the training.
        epochs: Integer, the number of the last epoch.
    """

    def __init__(self, tuner: FineTuner, data: Epochs, callbacks, found, record: dict[str, Any], epochs: int):
        self.tuner, self.data, self.found, self.epochs, self.record = tuner, data, found, epochs, record
        self.callbacks = list(callbacks)
        if not any(isinstance(callback, keras.callbacks.History) for callback in self.callbacks):
            self.callbacks.append(keras.callbacks.History())
        self.step = found.step if found else 0
        self.ended = epochs_ended(found, data.ends)
        old = found is not None and found.epochs is None  # a file that does not say
        self.finished = bool(found and (found.finished or (old and self.ended == len(data.epochs))))
        tokens = [int(np.count_nonzero(batch.weights)) for one in data.epochs for batch in one]
        path = tuner.run_dir / "training.jsonl" if tuner.run_dir else None
        tuner.log = TrainingLog(path, tokens, found.log if found else None)
        self.checkpoints: Checkpoints | None = None
        if tuner.run_dir:
            self.checkpoints = Checkpoints(
                tuner, record, tuner.log, data.ends, data.first, tuner.checkpoint_seconds, found
            )
            self.checkpoints.watch(self.callbacks)
            write_json_atomic(tuner.run_dir / "training_settings.json", record)

    def where(self) -> str:
        """Where the run of the folder stands."""
        of = f"{self.data.ends[-1]}"
        if not self.finished:
            return f"{self.tuner.run_dir}: the run goes on after step {self.step} of {of}."
        stopped = f"; a callback stopped it after step {self.step}" if self.step < self.data.ends[-1] else ""
        return f"{self.tuner.run_dir}: the run is finished{stopped} of {of}."

    def history(self) -> keras.callbacks.History:
        """Keras's `History` as the checkpoint has it."""
        history = next(one for one in self.callbacks if isinstance(one, keras.callbacks.History))
        history.set_model(self.tuner)
        self.tuner.history = history
        if self.checkpoints:
            self.checkpoints.give_back_states()
        return history

    def fit(self, keras_fit: _Fit, verbose: int, **given: Any) -> keras.callbacks.History:
        """Trains what is left."""
        tuner, first = self.tuner, self.data.first
        steps = {first + place: len(one) for place, one in enumerate(self.data.epochs)}
        line = _progress(tuner, self.callbacks, self.epochs, steps, verbose)
        after = [self.checkpoints] if self.checkpoints else []
        more = {"model": tuner, "epochs": self.epochs, "steps": len(self.data), "verbose": verbose}
        before = [StepEnds(tuner), tuner.log, *line]
        run = running.RunningCallbacks(before, self.callbacks, after, self.data, **more)
        # A run that a callback had stopped when it was killed has only its end to do.
        begin = self.epochs if self.found and self.found.stopped else first + self.ended
        given |= {"callbacks": run, "epochs": self.epochs, "initial_epoch": begin, "verbose": verbose}
        try:
            return keras_fit(self.data, shuffle=False, **given)
        except KeyboardInterrupt:
            if self.checkpoints:
                print(f"\nStopped. {self.checkpoints.state()} The same command or call goes on from there.")
            raise
        except (GemmaLoraError, OSError) as error:  # no number any more; a full disk
            if not self.checkpoints:
                raise
            raise GemmaLoraError(f"{str(error).rstrip('.')}. {self.checkpoints.state()}") from error
