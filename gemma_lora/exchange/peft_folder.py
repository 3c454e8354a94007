"""What a PEFT adapter folder holds, read and checked value by value; no model is needed or touched.

`adapter_config.json` is PEFT's `LoraConfig`, `adapter_model.safetensors` the factors, `template.json` ours: the text
around a prompt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template

CONFIG, WEIGHTS, TEMPLATE = "adapter_config.json", "adapter_model.safetensors", "template.json"
#: PEFT's names of what an adapter holds for a module; the last with DoRA only.
FACTORS, MAGNITUDE = ("lora_A", "lora_B"), "lora_magnitude_vector"
#: Fields that change what an adapter computes, in a way that is not read: they must be absent or empty.
_UNREAD = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
)
#: Starts of A and B that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, …) change the base's kernels too.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What `adapter_config.json` says of every LoRA layer.

    Invariants: `rank` is at least 1, or None where the file does not say; `alpha` is finite in float32; `dropout` is
    in [0, 1).
    """

    rank: int | None
    alpha: float
    dropout: float
    rslora: bool
    dora: bool


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """A folder's content.

    Invariants: every module has finite float32 `lora_A` (rank, d_in) and `lora_B` (d_out, rank), all of one rank of at
    least 1, and with DoRA `lora_magnitude_vector`.
    """

    settings: AdapterSettings
    rank: int
    modules: dict[str, dict[str, np.ndarray]]
    template: Template | None


def read_folder(folder: Path) -> AdapterFolder:
    """Reads and checks a PEFT adapter folder.

    Raises:
        GemmaLoraError: If a file is missing or damaged, a value is not what PEFT writes, or the adapter is of a kind
            that is not read.
    """
    settings = _read_settings(folder / CONFIG)
    modules = _read_modules(folder / WEIGHTS, settings.dora)
    rank = _common_rank(folder, settings.rank, modules)
    return AdapterFolder(settings, rank, modules, _read_template(folder / TEMPLATE))


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
    for name in _UNREAD:
        if config.get(name) not in (None, False, {}, []):
            raise GemmaLoraError(f"{path}: {name} is {config[name]!r}, which is not supported.")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise GemmaLoraError(
            f"{path}: init_lora_weights is {start!r}, which is not supported: it changes the base model's kernels. "
            "Convert the adapter with PEFT's `path_initial_model_for_weight_conversion`."
        )
    return AdapterSettings(
        _rank(path, config["r"]) if "r" in config else None,
        _alpha(path, config.get("lora_alpha")),
        _dropout(path, config.get("lora_dropout", 0.0)),
        _boolean(path, config, "use_rslora"),
        _boolean(path, config, "use_dora"),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rank(path: Path, value: Any) -> int:
    if not _is_number(value) or not isinstance(value, int) or value < 1:
        raise GemmaLoraError(f"{path}: r must be an integer of at least 1. Received: {value!r}")
    return value


def _alpha(path: Path, value: Any) -> float:
    largest = float(np.finfo(np.float32).max)  # JSON's 1e400 is inf in Python; 1e300 would be inf in the model
    if not _is_number(value) or not -largest <= value <= largest:  # NaN is not in the range either
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}…"
        raise GemmaLoraError(f"{path}: lora_alpha must be a number that is finite in float32. Received: {shown}")
    if value == 0:
        raise GemmaLoraError(f"{path}: lora_alpha is 0, so the adapter changes nothing.")
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


def _read_modules(path: Path, dora: bool) -> dict[str, dict[str, np.ndarray]]:
    """What a file holds: `{module: {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}}`, DoRA's vector (d_out,) too."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise GemmaLoraError(f"{path}: no such file. PEFT writes it with safe_serialization=True.")
    try:
        tensors = load_file(path)
    except (SafetensorError, TypeError, KeyError, ValueError, OSError) as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}). Save the adapter again, in float32.") from error
    wanted = (*FACTORS, MAGNITUDE) if dora else FACTORS
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor == MAGNITUDE and not dora:
            raise GemmaLoraError(f"{path}: tensor {name} is DoRA's, but use_dora is not true in {CONFIG}.")
        if factor not in wanted:
            raise GemmaLoraError(f"{path}: tensor {name} is neither lora_A nor lora_B; it is not supported.")
        module = module.removeprefix("base_model.model.")
        # Multimodal Gemma 3 checkpoints nest the text model one level deeper.
        module = module.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
        if factor in modules.setdefault(module, {}):
            raise GemmaLoraError(f"{path}: holds {factor} of {module} twice, the second as {name}.")
        modules[module][factor] = _finite(path, name, tensor)
    for module, found in modules.items():
        if missing := [factor for factor in wanted if factor not in found]:
            raise GemmaLoraError(f"{path}: {module} lacks {' and '.join(missing)}. Save the adapter again.")
    return modules


def _finite(path: Path, name: str, tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        numbers = np.asarray(tensor, np.float32)
    if not np.isfinite(numbers).all():
        raise GemmaLoraError(f"{path}: tensor {name} holds numbers that are not finite in float32.")
    return numbers


def _common_rank(folder: Path, rank: int | None, modules: dict[str, dict[str, np.ndarray]]) -> int:
    """The rank of all modules, which must be the configuration's `r` where that is given."""
    wanted = rank
    for module, tensors in modules.items():
        found = len(tensors["lora_A"]) if tensors["lora_A"].ndim else 0
        wanted = found if wanted is None else wanted
        if found != wanted or found < 1:
            said = f"{CONFIG} has r = {rank}" if rank is not None else f"another module has rank {wanted}"
            raise GemmaLoraError(f"{folder}: {module} has lora_A of rank {found}, but {said}. Save the adapter again.")
    return wanted or 0  # no module at all: the caller, who looks for their places, reports it


def _read_template(path: Path) -> Template | None:
    if not path.is_file():
        return None
    try:
        return Template.from_dict(_read_json(path))
    except (ValueError, KeyError, TypeError) as error:
        raise GemmaLoraError(f"{path}: not a template ({error}). Save the adapter again.") from error
