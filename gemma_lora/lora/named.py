"""Several adapters on one base: each has a name, one or a weighted sum of them is in use.

The base's weights are there once. What is in use stands in the LoRA layers' variables, the others wait as arrays, so
switching is an assignment. The layers have room for the largest rank and for every place of all adapters; a smaller
adapter is filled up with zeros, which add nothing and get no gradient. So what is compiled stays as long as

- the new adapter is of the same kind, LoRA or DoRA, with the same dropout, and
- its rank (of a sum: the ranks together) and its places fit into the layers that are there.

Otherwise larger layers take their place, and programs are compiled again once.

A weighted sum `Σ w·s·A@B` is one LoRA whose A and B are the adapters' side by side: exact, not an average of factors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.layers.surgery import forget_programs
from gemma_lora.lora.apply import as_it_was_on_error, lora_layers
from gemma_lora.lora.room import Adapter, LayerNumbers, fits, lora_slots, make_room, numbers_in, put, take_out


class _Adapters:
    """A model's adapters by name. What is in use is in the layers as well, and newer there if it was trained.

    Invariants: `used` are the names and weights of what is in use. `template` is what the model had before.
    """

    def __init__(self, template: Any):
        self.all: dict[str, Adapter] = {}
        self.used: dict[str, float] = {}
        self.template = template

    @property
    def single(self) -> str | None:
        """The adapter that is in use alone and as it is, or None."""
        return next(iter(self.used)) if list(self.used.values()) == [1.0] else None


# --- what users call -------------------------------------------------------------------------------------------


def use_adapter(model: keras.Model, which: str | Mapping[str, float] | None) -> keras.Model:
    """Puts one of a model's adapters, or a weighted sum of them, in use; the base is not loaded again.

    What was trained of the adapter in use is kept under its name. To train one, use it alone and make a new
    `FineTuner`. The template that `generate` takes is the adapter's (of a sum: the first one's).

    Args:
        model: A KerasHub Gemma with adapters that have names: `load_adapter(model, folder, name="finance")`.
        which: A name; names with weights, `{"finance": 0.7, "sales": 0.3}`, for the sum of the weighted updates; or
            None for the base model alone. The adapters are kept.

    Returns:
        The same model.

    Raises:
        GemmaLoraError: If there is no adapter of a name, the update is merged, a weight is not finite, or DoRA is to be
            summed: its outputs are scaled, so there is no sum. The model is then as it was.

    Example:

    >>> use_adapter(model, "finance")                                      # doctest: +SKIP
    >>> use_adapter(model, {"finance": 0.5, "sales": 0.5})                 # doctest: +SKIP
    >>> use_adapter(model, None)                                           # doctest: +SKIP
    """
    adapters = _required(model)
    weights = {which: 1.0} if isinstance(which, str) else {k: float(w) for k, w in dict(which or {}).items()}
    _check(model, adapters, weights)
    _keep_what_was_trained(model, adapters)
    chosen, before = _chosen(adapters, weights), _chosen(adapters, adapters.used)
    try:
        with as_it_was_on_error(model):
            if not fits(model, chosen):
                make_room(model, chosen, adapters.all.values())
            put(model, chosen, trainable=list(weights.values()) == [1.0])
    except BaseException:
        put(model, before, trainable=adapters.single is not None)
        raise
    adapters.used = weights
    model.gemma_lora_template = adapters.template if not weights else chosen.template
    return model


def remove_adapter(model: keras.Model, name: str) -> keras.Model:
    """Forgets one of a model's adapters. If it is in use, the base model is used alone; with the last one LoRA goes.

    Raises:
        GemmaLoraError: If there is no such adapter, or the update is merged.
    """
    adapters = _required(model)
    _check(model, adapters, {name: 1.0})
    if name in adapters.used:
        use_adapter(model, None)
    del adapters.all[name]
    if not adapters.all:
        with as_it_was_on_error(model):
            take_out(model)
        model.gemma_lora_adapters = None
        forget_programs(model)
    return model


def adapter_names(model: keras.Model) -> list[str]:
    """The names of a model's adapters, in the order in which they were loaded."""
    return list(_of(model).all) if has_names(model) else []


def adapters_in_use(model: keras.Model) -> dict[str, float]:
    """The names and weights of what is in use: `{"finance": 1.0}`; nothing where the base model is used alone."""
    return dict(_of(model).used) if has_names(model) else {}


@contextlib.contextmanager
def adapter_used(model: keras.Model, which: str | Mapping[str, float] | None) -> Iterator[None]:
    """Within, `which` is in use as by `use_adapter`; afterwards what was in use before is again."""
    before = adapters_in_use(model)
    use_adapter(model, which)
    try:
        yield
    finally:
        use_adapter(model, before)


