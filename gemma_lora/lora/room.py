"""LoRA layers with room for any of several adapters: what is put in, taken out, and when other layers are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.layers.places import Slot, slots
from gemma_lora.layers.surgery import forget_programs, replace
from gemma_lora.lora.layer import LoRADense, LoRAEinsumDense, LoRALayer


@dataclasses.dataclass(frozen=True)
class LayerNumbers:
    """An adapter's numbers for one layer: A (d_in, rank), B (rank, d_out), DoRA's magnitude (d_out,) or None."""

    lora_a: np.ndarray
    lora_b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A whole adapter.

    Invariants: `layers` are by transformers' names of the places, `model.layers.0.self_attn.q_proj`. `template` is the
    text around a prompt and `trained_on` the base that its folder named, each None where it is not known.
    """

    layers: dict[str, LayerNumbers]
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    template: Any = None
    trained_on: Any = None


def lora_slots(model: keras.Model) -> list[Slot]:
    """The places of a Gemma where LoRA is."""
    return [slot for slot in slots(model) if isinstance(slot.layer, LoRALayer)]


def fits(model: keras.Model, adapter: Adapter) -> bool:
    """Whether the layers that are there can hold an adapter as they are."""
    there = {slot.module: slot.layer for slot in lora_slots(model)}
    if not adapter.layers:
        return True
    return all(
        module in there
        and there[module].rank >= numbers.rank
        and (there[module].dora, there[module].dropout_rate) == (adapter.dora, adapter.dropout)
        for module, numbers in adapter.layers.items()
    )


def make_room(model: keras.Model, chosen: Adapter, others: Iterable[Adapter]) -> None:
    """Puts LoRA layers in all places of all adapters of the chosen one's kind, each of the largest rank there."""
    ranks: dict[str, int] = {}
    for adapter in (chosen, *others):
        if adapter.dora == chosen.dora:
            for module, numbers in adapter.layers.items():
                ranks[module] = max(ranks.get(module, 0), numbers.rank)
    take_out(model)
    for variable in model.variables:
        variable.trainable = False
    for slot in slots(model):
        if slot.module in ranks:
            base = slot.layer
            cls = LoRADense if isinstance(base, keras.layers.Dense) else LoRAEinsumDense
            layer = cls(base, ranks[slot.module], dropout=chosen.dropout, dora=chosen.dora)
            replace(slot.parent, slot.attribute, layer)
    forget_programs(model)


def take_out(model: keras.Model) -> None:
    """Gives the base layers their places back."""
    for slot in lora_slots(model):
        layer = slot.layer
        layer.base.activation = layer.activation
        replace(slot.parent, slot.attribute, layer.base)


def put(model: keras.Model, adapter: Adapter, trainable: bool) -> None:
    """Assigns an adapter's numbers to the layers; places that it has none for add nothing."""
    for slot in lora_slots(model):
        layer = slot.layer
        d_in, d_out = layer.matrix_shape()
        nothing = LayerNumbers(np.zeros((d_in, 0), np.float32), np.zeros((0, d_out), np.float32), 1.0)
        own = adapter.layers.get(slot.module, nothing)
        layer.put(own.lora_a, own.lora_b, own.alpha, adapter.rslora, own.magnitude)
        layer.trained_on = adapter.trained_on
        for variable in (layer.lora_a, layer.lora_b, *([layer.magnitude] if layer.dora else [])):
            variable.trainable = trainable and slot.module in adapter.layers


def numbers_in(layer: LoRALayer) -> LayerNumbers:
    """What stands in a layer, without what it is filled up with."""
    rank = layer.used_rank
    magnitude = np.asarray(layer.magnitude) if layer.dora else None
    return LayerNumbers(np.asarray(layer.lora_a)[:, :rank], np.asarray(layer.lora_b)[:rank], layer.alpha, magnitude)
