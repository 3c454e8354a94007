"""What a PEFT adapter folder holds, read and checked value by value; no model is needed or touched.

`adapter_config.json` is PEFT's `LoraConfig`, `adapter_model.safetensors` the factors. Ours are `template.json`, the
text around a prompt, and `base.json`, which says more of the base than PEFT's configuration has a field for: PEFT
warns of fields that it does not know.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template
from gemma_lora.exchange.peft_names import FACTORS, MAGNITUDE, TensorName, is_targeted, pattern_for, tensor_name
from gemma_lora.gemma.origin import Origin

CONFIG, WEIGHTS, TEMPLATE, BASE = "adapter_config.json", "adapter_model.safetensors", "template.json", "base.json"
#: Fields that change what an adapter computes, in a way that is not read: they must be absent, false or empty.
_UNREAD = {
    "fan_in_fan_out": "the factors' axes would be exchanged",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "modules_to_save": "whole modules are stored beside LoRA",
    "trainable_token_indices": "rows of the embedding are stored beside LoRA",
    "target_parameters": "LoRA is on parameters that are no linear layer's",
    "layer_replication": "the model has other blocks",
    "lora_bias": "a bias is stored beside LoRA",
    "use_qalora": "QALoRA averages the inputs",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base's kernels",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
#: Starts of A and B that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's
#: kernels before the training begins, so the factors belong to other kernels than the base's.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What `adapter_config.json` says.

    Invariants: `rank` is at least 1, or None where the file does not say; `alpha` is finite in float32; `dropout` is
    in [0, 1). `config` is the whole object; its `rank_pattern` and `alpha_pattern` hold such ranks and alphas.
    """

    rank: int | None
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModuleAdapter:
    """What a folder holds for one linear layer.

    Invariants: `lora_a` (rank, d_in) and `lora_b` (d_out, rank), as PEFT has them, are finite float32; rank is at
    least 1. `magnitude` (d_out,) is DoRA's, else None.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    magnitude: np.ndarray | None
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.lora_a)


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """A folder's content: its modules by transformers' name, and the base that it says it was trained on."""

    settings: AdapterSettings
    modules: dict[str, ModuleAdapter]
    template: Template | None
    base: Origin


def read_folder(folder: Path) -> AdapterFolder:
    """Reads and checks a PEFT adapter folder.

    Raises:
        GemmaLoraError: If a file is missing or damaged, a value is not what PEFT writes, or the adapter is of a kind
            that is not read.
    """
    settings = _read_settings(folder / CONFIG)
    names, tensors = _read_modules(folder / WEIGHTS, settings.dora)
    modules = {}
    for module, found in tensors.items():
        alpha = _check_module(folder, settings, names[module], found)
        modules[module] = ModuleAdapter(found["lora_A"], found["lora_B"], found.get(MAGNITUDE), alpha)
    if modules and not settings.dora and not any(module.alpha for module in modules.values()):
        raise GemmaLoraError(f"{folder / CONFIG}: lora_alpha is 0, so the adapter changes nothing.")
    if settings.rank is None and len({module.rank for module in modules.values()}) > 1:
        raise GemmaLoraError(f"{folder / CONFIG}: r is missing, and the modules' ranks differ. Save the adapter again.")
    base = _read_base(folder / BASE, settings.config.get("base_model_name_or_path"))
    return AdapterFolder(settings, modules, _read_template(folder / TEMPLATE), base)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GemmaLoraError(f"{path}: no such file. Give the folder that holds {CONFIG} and {WEIGHTS}.") from None
    except (ValueError, RecursionError) as error:
        raise GemmaLoraError(f"{path}: not JSON ({error}). Save the adapter again.") from error
    except OSError as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}).") from error


# --- the configuration -------------------------------------------------------------------------------------


def _read_settings(path: Path) -> AdapterSettings:
    config = _read_json(path)
    if not isinstance(config, dict):
        raise GemmaLoraError(f"{path}: must hold an object, PEFT's LoraConfig. Received: {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise GemmaLoraError(f"{path}: peft_type is {kind!r}; only 'LORA' adapters are read.")
    for name, reason in _UNREAD.items():
        if config.get(name) not in (None, False, {}, []):
            raise GemmaLoraError(f"{path}: {name} is {config[name]!r}, which is not supported: {reason}.")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise GemmaLoraError(
            f"{path}: init_lora_weights is {start!r}, which is not supported: it changes the base model's kernels. "
            "Convert the adapter with PEFT's `path_initial_model_for_weight_conversion`."
        )
    _check_patterns(path, config)
    return AdapterSettings(
        _rank(path, config["r"]) if "r" in config else None,
        _alpha(path, config.get("lora_alpha")),
        _dropout(path, config.get("lora_dropout", 0.0)),
        _boolean(path, config, "use_rslora"),
        _boolean(path, config, "use_dora"),
        config,
    )


def _check_patterns(path: Path, config: dict[str, Any]) -> None:
    """Raises where what names modules is not what PEFT takes."""
    for name, check in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise GemmaLoraError(f"{path}: {name} must be an object. Received: {type(patterns).__name__}")
        for pattern, value in patterns.items():
            check(path, value, f"{name} of {pattern!r}")
    for name in ("target_modules", "exclude_modules", "layers_to_transform"):
        value = config.get(name)
        kind = int if name == "layers_to_transform" else str
        entries = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(entry, kind) or isinstance(entry, bool) for entry in entries):
            raise GemmaLoraError(f"{path}: {name} must be null, one or a list of {kind.__name__}. Received: {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rank(path: Path, value: Any, name: str = "r") -> int:
    if not _is_number(value) or not isinstance(value, int) or value < 1:
        raise GemmaLoraError(f"{path}: {name} must be an integer of at least 1. Received: {value!r}")
    return value


def _alpha(path: Path, value: Any, name: str = "lora_alpha") -> float:
    largest = float(np.finfo(np.float32).max)  # JSON's 1e400 is inf in Python; 1e300 would be inf in the model
    if not _is_number(value) or not -largest <= value <= largest:  # NaN is not in the range either
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}…"
        raise GemmaLoraError(f"{path}: {name} must be a number that is finite in float32. Received: {shown}")
    return float(value)


def _dropout(path: Path, value: Any) -> float:
    # PEFT compares it with 0.0, so null is an error there too.
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise GemmaLoraError(f"{path}: lora_dropout must be a number in [0, 1). Received: {value!r}")
    return float(value)


def _boolean(path: Path, config: dict[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise GemmaLoraError(f"{path}: {name} must be true or false. Received: {value!r}")
    return value


# --- the tensors -------------------------------------------------------------------------------------------


def _read_modules(path: Path, dora: bool) -> tuple[dict[str, TensorName], dict[str, dict[str, np.ndarray]]]:
    """What a file holds: `{module: {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}}`, DoRA's vector (d_out,) too.

    Beside it the name of a tensor of each module.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise GemmaLoraError(f"{path}: no such file. PEFT writes it with safe_serialization=True.")
    try:
        tensors = load_file(path)
    except (SafetensorError, TypeError, KeyError, ValueError, OSError) as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}). Save the adapter again, in float32.") from error
    wanted = (*FACTORS, MAGNITUDE) if dora else FACTORS
    names: dict[str, TensorName] = {}
    modules: dict[str, dict[str, np.ndarray]] = {}
    owners = set()
    for name, tensor in tensors.items():
        read = tensor_name(name)
        if read is None:
            raise GemmaLoraError(f"{path}: tensor {name} is neither lora_A nor lora_B; it is not supported.")
        if read.factor == MAGNITUDE and not dora:
            raise GemmaLoraError(f"{path}: tensor {name} is DoRA's, but use_dora is not true in {CONFIG}.")
        if read.factor in modules.setdefault(read.module, {}):
            raise GemmaLoraError(f"{path}: holds {read.factor} of {read.module} twice, the second as {name}.")
        names.setdefault(read.module, read)
        if read.factor in FACTORS:  # a magnitude has kept its adapter's name in files where the factors have lost it
            owners.add(read.adapter)
        modules[read.module][read.factor] = _finite(path, name, tensor)
    if len(owners) > 1:
        shown = ", ".join(sorted(str(owner) for owner in owners))
        raise GemmaLoraError(f"{path}: holds tensors of several adapters ({shown}). Save each in a folder of its own.")
    for module, found in modules.items():
        if missing := [factor for factor in wanted if factor not in found]:
            raise GemmaLoraError(f"{path}: {module} lacks {' and '.join(missing)}. Save the adapter again.")
    return names, modules