# --- for what loads them ---------------------------------------------------------------------------------------


def has_names(model: keras.Model) -> bool:
    """Whether a model has adapters with names."""
    return getattr(model, "gemma_lora_adapters", None) is not None


def add_adapter(model: keras.Model, name: str, adapter: Adapter) -> None:
    """Gives a model one more adapter and puts it in use.

    Raises:
        GemmaLoraError: If the name is taken or empty, or the model has LoRA without a name, or an update is merged.
    """
    if not isinstance(name, str) or not name:
        raise GemmaLoraError(f"An adapter's name must be some text. Received: {name!r}")
    if not has_names(model) and lora_layers(model):
        raise GemmaLoraError(
            "The model has LoRA without a name. Save it with `save_adapter` and load it with a name, or take it out "
            "with `detach_lora(model)`."
        )
    was = getattr(model, "gemma_lora_adapters", None)
    adapters = was or _Adapters(getattr(model, "gemma_lora_template", None))
    if name in adapters.all:
        raise GemmaLoraError(f"The model has an adapter {name!r} already. Call `remove_adapter` first.")
    trainable = [(variable, variable.trainable) for variable in model.variables]
    adapters.all[name] = adapter
    model.gemma_lora_adapters = adapters
    try:
        use_adapter(model, name)
    except BaseException:
        del adapters.all[name]
        model.gemma_lora_adapters = was
        for variable, flag in trainable:
            variable.trainable = flag
        raise


# --- how -------------------------------------------------------------------------------------------------------


def _of(model: keras.Model) -> _Adapters:
    return model.gemma_lora_adapters


def _required(model: keras.Model) -> _Adapters:
    if not has_names(model):
        raise GemmaLoraError(
            "The model has no adapters with names. Load one with `load_adapter(model, folder, name=…)`."
        )
    return _of(model)


def _check(model: keras.Model, adapters: _Adapters, weights: Mapping[str, float]) -> None:
    if unknown := [name for name in weights if name not in adapters.all]:
        raise GemmaLoraError(f"There is no adapter {unknown[0]!r}. There are {', '.join(adapters.all)}.")
    if any(layer.merged for layer in lora_layers(model)):
        raise GemmaLoraError("The model holds a merged adapter. Call `unmerge_lora(model)` before another is used.")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise GemmaLoraError(f"The weight of {name!r} must be a finite number. Received: {weight}")
        if adapters.all[name].dora and list(weights.values()) != [1.0]:
            raise GemmaLoraError(
                f"Adapter {name!r} is DoRA, which scales outputs: it has no weighted sum. Use it alone."
            )


def _keep_what_was_trained(model: keras.Model, adapters: _Adapters) -> None:
    """Takes the numbers of the adapter in use out of the layers, where a training may have changed them."""
    template = getattr(model, "gemma_lora_template", None)
    if not adapters.used:
        adapters.template = template
    if (name := adapters.single) is None:
        return
    layers = {slot.module: slot.layer for slot in lora_slots(model)}
    numbers = {module: numbers_in(layers[module]) for module in adapters.all[name].layers}
    trained_on = next(layers[module].trained_on for module in numbers)
    adapters.all[name] = dataclasses.replace(
        adapters.all[name], layers=numbers, template=template, trained_on=trained_on
    )


def _chosen(adapters: _Adapters, weights: Mapping[str, float]) -> Adapter:
    """What is to stand in the layers: an adapter, the sum of some, or nothing, of the kind that is there."""
    if not weights:
        return Adapter({})
    first, *others = (adapters.all[name] for name in weights)
    if list(weights.values()) == [1.0]:
        return first
    if any(other.template != first.template for other in others):
        warnings.warn(f"{', '.join(weights)} have different templates; the first one's is used.", stacklevel=3)
    parts: dict[str, list[LayerNumbers]] = {}
    for name, weight in weights.items():
        adapter = adapters.all[name]
        for module, own in adapter.layers.items():
            scaling = own.alpha / (math.sqrt(own.rank) if adapter.rslora else own.rank)
            scaled = dataclasses.replace(own, lora_b=np.float32(weight * scaling) * own.lora_b)
            parts.setdefault(module, []).append(scaled)
    layers = {}
    for module, owns in parts.items():
        lora_a = np.concatenate([own.lora_a for own in owns], axis=1)
        lora_b = np.concatenate([own.lora_b for own in owns], axis=0)
        layers[module] = LayerNumbers(lora_a, lora_b, alpha=lora_a.shape[1])  # alpha = rank: a scaling of 1
    return Adapter(layers, template=first.template, trained_on=first.trained_on)
