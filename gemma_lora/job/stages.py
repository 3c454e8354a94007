"""The slow parts of a job: the model, its answers before, the training, its answers after.

Importing this imports JAX and Keras; `finetuning.py` does so once settings, paths and data have been checked.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from gemma_lora.base import hardware
from gemma_lora.base.files import write_json_atomic
from gemma_lora.base.hardware import machine, peak_memory_bytes, use_compilation_cache
from gemma_lora.base.settings import MOST_NEW_TOKENS, Settings
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.encoding import Encoded, encode
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import template_of, template_reason
from gemma_lora.exchange.peft import save_adapter
from gemma_lora.gemma.load import BUILTIN_NAME, BUILTIN_NOTE, load_gemma
from gemma_lora.generation.base_text import COUNT, base_text
from gemma_lora.generation.classes import classes_of
from gemma_lora.generation.evaluation import answer, reference_losses, tokens_needed
from gemma_lora.generation.likelihood import english_text, perplexity
from gemma_lora.generation.metrics import Scores, score
from gemma_lora.generation.worked_examples import separator_of
from gemma_lora.job.folder import read_json
from gemma_lora.job.report import progress_bar
from gemma_lora.lora.apply import apply_lora
from gemma_lora.training.best import KeepBest
from gemma_lora.training.epochs import default_epochs
from gemma_lora.training.replay import default_share
from gemma_lora.training.tuner import FineTuner

#: The splits that the base model is scored on too, if the dataset has them.
BASE_SPLITS = ("validation", "test", "test_unseen")
_LORA = ("rank", "alpha", "targets", "dropout", "rslora", "dora", "seed")
_TUNER = (
    *("learning_rate", "warmup", "rows", "row_length", "chunk_size", "accumulate", "remat"),
    *("mixed_precision", "filter_gradient", "checkpoint_seconds", "seed"),
)

Splits = dict[str, list[Example]]


def load_model(settings: Settings, console: Console):
    """The job's model, as `load_gemma` gives it."""
    use_compilation_cache()
    console.print(f"Loading {escape(settings.model)} …")
    names = ("dtype", "quantization", "double_quant")
    model = load_gemma(settings.model, **{name: getattr(settings, name) for name in names})
    if settings.model == BUILTIN_NAME:
        console.print(f"[dim]{BUILTIN_NOTE}[/]")
    return model


def with_template(dataset: Dataset, model, console: Console) -> Dataset:
    """The dataset with the template that is used; says which that is, and why."""
    console.print(template_reason(model, dataset.template, dataset.template_origin), markup=False, highlight=False)
    return dataclasses.replace(dataset, template=template_of(model, dataset.template))


def encode_lines(dataset: Dataset, model, settings: Settings, console: Console) -> Encoded:
    """The training lines as tokens: bad lines, too long ones among them, are found before the slow work begins."""
    tokenizer, skip = model.preprocessor.tokenizer, settings.skip_bad_lines
    encoded = encode(dataset.train, tokenizer, dataset.template, settings.row_length, skip_bad_lines=skip)
    if encoded.skipped:
        console.print(f"[yellow]{escape(encoded.skipped_summary)}[/]")
    return encoded


def choose(
    settings: Settings, encoded: Encoded, dataset: Dataset, model, console: Console
) -> tuple[Settings, dict[str, Any]]:
    """What the settings leave open and this job decides.

    Returns:
        The settings with values in place of None, and those values by name.
    """
    chosen: dict[str, Any] = {}
    if settings.epochs is None:
        lines = len(encoded.tokens[: settings.limit])
        chosen["epochs"] = default_epochs(lines)
        passes = f"{chosen['epochs']} epoch{'s' if chosen['epochs'] > 1 else ''}"
        console.print(f"{passes}, for there are {lines} training lines; --epochs sets another number.", highlight=False)
    if settings.replay is None:
        chosen["replay"] = default_share(chosen.get("epochs") or settings.epochs or 1)
    precision = hardware.choose(settings.mixed_precision, settings.filter_gradient, settings.dtype)
    console.print(f"{str(precision)[0].upper()}{str(precision)[1:]}.", highlight=False)
    for name in ("mixed_precision", "filter_gradient"):
        if getattr(settings, name) is None:
            chosen[name] = getattr(precision, name)
    if settings.max_new_tokens is None:  # what is answered may need more than what is learned
        asked = [line for split in dataset.tests.values() for line in split] or dataset.validation
        template = template_of(model, dataset.template)
        need = tokens_needed(asked, model.preprocessor.tokenizer, template, encoded.loss_mask)
        chosen["max_new_tokens"] = need
    return dataclasses.replace(settings, **chosen), chosen


def answers_before(
    model, dataset: Dataset, tests: Splits, settings: Settings, console: Console
) -> tuple[dict[str, Scores], float]:
    """The base model's scores and its perplexity; from `before.json` where a run that was stopped left them."""
    path = Path(settings.run_dir) / "before.json"
    if path.exists():
        stored = read_json(path)
        console.print("[dim]The base model's answers are from before.json.[/]")
        labels = class_names(dataset, settings.metric)
        again = {
            name: _scored_again(tests[name], scores, settings.metric, labels)
            for name, scores in stored["scores"].items()
        }
        return again, stored["english_perplexity"]
    scores: dict[str, Scores] = {}
    if settings.evaluate_base:
        # What the base cannot do is seen on fewer lines, too; `count` in the scores says on how many.
        main = {name: examples for name, examples in tests.items() if name in BASE_SPLITS} or tests
        main = {name: examples[: settings.base_lines] for name, examples in main.items()}
        what = f"base, {settings.shots} examples shown"
        scores = answer_all(model, main, dataset, settings, console, what, dataset.train[: settings.shots])
    english = perplexity(model, english_text())
    stored_scores = {name: dataclasses.asdict(value) for name, value in scores.items()}
    write_json_atomic(path, {"scores": stored_scores, "english_perplexity": english})
    return scores, english


