"""LoRA adapters on disk: PEFT's folder of `adapter_config.json` and `adapter_model.safetensors`.

Hugging Face's PEFT stores `lora_A.weight` as (rank, d_in) and `lora_B.weight` as (d_out, rank), the transposes of
ours, under the module names of transformers' Gemma, and with DoRA `lora_magnitude_vector` as (d_out,). A
`template.json` beside them keeps the text around a prompt; PEFT ignores it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path, write_json_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.layers import linear
from gemma_lora.layers.places import PLACES, linear_places
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.apply import detach_lora, lora_layers
from gemma_lora.lora.dora import column_squares
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer

#: PEFT's names of what an adapter holds for a module; the last with DoRA only.
_FACTORS, _MAGNITUDE = ("lora_A", "lora_B"), "lora_magnitude_vector"
_CONFIG, _WEIGHTS, _TEMPLATE = "adapter_config.json", "adapter_model.safetensors", "template.json"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place of a Gemma where an adapter can sit."""

    target: str
    module: str  # transformers' name, "model.layers.0.self_attn.q_proj"
    parent: keras.layers.Layer
    attribute: str

    @property
    def layer(self) -> keras.layers.Layer:
        return getattr(self.parent, self.attribute)


def slots(model: keras.Model) -> Iterator[Slot]:
    """Yields every linear layer of a KerasHub Gemma's blocks with its name in transformers."""
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "transformer_layers"):
        raise ValueError(f"`model` must be a KerasHub Gemma model or backbone. Received: {type(model).__name__}")
    for number, block in enumerate(backbone.transformer_layers):
        for target, parent, attribute in linear_places(block):
            yield Slot(target, f"model.layers.{number}.{PLACES[target].transformers}", parent, attribute)


