"""Gemma 3 from a GGUF file: configuration, weights and tokenizer, for KerasHub.

The `gguf` library reads the file and decodes its blocks. Reading the header of a Gemma takes it some ten
seconds (262,144 tokens, one Python object each), so what we need from it is kept as an index beside the
user's other caches; the weights themselves are always read from the file.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.files import GemmaLoraError, atomic_path, cache_dir, sha256_of, write_json_atomic
from gemma_lora.gemma import gguf_contents
from gemma_lora.gemma.gguf_tokenizer import tokenizer_proto
from gemma_lora.layers.linear import matrix_shape
from gemma_lora.layers.places import PLACES, linear_places
from gemma_lora.quantization.packed import Int8Rows

_INDEX_VERSION = 4
_DECODED_AT_ONCE = 1 << 20  # weights
_ROWS_AT_ONCE = 8192
#: Our own field: the text around a prompt, as JSON.
TEMPLATE_FIELD = "gemma_lora.template"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor stands in the file. `shape` is numpy's: (d_out, d_in) for a matrix."""

    kind: str
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Index:
    """What a GGUF file says of itself.

    Invariants: every tensor lies within the file; `tokenizer` is a serialized SentencePiece model.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: bytes


def read_index(path: str | os.PathLike) -> Index:
    """Reads (or takes from the cache) the index of a Gemma 3 GGUF file.

    Args:
        path: A GGUF file of architecture `gemma3`.

    Returns:
        An `Index`.

    Raises:
        GemmaLoraError: If the file is missing, truncated, no GGUF file, of another architecture, or a part
            of a split model.
    """
    path = Path(path).expanduser().resolve()
    _check_magic(path)
    stat = path.stat()
    # Size and time of change can be another file's: archives and `cp -p` set the time. Inode and status change cannot.
    identity = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    key = f"{path.stem}-{'-'.join(map(str, identity))}-v{_INDEX_VERSION}"
    try:
        cached = cache_dir() / "gguf" / f"{key}.json"
    except GemmaLoraError:
        return _parse(path)  # no folder to keep it in: the next load is slower, nothing else
    index = _read_cached(path, cached)
    if index is None:
        index = _parse(path)
        _write_cached(index, cached)
    return index


def _check_magic(path: Path) -> None:
    if not path.is_file():
        raise GemmaLoraError(f"{path}: no such file. Give the path of a GGUF file of Gemma 3.")
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:4] != b"GGUF":
        raise GemmaLoraError(
            f"{path}: not a GGUF file (it begins with {head[:4]!r}, not b'GGUF'). "
            "Download it again, or convert the model with llama.cpp's convert_hf_to_gguf.py."
        )
    if len(head) < 8 or struct.unpack("<I", head[4:])[0] not in (2, 3):
        raise GemmaLoraError(f"{path}: GGUF version not 2 or 3, or the file is cut short. Convert the model again.")


def _read_cached(path: Path, cached: Path) -> Index | None:
    try:
        stored = json.loads(cached.read_text(encoding="utf-8"))
        if sha256_of(cached.with_suffix(".spm")) != stored["tokenizer_sha256"]:
            return None
        tokenizer = cached.with_suffix(".spm").read_bytes()
        tensors = {name: Tensor(t[0], tuple(t[1]), t[2], t[3]) for name, t in stored["tensors"].items()}
        return Index(path, stored["fields"], tensors, tokenizer)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None  # absent, or unreadable: it is made again


def _write_cached(index: Index, cached: Path) -> None:
    tensors = {name: (t.kind, t.shape, t.offset, t.nbytes) for name, t in index.tensors.items()}
    try:
        with atomic_path(cached.with_suffix(".spm")) as temporary:
            temporary.write_bytes(index.tokenizer)
        checksum = sha256_of(cached.with_suffix(".spm"))
        write_json_atomic(cached, {"fields": index.fields, "tensors": tensors, "tokenizer_sha256": checksum})
    except OSError:
        pass  # a read-only home: the next load is slower, nothing else


def _parse(path: Path) -> Index:
    """Reads the header with the `gguf` library."""
    import gguf

    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != gguf.GGUFValueType.ARRAY
        }
        pattern = reader.fields.get("gemma3.attention.sliding_window_pattern")
        windows = list(pattern.contents()) if pattern and pattern.types[0] == gguf.GGUFValueType.ARRAY else None
        tensors = {
            t.name: Tensor(
                t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes)
            )
            for t in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        if said := gguf_contents.unknown_type(error):
            raise GemmaLoraError(f"{path}: {said}") from error
        raise GemmaLoraError(
            f"{path}: the GGUF header cannot be read ({size:,} bytes; the file may be cut short: {error}). "
            "Download it again."
        ) from error
    gguf_contents.check_kind(path, fields, tensors)
    _check_size(path, size, tensors)
    gguf_contents.check_tensors(path, {name: tensor.kind for name, tensor in tensors.items()})
    gguf_contents.check_constants(path, fields, windows)
    try:
        tokenizer = tokenizer_proto(path, reader, _rows(tensors))
    except (KeyError, ValueError, TypeError) as error:
        raise GemmaLoraError(f"{path}: its tokenizer is incomplete ({error}). Convert it again.") from error
    return Index(path, fields, tensors, tokenizer)


def _check_size(path: Path, size: int, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > size:
            raise GemmaLoraError(
                f"{path}: cut short: tensor {name} ends at byte {tensor.offset + tensor.nbytes:,}, "
                f"the file has {size:,}. Download it again."
            )


def _rows(tensors: dict[str, Tensor]) -> int | None:
    """The embedding's rows; None if it is missing, which is said when it is read."""
    return tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None