def class_names(dataset: Dataset, metric: str | None) -> list[str]:
    """The classes of all lines: one that is right for none of a small split's lines is a class all the same."""
    if metric != "classification":
        return []
    splits = [dataset.train, dataset.validation, *dataset.tests.values()]
    return classes_of([line.response for split in splits for line in split])


def _scored_again(split: list[Example], stored: dict[str, Any], metric: str | None, labels: list[str]) -> Scores:
    """The scores of stored answers. Answers are what took time; scores may have been of another version's form."""
    answers, cut = stored["answers"], set(stored.get("cut_lines", ()))
    references = [example.response for example in split[: len(answers)]]
    kept = [number in cut for number in range(len(answers))]
    return score(answers, references, metric, kept, stored.get("losses"), labels)


def base_texts(model, settings: Settings, console: Console) -> list[np.ndarray]:
    """The base model's own text, for replay; from `replay.json` where a run that was stopped left it."""
    path = Path(settings.run_dir) / "replay.json"
    if path.exists():
        return [np.asarray(ids, np.int32) for ids in read_json(path)["texts"]]
    with progress_bar(console, "text of the base model's own, against forgetting", COUNT) as advance:
        texts = base_text(model, seed=settings.seed, on_progress=advance)
    write_json_atomic(path, {"texts": [ids.tolist() for ids in texts]})
    return texts


def train(
    model, dataset: Dataset, settings: Settings, console: Console, encoded: Encoded | None = None
) -> tuple[list[dict[str, Any]], float, dict[str, Any]]:
    """Gives the model LoRA, trains it and saves the adapter.

    Args:
        model: As `load_model` gives it.
        dataset: The lines, with the template that is used.
        settings: With values in place of None, where `choose` made them.
        console: Where progress is shown.
        encoded: What `encode_lines` gave.

    Returns:
        The training log's rows, the seconds it took, and what the epochs did: `epochs` (that were trained),
        `training_loss` and `validation_loss` of each, `best_epoch` (counted from 1; None where none was looked for),
        `kept_epoch` (whose weights the adapter has), `planned_epochs`, and whether it `stopped_early`.
    """
    replay = base_texts(model, settings, console) if settings.replay else None
    apply_lora(model, **{name: getattr(settings, name) for name in _LORA})
    tuner = FineTuner(model, run_dir=settings.run_dir, **{name: getattr(settings, name) for name in _TUNER})
    best = KeepBest(settings.patience)
    started = time.perf_counter()
    history = tuner.fit(
        dataset,
        epochs=settings.epochs,
        limit=settings.limit,
        skip_bad_lines=settings.skip_bad_lines,
        encoded=encoded,
        replay=replay,
        replay_share=settings.replay or 0.0,
        validation_data=dataset.validation[: settings.validation_lines],
        callbacks=[best] if settings.keep_best else [],
    )
    seconds = time.perf_counter() - started
    save_adapter(model, Path(settings.run_dir) / "adapter", template=dataset.template)
    losses = {name: [round(loss, 6) for loss in history.history.get(name, [])] for name in ("loss", "val_loss")}
    facts = {
        "epochs": len(history.epoch),
        "planned_epochs": settings.epochs,
        "kept_epoch": best.best_epoch or len(history.epoch),
        "training_loss": losses["loss"],
        "validation_loss": losses["val_loss"],
        "best_epoch": best.best_epoch,
        "stopped_early": best.stopped,
    }
    return (tuner.log.rows if tuner.log else []), seconds, facts


def answer_all(
    model,
    tests: Splits,
    dataset: Dataset,
    settings: Settings,
    console: Console,
    what: str,
    shots: Sequence[Example] | None = None,
) -> dict[str, Scores]:
    """Scores of every split. All are answered in one call: batches are full, and XLA compiles once.

    Args:
        model, dataset, settings, console: The job's.
        tests: What is answered.
        what: What the progress bar says.
        shots: Worked examples to show a model that was not tuned, or none of them; None for one that was.
    """
    examples = [example for split in tests.values() for example in split]
    template = template_of(model, dataset.template)
    # An answer ends where the next example would begin: at text that no answer of the task holds.
    separator = separator_of([line.response for line in dataset.train], template) if shots is not None else None
    with progress_bar(console, f"{', '.join(tests)}: {what}", len(examples)) as advance:
        given = answer(
            model,
            examples,
            template,
            max_new_tokens=settings.max_new_tokens or MOST_NEW_TOKENS,
            batch_size=settings.batch_size,
            on_progress=advance,
            mixed_precision=settings.mixed_precision,
            shots=shots or (),
            separator=separator,
        )
    losses = None
    if settings.metric == "loss":
        losses = [(line.loss, line.tokens) for line in reference_losses(model, examples, template)]
    labels = class_names(dataset, settings.metric)
    scores, start = {}, 0
    for name, split in tests.items():
        here = slice(start, start + len(split))
        references = [example.response for example in split]
        some = None if losses is None else losses[here]
        scores[name] = score(given.texts[here], references, settings.metric, given.cut[here], some, labels)
        start += len(split)
    return scores


def english_perplexity(model) -> float:
    """How surprised the model is by plain English that has nothing to do with the task."""
    return perplexity(model, english_text())


def circumstances(settings: Settings) -> dict[str, Any]:
    """What a run's metrics say about where it was made."""
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "model_note": BUILTIN_NOTE if settings.model == BUILTIN_NAME else None,
        "machine": machine(),
    }