def save_adapter(
    model: keras.Model,
    folder: str | os.PathLike,
    template: Any = None,
    base_model: str = "google/gemma-3-270m",
) -> Path:
    """Writes a model's LoRA weights as a PEFT adapter folder.

    Args:
        model: A KerasHub Gemma with LoRA, merged or not.
        folder: Where `adapter_config.json`, `adapter_model.safetensors` and, with a template,
            `template.json` go. Each file is whole or absent.
        template: A `Template`; defaults to the one the model was fine-tuned or loaded with, if any.
        base_model: What PEFT is to load the adapter onto, a model-hub name or a path.

    Returns:
        The folder's path.

    Raises:
        GemmaLoraError: If the model has no LoRA layers.
    """
    from safetensors.numpy import save_file

    adapted = [slot for slot in slots(model) if isinstance(slot.layer, LoRALayer)]
    if not adapted:
        raise GemmaLoraError("The model has no LoRA layers to save. Call `apply_lora` first.")
    tensors = {}
    for slot in adapted:
        name = f"base_model.model.{slot.module}"
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(np.asarray(slot.layer.lora_a, np.float32).T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(np.asarray(slot.layer.lora_b, np.float32).T)
        if slot.layer.dora:
            tensors[f"{name}.{_MAGNITUDE}"] = np.asarray(slot.layer.magnitude, np.float32)
    folder = Path(folder)
    with atomic_path(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    template = template or getattr(model, "gemma_lora_template", None)
    if template is not None:
        write_json_atomic(folder / _TEMPLATE, template.to_dict())
    # The configuration last: a folder that has one is complete.
    write_json_atomic(folder / _CONFIG, _config(adapted, base_model))
    return folder


def _config(adapted: list[Slot], base_model: str) -> dict[str, Any]:
    """PEFT's LoraConfig as a dictionary."""
    layer = adapted[0].layer
    present = {slot.module for slot in adapted}
    targets = {slot.module.rsplit(".", 1)[1] for slot in adapted}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout_rate,
        "use_rslora": layer.rslora,
        "use_dora": layer.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": sorted({int(name.split(".")[2]) for name in present}),
        "target_modules": sorted(targets),
    }


def load_adapter(model: keras.Model, folder: str | os.PathLike) -> keras.Model:
    """Gives a model the LoRA layers of a PEFT adapter folder, in place of any it has, of either kind.

    Args:
        model: A KerasHub Gemma.
        folder: A folder written by `save_adapter` or by PEFT (LoRA or DoRA, safetensors).

    Returns:
        The same model; `model.gemma_lora_template` is the folder's template, or None.

    Raises:
        GemmaLoraError: If a file is missing or damaged, the adapter is of a kind that is not read, a tensor
            fits no layer of this model, or the adapter changes nothing (every B is zero, and with DoRA every
            magnitude is the norm of its column).
    """
    folder = Path(folder)
    config = _read_config(folder)
    dora = bool(config.get("use_dora"))
    modules = _read_modules(folder / _WEIGHTS, dora)
    places = {slot.module: slot for slot in slots(model)}
    if any(getattr(layer, "merged", False) for layer in lora_layers(model)):
        raise GemmaLoraError("The model holds a merged adapter. Call `unmerge_lora(model)` before another is loaded.")
    _check_fit(folder, modules, places)
    detach_lora(model)
    for variable in model.variables:
        variable.trainable = False
    for module, tensors in modules.items():
        slot = places[module]
        cls = LoRADense if isinstance(slot.layer, keras.layers.Dense) else LoRAEinsumDense
        layer = cls(
            slot.layer,
            tensors["lora_A"].shape[0],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            rslora=config.get("use_rslora", False),
            dora=dora,
        )
        layer.lora_a.assign(tensors["lora_A"].T)
        layer.lora_b.assign(tensors["lora_B"].T)
        if dora:
            layer.magnitude.assign(tensors[_MAGNITUDE])
        replace(slot.parent, slot.attribute, layer)
    forget_programs(model)
    model.gemma_lora_template = _read_template(folder)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GemmaLoraError(f"{path}: no such file. Give the folder that holds {_CONFIG} and {_WEIGHTS}.") from None
    except ValueError as error:
        raise GemmaLoraError(f"{path}: not JSON ({error}). Save the adapter again.") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise GemmaLoraError(f"{path}: peft_type is {kind!r}; only 'LORA' adapters are read.")
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(name) not in (None, {}, []):
            raise GemmaLoraError(f"{path}: {name} is {config[name]!r}, which is not supported.")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise GemmaLoraError(f"{path}: lora_alpha must be a number. Received: {config.get('lora_alpha')!r}")
    return config


def _read_modules(path: Path, dora: bool) -> dict[str, dict[str, np.ndarray]]:
    """What a file holds: `{module: {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}}`, DoRA's vector (d_out,) too."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise GemmaLoraError(f"{path}: no such file. PEFT writes it with safe_serialization=True.")
    try:
        tensors = load_file(path)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise GemmaLoraError(f"{path}: cannot be read ({error}). Save the adapter again, in float32.") from error
    wanted = (*_FACTORS, _MAGNITUDE) if dora else _FACTORS
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor == _MAGNITUDE and not dora:
            raise GemmaLoraError(f"{path}: tensor {name} is DoRA's, but use_dora is not true in {_CONFIG}.")
        if factor not in wanted:
            raise GemmaLoraError(f"{path}: tensor {name} is neither lora_A nor lora_B; it is not supported.")
        module = module.removeprefix("base_model.model.")
        # Multimodal Gemma 3 checkpoints nest the text model one level deeper.
        module = module.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
        modules.setdefault(module, {})[factor] = np.asarray(tensor, np.float32)
    for module, found in modules.items():
        if missing := [factor for factor in wanted if factor not in found]:
            raise GemmaLoraError(f"{path}: {module} lacks {' and '.join(missing)}. Save the adapter again.")
    return modules


def _check_fit(folder: Path, modules: dict[str, dict[str, np.ndarray]], places: dict[str, Slot]) -> None:
    unmatched = [module for module in modules if module not in places]
    if unmatched or not modules:
        what = f"{len(unmatched)} of {len(modules)} modules, {unmatched[0]} first," if unmatched else "nothing in it"
        raise GemmaLoraError(f"{folder}: {what} match no layer of this model. The adapter is for another model.")
    for module, tensors in modules.items():
        a, b = (tensors[name] for name in _FACTORS)
        d_in, d_out = linear.matrix_shape(_base(places[module]))
        if a.shape[1:] != (d_in,) or b.shape != (d_out, a.shape[0]):
            raise GemmaLoraError(
                f"{folder}: {module} has A {a.shape} and B {b.shape}; this model needs A (rank, {d_in}) and "
                f"B ({d_out}, rank). The adapter is for another model."
            )
        if _MAGNITUDE in tensors and tensors[_MAGNITUDE].shape != (d_out,):
            raise GemmaLoraError(
                f"{folder}: {module} has a magnitude {tensors[_MAGNITUDE].shape}; this model needs ({d_out},). "
                "The adapter is for another model."
            )
    if not any(_changes(tensors, places[module]) for module, tensors in modules.items()):
        raise GemmaLoraError(f"{folder}: the adapter changes nothing (every lora_B is zero). It was never trained.")


def _base(slot: Slot) -> keras.layers.Layer:
    """The linear layer in a place, without the LoRA that may stand around it."""
    return slot.layer.base if isinstance(slot.layer, LoRALayer) else slot.layer


def _changes(tensors: dict[str, np.ndarray], slot: Slot) -> bool:
    """Whether a module's adapter changes what the layer gives."""
    if np.any(tensors["lora_B"]) or _MAGNITUDE not in tensors:
        return bool(np.any(tensors["lora_B"]))
    norms = np.sqrt(column_squares(linear.kernel_matrix(_base(slot))))
    return not np.allclose(tensors[_MAGNITUDE], norms, rtol=1e-4)


def _read_template(folder: Path):
    from gemma_lora.data.templates import Template

    path = folder / _TEMPLATE
    if not path.is_file():
        return None
    try:
        return Template.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise GemmaLoraError(f"{path}: not a template ({error}). Save the adapter again.") from error