def _tensor(index: Index, name: str) -> Tensor:
    if name not in index.tensors:
        raise GemmaLoraError(f"{index.path}: tensor {name} is missing; the file is no whole Gemma 3. Convert it again.")
    return index.tensors[name]


def read_tensor(index: Index, name: str) -> np.ndarray:
    """Decodes one tensor of the file to float32, in numpy's order (a matrix is (d_out, d_in)).

    Rows are decoded a few at a time into the result, so that the memory used is the result's and little more.
    """
    import gguf

    tensor = _tensor(index, name)
    kind = gguf.GGMLQuantizationType[tensor.kind]
    raw = np.memmap(index.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.nbytes,))
    result = aligned_zeros(tensor.shape)
    if kind == gguf.GGMLQuantizationType.F32:
        result[...] = np.asarray(raw).view(np.float32).reshape(tensor.shape)
        return result
    rows = raw.reshape(*tensor.shape[:-1], -1)
    step = max(1, _DECODED_AT_ONCE // max(1, tensor.shape[-1])) if len(tensor.shape) > 1 else len(rows)
    for start in range(0, len(rows), step):
        result[start : start + step] = gguf.dequantize(rows[start : start + step], kind)
    return result


def aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 zeros whose memory begins at a page: JAX takes such an array over on the CPU without a copy.

    Memory that is never written to is never taken from the system.
    """
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(1, count) * 4), np.float32, count).reshape(shape)


def backbone_config(index: Index) -> dict[str, Any]:
    """The arguments of KerasHub's `Gemma3Backbone` for this file."""

    def field(name: str, default: Any = None) -> Any:
        value = index.fields.get(f"gemma3.{name}", default)
        if value is None:
            raise GemmaLoraError(f"{index.path}: the header lacks gemma3.{name}; convert the model again.")
        return value

    heads = field("attention.head_count")
    return {
        "vocabulary_size": _tensor(index, "token_embd.weight").shape[0],
        "image_size": 896,
        "num_layers": field("block_count"),
        "num_query_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "hidden_dim": field("embedding_length"),
        "intermediate_dim": field("feed_forward_length"),
        "head_dim": field("attention.key_length", 256),
        "use_query_key_norm": True,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": True,
        "sliding_window_size": field("attention.sliding_window"),
        "global_rope_scaling_factor": gguf_contents.global_rope_scaling(index.fields),
        "layer_norm_epsilon": float(field("attention.layer_norm_rms_epsilon", 1e-6)),
        "final_logit_soft_cap": index.fields.get("gemma3.final_logit_softcapping"),
    }


def weights_for(index: Index, backbone, norms_only: bool = False) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields `(variable, value)` for every variable of a `Gemma3Backbone`, or for its norms', one at a time."""
    if not norms_only:
        yield backbone.token_embedding._embeddings, read_tensor(index, "token_embd.weight")
    yield backbone.layer_norm.scale, _norm(index, "output_norm.weight")
    for number, block in enumerate(backbone.transformer_layers):
        yield from _norm_weights(index, f"blk.{number}", block)
        if not norms_only:
            yield from _kernel_weights(index, f"blk.{number}", block)


def linear_tensors(index: Index, backbone) -> Iterator[tuple[Any, str, str]]:
    """Yields `(parent, attribute, tensor's name)` for every linear layer of the blocks; shapes are checked.

    The file's matrix is `(d_out, d_in)`, with the heads one after the other.
    """
    for number, block in enumerate(backbone.transformer_layers):
        for name, parent, attribute in linear_places(block):
            tensor = f"blk.{number}.{PLACES[name].gguf}.weight"
            d_in, d_out = matrix_shape(getattr(parent, attribute))
            _check_matrix(index, tensor, _tensor(index, tensor).shape, (d_out, d_in))
            yield parent, attribute, tensor


def check_tied(index: Index) -> None:
    """Raises if a file has an output matrix of its own; a copy of the embedding is none."""
    output, table = index.tensors.get("output.weight"), _tensor(index, "token_embd.weight")
    if output is None:
        return
    if output.shape != table.shape:
        gguf_contents.refuse_untied(index.path)
    for start in range(0, table.shape[0], _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        if not np.array_equal(_decoded_rows(index, output, here), _decoded_rows(index, table, here)):
            gguf_contents.refuse_untied(index.path)


def _decoded_rows(index: Index, tensor: Tensor, rows: slice) -> np.ndarray:
    import gguf

    raw = np.memmap(index.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.nbytes,))
    return gguf.dequantize(raw.reshape(tensor.shape[0], -1)[rows], gguf.GGMLQuantizationType[tensor.kind])


def read_blocks(index: Index, name: str) -> tuple[str, np.ndarray]:
    """A matrix as the file holds it: ggml's name of its type, and its rows' bytes, (d_out, bytes) uint8."""
    tensor = _tensor(index, name)
    raw = np.fromfile(index.path, np.uint8, tensor.nbytes, offset=tensor.offset)
    return tensor.kind, raw.reshape(tensor.shape[0], -1)


def read_int8_rows(index: Index, name: str, rows_at_once: int = 8192) -> Int8Rows:
    """A table in 8 bits, never whole in floats: Q8_0's own codes and scales, else one scale a row."""
    import gguf

    tensor = _tensor(index, name)
    kind, raw = read_blocks(index, name)
    rows, width = tensor.shape
    if kind == "Q8_0":
        blocks = raw.reshape(rows, -1, 34)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]  # (V, D / 32)
        return Int8Rows(np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(rows, width), scales)
    codes, scales = np.empty((rows, width), np.int8), np.empty((rows, 1), np.float32)
    for start in range(0, rows, rows_at_once):
        here = slice(start, start + rows_at_once)
        part = Int8Rows.of(gguf.dequantize(raw[here], gguf.GGMLQuantizationType[kind]))
        codes[here], scales[here] = part.codes, part.scales
    return Int8Rows(codes, scales)


