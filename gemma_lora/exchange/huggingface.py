"""A whole Gemma as a Hugging Face folder: merged weights, configuration, tokenizer, chat template, model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path, write_json_atomic
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data.templates import CONTROL_TOKENS, Template
from gemma_lora.exchange import safetensors_file
from gemma_lora.exchange.chat_templates import jinja_of, stop_texts
from gemma_lora.exchange.merged import Part, Rounding, generation_of, parts
from gemma_lora.exchange.sentencepieces import Pieces, pieces_of, write_tokenizer
from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.weights import backbone_of
from gemma_lora.layers.places import PLACES

#: What the weights may be stored in -> transformers' name.
TYPES = {"F32": "float32", "BF16": "bfloat16"}
#: Transformers' classes and names of configurations, by generation.
_CLASSES = {
    1: ("GemmaForCausalLM", "gemma"),
    2: ("Gemma2ForCausalLM", "gemma2"),
    3: ("Gemma3ForCausalLM", "gemma3_text"),
}
#: Transformers' names of a block's norms. In Gemma 1 the second one has another name than in its successors.
_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def write_folder(model: keras.Model, folder: Path, kind: str, template: Template) -> Rounding:
    """Writes everything but the model card.

    Args:
        model: A KerasHub Gemma with its tokenizer; LoRA and DoRA are merged into what is written, not into the model.
        folder: Where the files go; those of the same names are replaced, each whole or not at all.
        kind: "F32" or "BF16".
        template: The text around a prompt.

    Returns:
        What rounding to `kind` costs.

    Raises:
        GemmaLoraError: If the model is none that transformers has, or has no tokenizer. Nothing is written then.
    """
    generation, pieces = generation_of(model), pieces_of(model)
    config = config_of(model, kind, pieces)
    written = list(parts(model))  # what cannot be exported is said before anything is written
    rounding = Rounding()

    def entry(part: Part):
        def read() -> np.ndarray:
            exact = part.read()
            stored = safetensors_file.rounded(exact, kind)
            if part.adapted:
                rounding.add(part, exact, np.asarray(stored, np.float32))
            return stored

        return tensor_name(part, generation), part.shape, read

    with atomic_path(folder / "model.safetensors") as temporary:
        safetensors_file.write(temporary, [entry(part) for part in written], kind)
    write_tokenizer(pieces, folder, jinja_of(template))
    write_json_atomic(folder / "generation_config.json", generation_config(pieces, template))
    write_json_atomic(folder / "config.json", config)  # the last one: a folder that has it is complete
    return rounding


def tensor_name(part: Part, generation: int) -> str:
    """Transformers' name of a part."""
    if part.place in ("embedding", "final_norm"):
        return {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}[part.place]
    if part.place in PLACES:
        name = PLACES[part.place].transformers
    else:
        name = _NORMS["post_attention_norm" if generation == 1 and part.place == "pre_mlp_norm" else part.place]
    return f"model.layers.{part.block}.{name}.weight"


def generation_config(pieces: Pieces, template: Template) -> dict[str, Any]:
    """Transformers' settings of generation: greedy, up to the tokens that end an answer of the training's template."""
    names = [text for text in stop_texts(template) if text in CONTROL_TOKENS]
    stops = sorted({pieces.texts.index(name) for name in names})
    return {
        "bos_token_id": pieces.ids["bos_token"],
        "eos_token_id": stops,
        "pad_token_id": pieces.ids["pad_token"],
        "do_sample": False,
    }


def config_of(model: keras.Model, kind: str, pieces: Pieces) -> dict[str, Any]:
    """Transformers' configuration of a KerasHub Gemma.

    Args:
        model: The Gemma.
        kind: "F32" or "BF16".
        pieces: Its tokenizer.

    Raises:
        GemmaLoraError: If the model computes what transformers' Gemma of its generation does not.
    """
    generation, architecture = generation_of(model), architecture_of(backbone_of(model))
    name, kind_of_model = _CLASSES[generation]
    config = {
        "architectures": [name],
        "model_type": kind_of_model,
        "dtype": TYPES[kind],
        "torch_dtype": TYPES[kind],  # what `dtype` was called before transformers 5
        "vocab_size": architecture.vocabulary,
        "hidden_size": architecture.width,
        "intermediate_size": next(part.shape[0] for part in parts(model) if part.place == "gate"),
        "num_hidden_layers": len(architecture.blocks),
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": context_length(architecture, generation),
        "rms_norm_eps": architecture.epsilon,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        **{f"{end}_token_id": pieces.ids[f"{end}_token"] for end in ("pad", "bos", "eos")},
    }
    return config | _constants(architecture, generation)


def context_length(architecture: Architecture, generation: int) -> int:
    """The tokens a Gemma was made for: 8,192 up to Gemma 2; of Gemma 3 32,768, and 131,072 where rotation is scaled.

    Reference: Gemma Team 2025, https://arxiv.org/abs/2503.19786, section 2.1.
    """
    if generation < 3:
        return 8192
    return 131072 if any(block.rope_scaling != 1.0 for block in architecture.blocks) else 32768


def _constants(architecture: Architecture, generation: int) -> dict[str, Any]:
    """Windows, soft caps, rotation and the scale of attention."""
    blocks = architecture.blocks
    query_scalar = architecture.attention_scale**-2
    if generation == 1:
        if not math.isclose(query_scalar, architecture.head_dim, rel_tol=1e-6):
            raise GemmaLoraError("Attention is not scaled by the heads' size, as every Gemma 1 of transformers does.")
        return {"rope_theta": blocks[0].wavelength}
    rounded = round(query_scalar)
    constants: dict[str, Any] = {
        "query_pre_attn_scalar": rounded if math.isclose(query_scalar, rounded, rel_tol=1e-6) else query_scalar,
        "attn_logit_softcapping": architecture.attention_soft_cap,
        "final_logit_softcapping": architecture.logit_soft_cap,
        "layer_types": ["full_attention" if b.window is None else "sliding_attention" for b in blocks],
        "sliding_window": next((b.window for b in blocks if b.window), context_length(architecture, generation)),
    }
    if generation == 2:
        return constants | {"rope_theta": blocks[0].wavelength}
    local, everywhere = rotation_of(architecture)
    scaling = None if everywhere[1] == 1.0 else {"rope_type": "linear", "factor": everywhere[1]}
    constants |= {"rope_theta": everywhere[0], "rope_local_base_freq": local[0], "rope_scaling": scaling}
    return constants | {"use_bidirectional_attention": False}


def rotation_of(architecture: Architecture) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gemma 3's `(wavelength, scaling)` of blocks with a window, and of those without; one stands in for the other."""
    local = {(b.wavelength, b.rope_scaling) for b in architecture.blocks if b.window is not None}
    everywhere = {(b.wavelength, b.rope_scaling) for b in architecture.blocks if b.window is None}
    if len(local) > 1 or len(everywhere) > 1 or any(scaling != 1.0 for _, scaling in local):
        raise GemmaLoraError("The blocks rotate positions in a way that Gemma 3 in other programs does not.")
    return next(iter(local or {(10_000.0, 1.0)})), next(iter(everywhere or {(1_000_000.0, 1.0)}))
