"""A Gemma block's seven linear layers, and what each is called in other places."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from gemma_lora.base.keras_on_jax import keras


class Place(NamedTuple):
    """One linear layer of a block.

    Args:
        attribute: The attributes that lead to it from a KerasHub block.
        layer: The KerasHub layer's own name.
        transformers: The module's name in a transformers block.
        gguf: The tensor's name in a GGUF file's block.
    """

    attribute: str
    layer: str
    transformers: str
    gguf: str


#: Our name -> the layer's other names, in a block's order.
PLACES = {
    "query": Place("attention.query_dense", "query", "self_attn.q_proj", "attn_q"),
    "key": Place("attention.key_dense", "key", "self_attn.k_proj", "attn_k"),
    "value": Place("attention.value_dense", "value", "self_attn.v_proj", "attn_v"),
    "attention_output": Place("attention.output_dense", "attention_output", "self_attn.o_proj", "attn_output"),
    "gate": Place("gating_ffw", "ffw_gating", "mlp.gate_proj", "ffn_gate"),
    "up": Place("gating_ffw_2", "ffw_gating_2", "mlp.up_proj", "ffn_up"),
    "down": Place("ffw_linear", "ffw_linear", "mlp.down_proj", "ffn_down"),
}


def parent_and_attribute(block: keras.layers.Layer, path: str) -> tuple[keras.layers.Layer, str]:
    """What holds a layer of a block, and in which attribute: `"attention.query_dense"` is attention's `query_dense`."""
    *inner, attribute = path.split(".")
    for name in inner:
        block = getattr(block, name)
    return block, attribute


def holds_gemma_blocks(model: keras.layers.Layer) -> bool:
    """Whether a model holds, or is, a KerasHub Gemma block: a layer with all of `PLACES`."""

    def has(layer: object, path: str) -> bool:
        for name in path.split("."):
            layer = getattr(layer, name, None)
        return isinstance(layer, keras.layers.Layer)

    return any(all(has(layer, place.attribute) for place in PLACES.values()) for layer in model._flatten_layers())


def linear_places(block: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer, str]]:
    """Yields `(our name, parent, attribute)` for each linear layer of a KerasHub Gemma block."""
    for name, place in PLACES.items():
        yield (name, *parent_and_attribute(block, place.attribute))


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