def _norm(index: Index, name: str) -> np.ndarray:
    # The file stores 1 + w (what the norm multiplies by), KerasHub keeps w.
    return read_tensor(index, name) - 1.0


def _norm_weights(index: Index, prefix: str, block) -> Iterator[tuple[Any, np.ndarray]]:
    attention = block.attention
    norms = {
        "attn_norm": block.pre_attention_norm,
        "post_attention_norm": block.post_attention_norm,
        "ffn_norm": block.pre_ffw_norm,
        "post_ffw_norm": block.post_ffw_norm,
        "attn_k_norm": attention.key_norm,
    }
    for name, layer in norms.items():
        yield layer.scale, _norm(index, f"{prefix}.{name}.weight")
    yield attention.query_norm.scale, _query_norm(index, f"{prefix}.attn_q_norm.weight", block)


def _kernel_weights(index: Index, prefix: str, block) -> Iterator[tuple[Any, np.ndarray]]:
    attention = block.attention
    for name, layer in {"q": attention.query_dense, "k": attention.key_dense, "v": attention.value_dense}.items():
        kernel = read_tensor(index, f"{prefix}.attn_{name}.weight")  # (heads * H, D)
        heads, width, size = layer._kernel.shape
        _check_matrix(index, f"{prefix}.attn_{name}.weight", kernel.shape, (heads * size, width))
        yield layer._kernel, kernel.reshape(heads, size, width).transpose(0, 2, 1)  # (heads, D, H)
    output = read_tensor(index, f"{prefix}.attn_output.weight")  # (D, heads * H)
    heads, size, width = attention.output_dense._kernel.shape
    _check_matrix(index, f"{prefix}.attn_output.weight", output.shape, (width, heads * size))
    yield attention.output_dense._kernel, output.T.reshape(attention.output_dense._kernel.shape)  # (heads, H, D)
    for name, layer in {"gate": block.gating_ffw, "up": block.gating_ffw_2, "down": block.ffw_linear}.items():
        yield layer._kernel, read_tensor(index, f"{prefix}.ffn_{name}.weight").T  # (d_out, d_in) -> (d_in, d_out)


def _check_matrix(index: Index, name: str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    if found != shape:
        raise GemmaLoraError(
            f"{index.path}: tensor {name} has shape {found}, the header's heads need {shape}. Convert it again."
        )


def _query_norm(index: Index, name: str, block) -> np.ndarray:
    """The query norm's weight, with Gemma 3 27B's other attention scale folded in.

    KerasHub scales the query by 1/sqrt(head size). The 27B wants 1/sqrt(width / query heads)
    (62 layers: the test llama.cpp makes too), and a factor on the norm's output does the same.
    """
    value = read_tensor(index, name)
    if index.fields["gemma3.block_count"] == 62:
        width = index.fields["gemma3.embedding_length"] // block.num_query_heads
        value = value * np.sqrt(block.head_dim / width)
    return value - 1.0