def _finite(path: Path, name: str, tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        numbers = np.asarray(tensor, np.float32)
    if not np.isfinite(numbers).all():
        raise GemmaLoraError(f"{path}: tensor {name} holds numbers that are not finite in float32.")
    return numbers


def _check_module(folder: Path, settings: AdapterSettings, name: TensorName, tensors: dict[str, np.ndarray]) -> float:
    """A module's alpha; raises where its tensors are not what the configuration says of it."""
    config = settings.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        if not is_targeted(config, name.keys):
            raise GemmaLoraError(
                f"{folder}: {CONFIG} does not target {name.module}, which {WEIGHTS} holds; PEFT would leave it out. "
                "Save the adapter again."
            )
        rank, alpha = pattern_for(ranks, name.keys), pattern_for(alphas, name.keys)
    except re.error as error:
        raise GemmaLoraError(f"{folder / CONFIG}: {error.pattern!r} is no regular expression ({error}).") from error
    wanted = settings.rank if rank is None else ranks[rank]
    found = len(tensors["lora_A"]) if tensors["lora_A"].ndim else 0
    if found < 1 or (wanted is not None and found != wanted):
        said = f"r = {wanted}" if rank is None else f"rank_pattern {rank!r} with {wanted}"
        raise GemmaLoraError(
            f"{folder}: {name.module} has lora_A of rank {found}, but {CONFIG} has {said}. Save the adapter again."
        )
    return settings.alpha if alpha is None else float(alphas[alpha])


# --- what is said beside them --------------------------------------------------------------------------------


def _read_base(path: Path, name: Any) -> Origin:
    """The base that the folder names. Nothing is computed from it, so what is no name is left out."""
    known = name if isinstance(name, str) and name else None
    if not path.is_file():
        return Origin(known)
    more = _read_json(path)
    if not isinstance(more, dict):
        raise GemmaLoraError(f"{path}: must hold an object. Received: {type(more).__name__}")
    digest, kind = (more.get(field) for field in ("gguf_sha256", "gguf_type"))
    if not isinstance(digest, str | None) or not isinstance(kind, str | None):
        raise GemmaLoraError(f"{path}: gguf_sha256 and gguf_type must be text or null. Delete it, or save again.")
    return Origin(known, digest, kind)


def _read_template(path: Path) -> Template | None:
    if not path.is_file():
        return None
    try:
        return Template.from_dict(_read_json(path))
    except (ValueError, KeyError, TypeError) as error:
        raise GemmaLoraError(f"{path}: not a template ({error}). Save the adapter again.") from error
