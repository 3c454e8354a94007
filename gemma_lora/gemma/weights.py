"""A Gemma's weights as the forward pass takes them: matrices that know how to multiply, norms' scales, the table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.keras_on_jax import ops
from gemma_lora.gemma.architectures import family_of
from gemma_lora.layers.places import parent_and_attribute
from gemma_lora.layers.products import EXACT, Matrix, Precision, product_of, pytree
from gemma_lora.lora.qlora import head_table as head_table
from gemma_lora.quantization.rows import Bfloat16Rows, Int8Rows


@pytree
class BlockWeights:
    """One block's.

    Invariants: `linear` has all names of `layers.places.PLACES`; `norms` (…,) those that the block has, each what
    the norm stores: it multiplies by 1 + scale.
    """

    linear: dict[str, Matrix]
    norms: dict[str, Any]


@pytree
class Weights:
    """A Gemma's weights; a pytree.

    Invariants: `table` (V, D) is the embedding, an array or `Int8Rows`; `head` is what logits are formed with, the
    table or a rounded copy of it; `final_norm` is (D,).
    """

    table: Any
    head: Any
    blocks: tuple[BlockWeights, ...]
    final_norm: Any

    def embed(self, token_ids: Any, dtype: Any) -> jax.Array:
        """The tokens' rows of the table, (…) -> (…, D)."""
        if isinstance(self.table, Int8Rows | Bfloat16Rows):
            return self.table.take(token_ids).decode(dtype)
        return jnp.take(self.table, token_ids, axis=0).astype(dtype)

    def settled(self, rounded: bool = False) -> Weights:
        """The same, made ready for many products with few tokens: see `Matrix.settled`."""
        blocks = tuple(
            BlockWeights({name: matrix.settled(rounded) for name, matrix in block.linear.items()}, block.norms)
            for block in self.blocks
        )
        head = (
            Bfloat16Rows.of(self.head) if rounded and not isinstance(self.head, Int8Rows | Bfloat16Rows) else self.head
        )
        return Weights(self.table, head, blocks, self.final_norm)


def backbone_of(model: Any) -> Any:
    """A KerasHub Gemma's backbone, of a `CausalLM` or of itself.

    Raises:
        ValueError: If it has no transformer blocks.
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "transformer_layers"):
        raise ValueError(f"`model` must be a KerasHub Gemma model or backbone. Received: {type(model).__name__}")
    return backbone


def collect(model: Any, precision: Precision = EXACT, training: bool = False) -> Weights:
    """Reads the weights of a KerasHub Gemma as they are now.

    Inside a Keras step they are what the step's state says, outside what the variables hold.

    Args:
        model: A KerasHub Gemma `CausalLM` or backbone, with or without LoRA, packed or not.
        precision: How products are to be formed.
        training: Whether dropout acts.

    Returns:
        `Weights`.

    Raises:
        GemmaLoraError: If a linear layer has a bias, which no Gemma has.
    """
    backbone = backbone_of(model)
    family = family_of(backbone)
    table = head_table(backbone.token_embedding)
    blocks = tuple(_block_weights(block, family, precision, training) for block in backbone.transformer_layers)
    return Weights(table, table, blocks, ops.convert_to_tensor(backbone.layer_norm.scale))


def _block_weights(block, family, precision: Precision, training: bool) -> BlockWeights:
    linear, norms = {}, {}
    for name, path in family.linear.items():
        parent, attribute = parent_and_attribute(block, path)
        layer = getattr(parent, attribute)
        if getattr(layer, "bias", None) is not None:
            raise GemmaLoraError(f"Layer {layer.path} has a bias, which gemma_lora does not compute.")
        linear[name] = product_of(layer, precision, training)
    for name, path in family.norms.items():
        parent, attribute = parent_and_attribute(block, path)
        if (norm := getattr(parent, attribute, None)) is not None:
            norms[name] = ops.convert_to_tensor(norm.scale)
    return BlockWeights(linear, norms)
