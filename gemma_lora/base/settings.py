"""Every default of the project, and what each value may be: the one place.

`Settings` is what `gemma-lora finetune` is asked for; the command line's options are made from its fields.
`apply_lora`, `FineTuner` and `load_gemma` take their defaults from `DEFAULTS` and check their arguments with `check`,
so the same value gives the same message everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

#: The built-in reference, which needs no account and no model hub.
BUILTIN_NAME = "gemma3-270m"
#: A Gemma block's seven linear layers, in the block's order; `"all-linear"` means all of them.
TARGET_NAMES = ("query", "key", "value", "attention_output", "gate", "up", "down")
#: What `max_new_tokens=None` means where no right answers say how long an answer is.
MOST_NEW_TOKENS = 128
#: What it means at least where they do.
LEAST_NEW_TOKENS = 16
#: Tokens that a chat may have, answers included, before it says so: what every Gemma was trained for.
CONTEXT_LENGTH = 8192

#: The share of tokens that are replay, where lines are shown more than once and nobody says another.
REPLAY_SHARE = 0.1

#: Types of GGUF files that the `gguf` library writes.
GGUF_TYPES = ("F16", "F32", "BF16", "Q8_0")
#: Formats of `export` -> the types that its weights may be stored in, the default first; None: as the model holds them.
EXPORT_FORMATS: dict[str, tuple[str | None, ...]] = {
    "huggingface": (None, "F32", "BF16"),
    "gguf": (
        *GGUF_TYPES,
        # llama.cpp's own quantizer makes these; those that need an importance matrix are left out.
        *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M"),
        *("Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
    ),
    "gguf-lora": ("F32", "F16"),
}
#: Where `serve` listens, and the seconds that a client waits for an answer.
SERVER_PORT, SERVER_TIMEOUT = 8000, 120.0

Quantization = Literal["nf4", "int8", "int4", "gguf"]
Dtype = Literal["float32", "bfloat16"]
Metric = Literal["exact", "json", "classification", "text", "loss"]


def _setting(default: Any, help: str, **more: Any) -> Any:
    """A field of `Settings`.

    Args:
        default: Its default.
        help: What the command line says about it.
        more: `min` and `max`, `above` and `below`: bounds, the first two included. `flag`: the option switches on and
            has no `--no-` form. `option=False`: the command line does not offer it.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of a fine-tuning job. Defaults were chosen on the expenses' validation lines.

    Invariants: every value is of its field's type and within its bounds; numbers are finite; `targets` is
    `"all-linear"` or a tuple in the block's order. None means: chosen for this machine, these shapes or these lines.

    Raises:
        ValueError: If a value is not what its field takes. It names the field, what was expected and what came.

    Example:

    >>> Settings(rank=4, targets="down,query").targets
    ('query', 'down')
    >>> Settings(epochs=0)
    Traceback (most recent call last):
    ValueError: `epochs` must be an integer of at least 1, or None. Received: epochs=0
    """

    data: str = _setting(
        "data/expenses",
        "A folder with train.jsonl, or a file: JSONL, JSON, CSV or Parquet (prompt/response, Alpaca, ShareGPT, chat).",
    )
    validation: str | None = _setting(
        None, "A file with the validation lines; by default the folder's, else a share of the training lines."
    )
    template: str | None = _setting(
        None,
        "The text around a prompt: a template.json, or base or chat; by default the folder's template.json, else what "
        "goes with the weights.",
    )
    run_dir: str = _setting("runs/expenses", "Where adapter, settings, metrics and report go.")
    model: str = _setting(
        BUILTIN_NAME, f"{BUILTIN_NAME}, a .gguf file, a KerasHub preset name, hf://owner/name, or a preset folder."
    )
    dtype: Dtype = _setting("float32", "float32 or bfloat16: weights and activations.", option=False)
    quantization: Quantization | None = _setting(
        None, "QLoRA: what the frozen weights are kept in; gguf keeps a GGUF file's own blocks."
    )
    double_quant: bool = _setting(False, "With nf4: its scales in 8 bits too.", flag=True)
    rank: int = _setting(16, "Rank of the update.", min=1)
    alpha: float | None = _setting(None, "Scaling is alpha/rank; 2 * rank by default.", above=0)
    targets: tuple[str, ...] | str = _setting(
        "all-linear", f"Comma-separated: {', '.join(TARGET_NAMES)}; or all-linear."
    )
    dropout: float = _setting(0.0, "Dropout on the update's input, below 1.", min=0, below=1)
    rslora: bool = _setting(False, "Scale by alpha/sqrt(rank).", flag=True)
    dora: bool = _setting(False, "DoRA: train the length of a kernel's columns apart from their direction.", flag=True)
    learning_rate: float = _setting(5e-4, "Peak rate of Adam.", above=0)
    warmup: float = _setting(0.06, "Share of the steps in which the rate rises, below 1.", min=0, below=1)
    epochs: int | None = _setting(
        None, "Passes over the training lines; by default more passes where there are fewer lines, 1 to 6.", min=1
    )
    limit: int | None = _setting(None, "Train on the first so many lines only.", min=1)
    keep_best: bool = _setting(True, "Keep the epoch whose loss on the validation lines is lowest, not the last one.")
    patience: int = _setting(2, "With keep-best: stop after so many epochs in a row that are no better.", min=1)
    validation_lines: int = _setting(256, "Validation lines whose loss is computed after each epoch.", min=1)
    replay: float | None = _setting(
        None,
        "Share of the training tokens that is text of the base model's own, against forgetting, below 1; by default "
        f"{REPLAY_SHARE} with more than one epoch, else 0.",
        min=0,
        below=1,
    )
    rows: int = _setting(1, "Packed rows a batch.", min=1)
    row_length: int = _setting(384, "Tokens a packed row; the longest line must fit.", min=2)
    chunk_size: int | None = _setting(
        None, "Tokens whose loss is computed together; by default what fits the batches.", min=1
    )
    accumulate: int = _setting(1, "Batches whose gradients make one step.", min=1)
    remat: bool = _setting(False, "Compute activations twice: less memory, more time.", flag=True)
    mixed_precision: bool | None = _setting(
        None,
        "Form large products in bfloat16, with sums in float32, while training and in the report. "
        "By default where the machine is faster at it.",
    )
    filter_gradient: bool | None = _setting(
        None,
        "Leave tokens that have next to no probability out of the loss's gradient. By default where that is faster.",
    )
    checkpoint_seconds: float = _setting(30.0, "Seconds between checkpoints.", min=0)
    # JAX's keys are made of 32 bits, and layer i starts from seed + i.
    seed: int = _setting(0, "Start of A and order of the lines.", min=0, max=2**31 - 1)
    shots: int = _setting(4, "Training lines that the base model is shown in its prompt.", min=0)
    base_lines: int = _setting(64, "Lines of each split that the base model answers.", min=1)
    max_new_tokens: int | None = _setting(
        None,
        "The most tokens of an answer; by default what the longest right answer needs, or 128 where there is none.",
        min=1,
    )
    metric: Metric | None = _setting(
        None,
        "What answers are scored by: exact, json, classification, text (chrF) or loss. "
        "By default what suits the right answers.",
    )
    batch_size: int = _setting(64, "Prompts answered together.", min=1)
    skip_bad_lines: bool = _setting(False, "Count bad lines instead of stopping.", flag=True)
    evaluate_base: bool = _setting(True, "Let the base model answer as well, to compare with.")

    def __post_init__(self):
        for name, value in check(**vars(self)).items():
            object.__setattr__(self, name, value)  # as `check` writes it; the dataclass is frozen


@dataclasses.dataclass(frozen=True)
class Answering:
    """How the next token of an answer is chosen: options of `gemma-lora generate` and `chat`.

    Invariants: every value is of its field's type and within its bounds; `top_k` and `top_p` are None at temperature 0.

    Raises:
        ValueError: If a value is not what its field takes, or `top_k` or `top_p` would not be used.

    Example:

    >>> Answering(temperature=1).temperature
    1.0
    >>> Answering(top_k=5)
    Traceback (most recent call last):
    ValueError: `top_k` and `top_p` say what is drawn from. Give a `temperature` above 0 too. Received: temperature=0.0
    """

    temperature: float = _setting(0.0, "0 takes the likeliest token each time; above 0, tokens are drawn.", min=0)
    top_k: int | None = _setting(None, "Draw from the so many likeliest tokens only.", min=1)
    top_p: float | None = _setting(
        None, "Draw from the likeliest tokens only that have this probability together.", above=0, max=1
    )
    seed: int = _setting(0, "The same seed draws the same answer.", min=0, max=2**31 - 1)

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, _checked(name, value, answering=True))
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise ValueError(
                "`top_k` and `top_p` say what is drawn from. Give a `temperature` above 0 too. "
                f"Received: temperature={self.temperature}"
            )


#: The fields by name, in order.
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
#: The fields of `Answering` by name, in order.
ANSWERING_FIELDS = {field.name: field for field in dataclasses.fields(Answering)}


def check(**values: Any) -> dict[str, Any]:
    """Checks values of some settings, by name, with the rules and messages of `Settings`.

    Args:
        values: Names of `Settings`' fields, each with a value. Rules between two settings hold if both are given.

    Returns:
        The values as `Settings` holds them: an integer where a float is due becomes one, a path becomes text,
        `targets` become a tuple.

    Raises:
        ValueError: If a value is not what its field takes.

    Example:

    >>> check(rank=8, alpha=16)
    {'rank': 8, 'alpha': 16.0}
    >>> check(double_quant=True, quantization="int8")
    Traceback (most recent call last):
    ValueError: `double_quant` goes with `quantization` nf4. Give both, or neither. Received: quantization='int8'
    """
    checked = {name: _checked(name, value) for name, value in values.items()}
    if checked.get("double_quant") and checked.get("quantization", "nf4") != "nf4":
        raise ValueError(
            "`double_quant` goes with `quantization` nf4. Give both, or neither. "
            f"Received: quantization={checked['quantization']!r}"
        )
    if checked.get("remat") and checked.get("dropout"):
        raise ValueError(
            "`remat` computes a block twice, and `dropout` would differ. Use one of the two. "
            f"Received: dropout={checked['dropout']!r}"
        )
    return checked


def target_names(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Checks `targets` and returns them as a tuple in the block's order.

    Args:
        targets: `"all-linear"`, or any of query, key, value, attention_output, gate, up, down, in a sequence or
            separated by commas. Other Keras models have names of their own: `layer_patterns`.

    Raises:
        ValueError: If a name is unknown or none is given.
    """
    if isinstance(targets, str) and targets == "all-linear":
        return TARGET_NAMES
    try:
        names = tuple(part.strip() for part in targets.split(",")) if isinstance(targets, str) else tuple(targets)
    except TypeError:  # neither text nor a sequence
        names = ()
    if not names or any(name not in TARGET_NAMES for name in names):
        raise ValueError(
            f"`targets` must name layers among {', '.join(TARGET_NAMES)}, or be 'all-linear'. "
            f"Received: targets={targets!r}"
        )
    return tuple(name for name in TARGET_NAMES if name in names)


