"""LoRA adapters on disk: PEFT's folder of `adapter_config.json` and `adapter_model.safetensors`.

Hugging Face's PEFT stores `lora_A.weight` as (rank, d_in) and `lora_B.weight` as (d_out, rank), the transposes of
ours, under the module names of transformers' Gemma, and with DoRA `lora_magnitude_vector` as (d_out,). Beside them
stand three files that PEFT ignores: `template.json` keeps the text around a prompt, `base.json` names the base more
exactly than PEFT's configuration can, and `README.md` is a card for people and hubs.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path, write_json_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.exchange.adapter_card import write_card
from gemma_lora.exchange.peft_folder import (
    BASE,
    CONFIG,
    TEMPLATE,
    WEIGHTS,
    AdapterFolder,
    AdapterSettings,
    ModuleAdapter,
    read_folder,
)
from gemma_lora.exchange.peft_names import MAGNITUDE, elsewhere
from gemma_lora.gemma.origin import Origin, origin_of
from gemma_lora.layers import linear
from gemma_lora.layers.places import Slot as Slot
from gemma_lora.layers.places import slots as slots
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.apply import as_it_was_on_error, detach_lora, lora_layers, without_lora
from gemma_lora.lora.dora import column_squares
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer
from gemma_lora.lora.named import add_adapter, has_names
from gemma_lora.lora.room import Adapter, LayerNumbers


def save_adapter(
    model: keras.Model,
    folder: str | os.PathLike,
    template: Any = None,
    base_model: str | None = None,
) -> Path:
    """Writes a model's LoRA weights as a PEFT adapter folder.

    Args:
        model: A KerasHub Gemma with LoRA, merged or not. Of several adapters the one in use is written; of a weighted
            sum of some, that sum.
        folder: Where `adapter_config.json`, `adapter_model.safetensors`, `base.json`, `README.md` and, with a
            template, `template.json` go. Each file is whole or absent. A `README.md` of somebody else's is left alone.
        template: A `Template`; defaults to the one the model was fine-tuned or loaded with, if any.
        base_model: What PEFT is to load the adapter onto, a model-hub name or a path. Defaults to the base that the
            adapter was trained on: what its folder named, or what `load_gemma` loaded; None where neither is known.

    Returns:
        The folder's path.

    Raises:
        GemmaLoraError: If the model has no LoRA layers, or their numbers are not finite, or they cannot be one adapter
            of PEFT's. Nothing is written then.
    """
    from safetensors.numpy import save_file

    with_lora = [slot for slot in slots(model) if isinstance(slot.layer, LoRALayer)]
    if not with_lora:
        raise GemmaLoraError("The model has no LoRA layers to save. Call `apply_lora` first.")
    adapted = [slot for slot in with_lora if slot.layer.used_rank]
    if not adapted:
        raise GemmaLoraError("No adapter is in use. Call `use_adapter(model, name)` with the one to save.")
    if others := [slot.module for slot in slots(model) if getattr(without_lora(slot.layer), "lora_enabled", False)]:
        raise GemmaLoraError(f"{others[0]} has Keras's own LoRA, which PEFT's format cannot hold. Nothing was written.")
    config, tensors = _config(adapted), _tensors(adapted)
    base = Origin(base_model) if base_model is not None else _base_of(model, adapted)
    folder = Path(folder)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    template = template or getattr(model, "gemma_lora_template", None)
    if template is not None:
        write_json_atomic(folder / TEMPLATE, template.to_dict())
    write_json_atomic(folder / BASE, {"gguf_sha256": base.gguf_sha256, "gguf_type": base.gguf_type})
    write_card(folder, base, config)
    # The configuration last: a folder that has one is complete.
    write_json_atomic(folder / CONFIG, config | {"base_model_name_or_path": base.name})
    return folder


def _base_of(model: keras.Model, adapted: list[Slot]) -> Origin:
    """The base that the adapter was trained on: what its folder said, else the model's own."""
    named = [slot.layer.trained_on for slot in adapted if slot.layer.trained_on is not None]
    return named[0] if named else origin_of(model)


