"""Gemma's tokenizer out of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.gemma.sentencepiece_model import model_bytes

#: SentencePiece's numbers for kinds of pieces; GGUF uses the same.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
#: Of a picture's placeholder Google's own file knows nothing: no text may become one.
_NO_PIECE_OF_GOOGLES = ("<image_soft_token>",)
#: GGUF's names of the control tokens that Google's file has, and SentencePiece's.
_ENDS = {"bos": "bos_id", "eos": "eos_id", "padding": "pad_id"}


def tokenizer_proto(path: Path, reader: Any, rows: int | None) -> bytes:
    """Rebuilds Gemma's SentencePiece model from the file's pieces, scores and types.

    In Gemma's own `tokenizer.model` three pieces are control tokens, `<pad>`, `<eos>` and `<bos>`; `<start_of_turn>`,
    `<mask>`, `<unused0>` and so on are user-defined: one token where a text has the name. llama.cpp's converter calls
    all of them control tokens, which SentencePiece never finds in a text; here they are what they were.

    Args:
        path: The file, for messages.
        reader: The `gguf` library's reader of it.
        rows: Of the embedding, or None; tokens behind them that are no ordinary text are left out.

    Returns:
        A serialized SentencePiece model.

    Raises:
        GemmaLoraError: If the file has no tokenizer, or text that has no row.
    """
    columns = [reader.fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    if any(column is None for column in columns):
        raise GemmaLoraError(f"{path}: holds no SentencePiece tokenizer (tokens, scores and types). Convert it again.")
    tokens, scores, kinds = (column.contents() for column in columns)
    # Tokens without a row of the embedding: Gemma 3's tokenizer has one for pictures, its text models have no weights.
    rows = len(tokens) if rows is None else rows
    if any(kind in (_NORMAL, _BYTE) for kind in kinds[rows:]):
        raise GemmaLoraError(
            f"{path}: has {len(tokens):,} tokens, and an embedding of {rows:,} rows: some text has no weights. Convert "
            "the model again."
        )
    tokens, scores, kinds = tokens[:rows], scores[:rows], kinds[:rows]
    unknown = int(reader.fields["tokenizer.ggml.unknown_token_id"].contents())
    ends = {field: int(reader.fields[f"tokenizer.ggml.{field}_token_id"].contents()) for field in _ENDS}
    pieces = []
    for position, (piece, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        if kind == _CONTROL and position not in ends.values() and piece not in _NO_PIECE_OF_GOOGLES:
            kind = _USER_DEFINED
        # llama.cpp writes the spaces of user-defined pieces (Gemma's runs of spaces) plainly, SentencePiece wants ▁.
        text = piece.replace(" ", "▁") if kind == _USER_DEFINED else piece
        pieces.append((text, float(score), _UNKNOWN if position == unknown else int(kind)))
    return model_bytes(pieces, {"unk_id": unknown, **{name: ends[field] for field, name in _ENDS.items()}})
