"""A whole Gemma as a GGUF file: merged weights, constants, tokenizer and chat template, as llama.cpp reads them.

What llama.cpp takes for granted of a Gemma, and what follows from it here: a norm's weight is stored as 1 + w; the
output matrix is the embedding; Gemma 2 has a window in every second block and Gemma 3 in five of six; attention is
scaled by 1/sqrt(head size), in the 27B models by 1/sqrt(width / heads).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path
from gemma_lora.base.keras_on_jax import keras
from gemma_lora.data.templates import Template
from gemma_lora.exchange.chat_templates import jinja_of
from gemma_lora.exchange.huggingface import context_length, rotation_of
from gemma_lora.exchange.merged import Part, Rounding, generation_of, parts
from gemma_lora.exchange.sentencepieces import CONTROL, UNUSED, USER_DEFINED, Pieces, pieces_of
from gemma_lora.gemma.architectures import Architecture, architecture_of
from gemma_lora.gemma.gguf import TEMPLATE_FIELD
from gemma_lora.gemma.weights import backbone_of
from gemma_lora.layers.places import PLACES

#: GGUF's name of each generation.
ARCHITECTURES = {1: "gemma", 2: "gemma2", 3: "gemma3"}
#: Types that the `gguf` library writes -> the file type that the header says.
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
#: GGUF's names of a block's norms.
_NORMS = {
    "pre_attention_norm": "attn_norm",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "post_attention_norm": "post_attention_norm",
    "pre_mlp_norm": "ffn_norm",
    "post_mlp_norm": "post_ffw_norm",
}
#: Blocks of the models that llama.cpp takes for the 27B, by generation.
_BLOCKS_OF_27B = {2: 46, 3: 62}
_PERIOD = {2: 2, 3: 6}  # of blocks, of which the last one has no window
_LARGEST_F16 = float(np.finfo(np.float16).max)


def write_model(model: keras.Model, path: Path, kind: str, template: Template, name: str) -> Rounding:
    """Writes a merged model as a GGUF file, whole or not at all.

    Args:
        model: A KerasHub Gemma with its tokenizer; it stays as it is.
        path: Where the file goes.
        kind: "F32", "F16", "BF16" or "Q8_0", of the matrices; norms are float32.
        template: The text around a prompt.
        name: What the file says the model is called.

    Returns:
        What rounding to `kind` costs.

    Raises:
        GemmaLoraError: If the model computes what llama.cpp's Gemma does not, has no tokenizer, or holds numbers that
            float16 does not.
    """
    import gguf

    generation, pieces = generation_of(model), pieces_of(model)
    architecture, everything = architecture_of(backbone_of(model)), list(parts(model))
    _check(architecture, generation)
    factor, rounding = query_factor(architecture, generation), Rounding()
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[generation])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_license("gemma")
        if source := getattr(model, "gemma_lora_source", None):
            writer.add_string("general.basename", Path(str(source)).name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(TEMPLATE_FIELD, json.dumps(template.to_dict(), ensure_ascii=False))
        _add_constants(writer, architecture, generation, everything)
        _add_tokenizer(writer, pieces, architecture.vocabulary, template)
        for part in everything:
            stored = _stored_kind(part, kind)
            nbytes = _nbytes(part.shape, stored)
            writer.add_tensor_info(tensor_name(part), part.shape, np.dtype(np.float32), nbytes, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in everything:
            exact = _scaled(part, generation, factor)
            stored = _stored_kind(part, kind)
            raw = _encoded(part, exact, stored)
            if part.adapted:
                rounding.add(part, exact, gguf.dequantize(raw, stored))
            writer.write_tensor_data(raw)
        writer.close()
    return rounding


def tensor_name(part: Part) -> str:
    """GGUF's name of a part."""
    if part.block is None:
        return {"embedding": "token_embd.weight", "final_norm": "output_norm.weight"}[part.place]
    name = PLACES[part.place].gguf if part.place in PLACES else _NORMS[part.place]
    return f"blk.{part.block}.{name}.weight"