def _tensors(adapted: list[Slot]) -> dict[str, np.ndarray]:
    """What goes into the file, in PEFT's names and axes."""
    tensors = {}
    for slot in adapted:
        name, layer = f"base_model.model.{slot.module}", slot.layer
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(
            np.asarray(layer.lora_a, np.float32).T[: layer.used_rank]
        )
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(
            np.asarray(layer.lora_b, np.float32).T[:, : layer.used_rank]
        )
        if layer.dora:
            tensors[f"{name}.{MAGNITUDE}"] = np.asarray(layer.magnitude, np.float32)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise GemmaLoraError(
                f"{name} holds numbers that are not finite; nothing was written. The training went wrong: lower the "
                "learning rate, and look at its log."
            )
    return tensors


def _config(adapted: list[Slot]) -> dict[str, Any]:
    """PEFT's LoraConfig as a dictionary, without the base's name."""
    layers = {slot.module.removeprefix("model."): slot.layer for slot in adapted}
    if len({layer.dora for layer in layers.values()}) > 1:
        raise GemmaLoraError("Some of the model's layers have DoRA and others LoRA; PEFT's format holds one kind.")
    rslora = all(layer.rslora for layer in layers.values())
    ranks = {name: layer.used_rank for name, layer in layers.items()}
    # Where the kinds of scaling are mixed, plain LoRA's alpha that gives the same factor is written.
    alphas = {
        n: layer.alpha if rslora == layer.rslora else layer.scaling * layer.used_rank for n, layer in layers.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    layer = adapted[0].layer
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": layer.dropout_rate,
        "use_rslora": rslora,
        "use_dora": layer.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        **_targets(list(layers)),
    }


def _targets(modules: list[str]) -> dict[str, Any]:
    """PEFT's fields for exactly these modules, `layers.0.self_attn.q_proj` and so on."""
    numbers = sorted({int(module.split(".")[1]) for module in modules})
    kinds = sorted({module.rsplit(".", 1)[1] for module in modules})
    if len(modules) == len(numbers) * len(kinds):  # the same kinds in each of these layers
        return {"layers_to_transform": numbers, "target_modules": kinds}
    return {"layers_to_transform": None, "target_modules": sorted(modules)}


def load_adapter(model: keras.Model, folder: str | os.PathLike, name: str | None = None) -> keras.Model:
    """Gives a model the LoRA layers of a PEFT adapter folder, in place of any it has, of either kind.

    Args:
        model: A KerasHub Gemma.
        folder: A folder written by `save_adapter` or by PEFT (LoRA or DoRA, safetensors).
        name: Text by which `use_adapter` finds it again. The model then keeps the adapters that have names, and this
            one is in use.

    Returns:
        The same model; `model.gemma_lora_template` is the folder's template, or None.

    Warns:
        UserWarning: If the folder names another base than this model's.

    Raises:
        GemmaLoraError: If a file is missing or damaged, a value in it is not what PEFT writes, the adapter is of a kind
            that is not read, a tensor fits no layer of this model, or the adapter changes nothing (every B is zero, and
            with DoRA every magnitude is the norm of its column), or the model has adapters with names and this gets
            none, or the other way round. The model is then as it was, with the LoRA it had.

    Example:

    >>> load_adapter(model, "runs/finance/adapter", name="finance")                         # doctest: +SKIP
    >>> load_adapter(model, "runs/sales/adapter", name="sales")                             # doctest: +SKIP
    >>> use_adapter(model, "finance")                                                       # doctest: +SKIP
    """
    folder = Path(folder)
    places = {slot.module: slot for slot in slots(model)}
    read = read_folder(folder)
    if any(getattr(layer, "merged", False) for layer in lora_layers(model)):
        raise GemmaLoraError("The model holds a merged adapter. Call `unmerge_lora(model)` before another is loaded.")
    _check_fit(folder, read.modules, places)
    if name is None and has_names(model):
        raise GemmaLoraError("The model's adapters have names. Give this one a `name`, or call `detach_lora(model)`.")
    _warn_of_another_base(folder, read.base, model)
    if name is not None:
        add_adapter(model, name, _as_adapter(read))
        return model
    with as_it_was_on_error(model):
        detach_lora(model)
        for variable in model.variables:
            variable.trainable = False
        for module, numbers in read.modules.items():
            slot = places[module]
            replace(slot.parent, slot.attribute, _new_layer(slot.layer, numbers, read))
    forget_programs(model)
    model.gemma_lora_template = read.template
    return model


