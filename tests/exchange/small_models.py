"""Tiny random Gemmas with a real SentencePiece tokenizer and an adapter, as the export's tests take them."""

import types

import numpy as np

import gemma_lora as gl
from gemma_lora.lora import lora_layers
from tests.conftest import tiny_gemma
from tests.gemma.test_gguf import MODEL


def small(generation=3, adapter=True, layers=2, base=None, **kind):
    """A Gemma of 340 pieces, with LoRA whose factors and magnitudes are all random; `base` packs it first."""
    model = tiny_gemma(generation, vocabulary_size=340, layers=layers)
    if base:
        gl.quantize_base(model, base)
    model.preprocessor = types.SimpleNamespace(tokenizer=_tokenizer())
    if adapter:
        gl.apply_lora(model, rank=3, alpha=5.0, **kind)
        rng = np.random.default_rng(generation)
        for layer in lora_layers(model):
            layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
            if layer.dora:
                layer.magnitude.assign(np.asarray(layer.magnitude) * rng.uniform(0.5, 1.5, layer.magnitude.shape))
    return model


def _tokenizer():
    from gemma_lora.gemma.load import import_keras_hub

    return import_keras_hub().tokenizers.Gemma3Tokenizer(proto=MODEL, has_vision_tokens=False)


def logits_of(model, token_ids):
    """KerasHub's own logits, (B, T, V)."""
    hidden = model.backbone({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    return np.asarray(model.backbone.token_embedding(hidden, reverse=True))