def export_type(format: str, kind: str | None = None) -> str | None:
    """Checks what `export` is asked for.

    Args:
        format: One of `EXPORT_FORMATS`.
        kind: What weights are to be stored in; letters may be small.

    Returns:
        The type in capital letters, the format's default where none is given.

    Raises:
        ValueError: If either is not known.

    Example:

    >>> export_type("gguf", "q8_0"), export_type("gguf")
    ('Q8_0', 'F16')
    """
    if format not in EXPORT_FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(EXPORT_FORMATS)}. Received: format={format!r}")
    kinds = EXPORT_FORMATS[format]
    found = kinds[0] if kind is None else str(kind).upper()
    if found not in kinds:
        known = ", ".join(one for one in kinds if one)
        raise ValueError(f"`type` of the format {format} must be one of {known}. Received: type={kind!r}")
    return found


def layer_patterns(patterns: str | Sequence[str], argument: str = "targets") -> tuple[str, ...]:
    """Checks names and patterns of a plain Keras model's layers, which the model alone can say more about.

    Args:
        patterns: Names or patterns, in a sequence or separated by commas; `"all-linear"` stays as it is.
        argument: What the message calls them.

    Returns:
        The patterns, each once, in the order given.

    Raises:
        ValueError: If there is none, or one is not text.

    Example:

    >>> layer_patterns("first, block_*/dense")
    ('first', 'block_*/dense')
    """
    try:
        given = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    except TypeError:  # neither text nor a sequence
        given = []
    names = [name.strip() if isinstance(name, str) else "" for name in given]
    if not names or not all(names):
        raise ValueError(
            f"`{argument}` must be names or patterns of layers, such as 'dense' or 'block_*/dense'. "
            f"Received: {argument}={patterns!r}"
        )
    return tuple(dict.fromkeys(names))