def _stored_kind(part: Part, kind: str) -> Any:
    """What a part is stored in: a norm in float32, and a matrix whose rows Q8_0's blocks of 32 do not fill in F16."""
    from gguf import GGMLQuantizationType

    if len(part.shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType["F16" if kind == "Q8_0" and part.shape[-1] % 32 else kind]


def _nbytes(shape: tuple[int, ...], kind: Any) -> int:
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // numbers * size


def _encoded(part: Part, exact: np.ndarray, kind: Any) -> np.ndarray:
    import gguf

    if kind.name == "F16" and float(np.abs(exact).max(initial=0.0)) > _LARGEST_F16:
        raise GemmaLoraError(f"{tensor_name(part)} holds numbers that float16 does not. Give --type BF16 or F32.")
    return np.ascontiguousarray(gguf.quantize(exact, kind))


def _scaled(part: Part, generation: int, factor: float) -> np.ndarray:
    """A part as GGUF has it: norms as what they multiply by, and queries with what llama.cpp scales otherwise."""
    array = part.read()
    if len(part.shape) == 1:
        array = 1.0 + array
    place = "query_norm" if generation == 3 else "query"
    return array * np.float32(factor) if factor != 1.0 and part.place == place else array


def query_factor(architecture: Architecture, generation: int) -> float:
    """What queries must be multiplied by, so that llama.cpp's scale of attention gives the model's own."""
    large = len(architecture.blocks) == _BLOCKS_OF_27B.get(generation)
    size = architecture.width // architecture.heads if large else architecture.head_dim
    factor = architecture.attention_scale * math.sqrt(size)
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-6) else factor


def _check(architecture: Architecture, generation: int) -> None:
    caps = (architecture.attention_soft_cap, architecture.logit_soft_cap)
    if generation == 2 and None in caps or generation == 3 and caps[0] is not None:
        raise GemmaLoraError(f"llama.cpp's Gemma {generation} has other soft caps than this model.")


def _add_constants(writer: Any, architecture: Architecture, generation: int, everything: list[Part]) -> None:
    import gguf

    writer.add_context_length(context_length(architecture, generation))
    writer.add_embedding_length(architecture.width)
    writer.add_block_count(len(architecture.blocks))
    writer.add_feed_forward_length(next(part.shape[0] for part in everything if part.place == "gate"))
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.epsilon)
    if architecture.attention_soft_cap is not None:
        writer.add_attn_logit_softcapping(architecture.attention_soft_cap)
    if architecture.logit_soft_cap is not None:
        writer.add_final_logit_softcapping(architecture.logit_soft_cap)
    if generation < 3:
        writer.add_rope_freq_base(architecture.blocks[0].wavelength)
    else:
        local, everywhere = rotation_of(architecture)
        writer.add_rope_freq_base(everywhere[0])
        writer.add_rope_freq_base_swa(local[0])
        if everywhere[1] != 1.0:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(everywhere[1])
    _add_windows(writer, architecture, generation)


def _add_windows(writer: Any, architecture: Architecture, generation: int) -> None:
    windows = [block.window for block in architecture.blocks]
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1 or (generation == 1 and sizes):
        raise GemmaLoraError(f"llama.cpp's Gemma {generation} has no such windows: {sorted(sizes)}.")
    if generation == 1 or (generation == 3 and not sizes):
        return
    writer.add_sliding_window(sizes.pop() if sizes else context_length(architecture, generation))
    usual = [(number + 1) % _PERIOD[generation] != 0 for number in range(len(windows))]
    has_window = [window is not None for window in windows]
    if has_window != usual and any(has_window):
        writer.add_sliding_window_pattern(has_window)


def _add_tokenizer(writer: Any, pieces: Pieces, rows: int, template: Template) -> None:
    """The tokenizer, with a token for each of the embedding's rows."""
    texts, kinds, scores = list(pieces.texts), list(pieces.kinds), list(pieces.scores)
    for number, text in enumerate(texts):
        if pieces.is_reserved(number):
            kinds[number] = CONTROL  # else llama.cpp finds it in a user's text, too
        elif kinds[number] == USER_DEFINED:
            texts[number] = text.replace("▁", " ")
    for number in range(len(texts), rows):
        texts.append(f"[PAD{number}]")
        kinds.append(UNUSED)
        scores.append(-1000.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name, number in pieces.ids.items():
        name = {"pad_token": "padding", "unk_token": "unknown"}.get(name, name.removesuffix("_token"))
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if "<end_of_turn>" in template.stop and "<end_of_turn>" in pieces.texts:
        writer.add_eot_token_id(pieces.texts.index("<end_of_turn>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(jinja_of(template))
