"""LoRA adapters on disk: PEFT's folder of `adapter_config.json` and `adapter_model.safetensors`.

Hugging Face's PEFT stores `lora_A.weight` as (rank, d_in) and `lora_B.weight` as (d_out, rank), the transposes of
ours, under the module names of transformers' Gemma, and with DoRA `lora_magnitude_vector` as (d_out,). A
`template.json` beside them keeps the text around a prompt; PEFT ignores it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path, write_json_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.exchange.peft_folder import CONFIG, FACTORS, MAGNITUDE, TEMPLATE, WEIGHTS, AdapterFolder, read_folder
from gemma_lora.layers import linear
from gemma_lora.layers.places import PLACES, linear_places
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.apply import detach_lora, linear_layers, lora_layers
from gemma_lora.lora.dora import column_squares
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer


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
        raise ValueError(
            "`model` must be a KerasHub Gemma model or backbone: PEFT's format names a Gemma's modules. Save and load "
            "the weights of another model with its own `save_weights` and `load_weights`, LoRA included. "
            f"Received: {type(model).__name__}"
        )
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
            tensors[f"{name}.{MAGNITUDE}"] = np.asarray(slot.layer.magnitude, np.float32)
    folder = Path(folder)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    template = template or getattr(model, "gemma_lora_template", None)
    if template is not None:
        write_json_atomic(folder / TEMPLATE, template.to_dict())
    # The configuration last: a folder that has one is complete.
    write_json_atomic(folder / CONFIG, _config(adapted, base_model))
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
        GemmaLoraError: If a file is missing or damaged, a value in it is not what PEFT writes, the adapter is of a kind
            that is not read, a tensor fits no layer of this model, or the adapter changes nothing (every B is zero, and
            with DoRA every magnitude is the norm of its column). The model is then as it was, with the LoRA it had.
    """
    folder = Path(folder)
    places = {slot.module: slot for slot in slots(model)}
    read = read_folder(folder)
    if any(getattr(layer, "merged", False) for layer in lora_layers(model)):
        raise GemmaLoraError("The model holds a merged adapter. Call `unmerge_lora(model)` before another is loaded.")
    _check_fit(folder, read.modules, places)
    with _as_it_was_on_error(model):
        detach_lora(model)
        for variable in model.variables:
            variable.trainable = False
        for module, tensors in read.modules.items():
            slot = places[module]
            replace(slot.parent, slot.attribute, _new_layer(slot.layer, tensors, read))
    forget_programs(model)
    model.gemma_lora_template = read.template
    return model


def _new_layer(base: keras.layers.Layer, tensors: dict[str, np.ndarray], read: AdapterFolder) -> keras.layers.Layer:
    """LoRA around a linear layer, with the file's numbers."""
    settings = read.settings
    cls = LoRADense if isinstance(base, keras.layers.Dense) else LoRAEinsumDense
    layer = cls(
        base, read.rank, alpha=settings.alpha, dropout=settings.dropout, rslora=settings.rslora, dora=settings.dora
    )
    layer.lora_a.assign(tensors["lora_A"].T)
    layer.lora_b.assign(tensors["lora_B"].T)
    if settings.dora:
        layer.magnitude.assign(tensors[MAGNITUDE])
    return layer


@contextlib.contextmanager
def _as_it_was_on_error(model: keras.Model) -> Iterator[None]:
    """Puts layers, activations and trainable flags back if the block inside ends with an error.

    What a folder says is checked before. This is for the rest: memory that runs out, Ctrl-C half-way.
    """
    held = list(linear_layers(model))
    bases = [_without_lora(layer) for _, _, layer in held]
    activations = [base.activation for base in bases]
    trainable = [(variable, variable.trainable) for variable in model.variables]
    try:
        yield
    except BaseException:
        for parent, attribute, layer in held:
            if getattr(parent, attribute) is not layer:
                replace(parent, attribute, layer)
        for base, activation in zip(bases, activations, strict=True):
            base.activation = activation
        for variable, flag in trainable:
            variable.trainable = flag
        raise


def _check_fit(folder: Path, modules: dict[str, dict[str, np.ndarray]], places: dict[str, Slot]) -> None:
    unmatched = [module for module in modules if module not in places]
    if unmatched or not modules:
        what = f"{len(unmatched)} of {len(modules)} modules, {unmatched[0]} first," if unmatched else "nothing in it"
        raise GemmaLoraError(f"{folder}: {what} match no layer of this model. The adapter is for another model.")
    for module, tensors in modules.items():
        a, b = (tensors[name] for name in FACTORS)
        d_in, d_out = linear.matrix_shape(_without_lora(places[module].layer))
        if a.shape[1:] != (d_in,) or b.shape != (d_out, a.shape[0]):
            raise GemmaLoraError(
                f"{folder}: {module} has A {a.shape} and B {b.shape}; this model needs A (rank, {d_in}) and "
                f"B ({d_out}, rank). The adapter is for another model."
            )
        if MAGNITUDE in tensors and tensors[MAGNITUDE].shape != (d_out,):
            raise GemmaLoraError(
                f"{folder}: {module} has a magnitude {tensors[MAGNITUDE].shape}; this model needs ({d_out},). "
                "The adapter is for another model."
            )
    if not any(_changes(tensors, places[module]) for module, tensors in modules.items()):
        raise GemmaLoraError(f"{folder}: the adapter changes nothing (every lora_B is zero). It was never trained.")


def _without_lora(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A linear layer itself, where LoRA may stand around it."""
    return layer.base if isinstance(layer, LoRALayer) else layer


def _changes(tensors: dict[str, np.ndarray], slot: Slot) -> bool:
    """Whether a module's adapter changes what the layer gives."""
    if np.any(tensors["lora_B"]) or MAGNITUDE not in tensors:
        return bool(np.any(tensors["lora_B"]))
    norms = np.sqrt(column_squares(linear.kernel_matrix(_without_lora(slot.layer))))
    return not np.allclose(tensors[MAGNITUDE], norms, rtol=1e-4)