def _checked(name: str, value: Any, answering: bool = False) -> Any:
    """One value, as `Settings` or `Answering` holds it."""
    of, fields = (Answering, ANSWERING_FIELDS) if answering else (Settings, FIELDS)
    if name not in fields:
        raise TypeError(f"no setting is called {name!r}. There are {', '.join(fields)}.")
    if name == "targets":
        return value if isinstance(value, str) and value == "all-linear" else target_names(value)
    kind, optional = _kind(of, name)
    if value is None and optional:
        return None
    held = _as_kind(kind, value)
    if held is None or not _within(held, fields[name].metadata):
        what = _expected(kind, fields[name].metadata) + (", or None" if optional else "")
        raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")
    return held


@functools.cache
def _kind(of: type, name: str) -> tuple[Any, bool]:
    """A field's type without None, and whether None is allowed."""
    hint = typing.get_type_hints(of)[name]
    if typing.get_origin(hint) is not types.UnionType and typing.get_origin(hint) is not typing.Union:
        return hint, False
    (kind,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return kind, True


def _as_kind(kind: Any, value: Any) -> Any:
    """The value in the field's type; None if it is of another."""
    truth = isinstance(value, bool)  # which Python counts among the integers
    if kind is bool:
        return value if truth else None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) and not truth else None
    if kind is float:
        return _finite(value) if isinstance(value, numbers.Real) and not truth else None
    if kind is str:
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        return text if isinstance(text, str) and text else None
    return value if isinstance(value, str) and value in typing.get_args(kind) else None  # a Literal


def _finite(value: numbers.Real) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


#: A bound's name -> how a value meets it, and the words for it.
_BOUNDS = {
    "min": (lambda value, bound: value >= bound, "of at least {}"),
    "above": (lambda value, bound: value > bound, "above {}"),
    "max": (lambda value, bound: value <= bound, "of at most {}"),
    "below": (lambda value, bound: value < bound, "below {}"),
}


def _within(value: Any, metadata: typing.Mapping[str, Any]) -> bool:
    return all(meets(value, metadata[name]) for name, (meets, _) in _BOUNDS.items() if name in metadata)


def _expected(kind: Any, metadata: typing.Mapping[str, Any]) -> str:
    """What a field takes, in words: "an integer of at least 1"."""
    nouns = {bool: "True or False", int: "an integer", float: "a finite number", str: "text that is not empty"}
    noun = nouns.get(kind) or f"one of {', '.join(typing.get_args(kind))}"
    bounds = [words.format(metadata[name]) for name, (_, words) in _BOUNDS.items() if name in metadata]
    return f"{noun} {' and '.join(bounds)}".strip()


#: What every entrance does by default.
DEFAULTS = Settings()