def _new_layer(base: keras.layers.Layer, numbers: ModuleAdapter, read: AdapterFolder) -> keras.layers.Layer:
    """LoRA around a linear layer, with the file's numbers."""
    settings: AdapterSettings = read.settings
    named = {"dropout": settings.dropout, "rslora": settings.rslora, "dora": settings.dora}
    cls = LoRADense if isinstance(base, keras.layers.Dense) else LoRAEinsumDense
    layer = cls(base, numbers.rank, alpha=numbers.alpha, **named)
    layer.lora_a.assign(numbers.lora_a.T)
    layer.lora_b.assign(numbers.lora_b.T)
    if numbers.magnitude is not None:
        layer.magnitude.assign(numbers.magnitude)
    layer.trained_on = read.base if read.base.name else None
    return layer


def _as_adapter(read: AdapterFolder) -> Adapter:
    """The folder's adapter as the model keeps it beside others."""
    settings = read.settings
    layers = {
        module: LayerNumbers(numbers.lora_a.T, numbers.lora_b.T, numbers.alpha, numbers.magnitude)
        for module, numbers in read.modules.items()
    }
    base = read.base if read.base.name else None
    return Adapter(layers, settings.rslora, settings.dora, settings.dropout, read.template, base)


def _warn_of_another_base(folder: Path, base: Origin, model: keras.Model) -> None:
    if (difference := base.differs_from(origin_of(model))) is not None:
        warnings.warn(
            f"{folder}: the adapter was trained on another base than this model: {difference}. It may do worse here.",
            stacklevel=3,
        )


def _check_fit(folder: Path, modules: dict[str, ModuleAdapter], places: dict[str, Slot]) -> None:
    unmatched = [module for module in modules if module not in places]
    for module in unmatched:
        if part := elsewhere(module):
            raise GemmaLoraError(f"{folder}: has LoRA on {module}: {part}. Train without it.")
    if unmatched or not modules:
        what = f"{len(unmatched)} of {len(modules)} modules, {unmatched[0]} first," if unmatched else "nothing in it"
        raise GemmaLoraError(f"{folder}: {what} match no layer of this model. The adapter is for another model.")
    for module, numbers in modules.items():
        a, b, magnitude = numbers.lora_a, numbers.lora_b, numbers.magnitude
        d_in, d_out = linear.matrix_shape(without_lora(places[module].layer))
        if a.shape[1:] != (d_in,) or b.shape != (d_out, a.shape[0]):
            raise GemmaLoraError(
                f"{folder}: {module} has A {a.shape} and B {b.shape}; this model needs A (rank, {d_in}) and "
                f"B ({d_out}, rank). The adapter is for another model."
            )
        if magnitude is not None and magnitude.shape != (d_out,):
            raise GemmaLoraError(
                f"{folder}: {module} has a magnitude {magnitude.shape}; this model needs ({d_out},). "
                "The adapter is for another model."
            )
    if not any(_changes(numbers, places[module]) for module, numbers in modules.items()):
        raise GemmaLoraError(
            f"{folder}: the adapter changes nothing (every lora_A or every lora_B is zero). It was never trained."
        )


def _changes(numbers: ModuleAdapter, slot: Slot) -> bool:
    """Whether a module's adapter changes what the layer gives."""
    if numbers.alpha and np.any(numbers.lora_a) and np.any(numbers.lora_b):
        return True
    if numbers.magnitude is None:
        return False
    norms = np.sqrt(column_squares(linear.kernel_matrix(without_lora(slot.layer))))
    return not np.allclose(numbers.magnitude, norms, rtol=1e-4)
