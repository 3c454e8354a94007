"""A SentencePiece model file, written and read without generated code.

The sentencepiece package has Python code that protobuf's compiler generated. Code generated for protobuf 7.36
(sentencepiece 0.2.3) refuses to run with an older protobuf, such as Colab's 5.29. The file has few fields, and its
format is simple, so it is written and read here: any version of sentencepiece serves then, and protobuf is not needed.

Reference: protobuf's documentation, "Encoding"; SentencePiece's `sentencepiece_model.proto` for the fields' numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
#: `ModelProto`'s fields: the pieces, how the model was trained, how a text is normalized.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
#: `TrainerSpec`'s fields that say how a text is cut, by name.
_TRAINER_FIELDS = {
    "model_type": 3,
    "vocab_size": 4,
    "byte_fallback": 35,
    "unk_id": 40,
    "bos_id": 41,
    "eos_id": 42,
    "pad_id": 43,
}
_BPE = 2
_NORMAL = 1  # a piece's kind where the file does not say


def varint(number: int) -> bytes:
    """A non-negative integer in protobuf's variable length: seven bits per byte, the lowest first.

    Example:

    >>> varint(1).hex(), varint(300).hex()
    ('01', 'ac02')
    """
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _field(number: int, value: int | bytes) -> bytes:
    """One field: its number and wire type, then the value."""
    if isinstance(value, bytes):
        return varint(number << 3 | _LENGTH) + varint(len(value)) + value
    return varint(number << 3 | _VARINT) + varint(value)


def _piece(piece: str, score: float, kind: int) -> bytes:
    return _field(1, piece.encode()) + varint(2 << 3 | _FIXED32) + struct.pack("<f", score) + _field(3, kind)


def model_bytes(pieces: Iterable[tuple[str, float, int]], ids: Mapping[str, int]) -> bytes:
    """A SentencePiece model with byte-pair merges, byte fallback and no normalization, as Gemma's.

    Args:
        pieces: `(piece, score, kind)` of each token in order; kinds are SentencePiece's numbers (1 normal, 2 unknown,
            3 control, 4 user-defined, 6 byte).
        ids: Numbers of the special tokens, by the names `"unk_id"`, `"bos_id"`, `"eos_id"` and `"pad_id"`.

    Returns:
        The file's bytes, for `SentencePieceProcessor(model_proto=…)`.
    """
    entries = [_field(_PIECES, _piece(*piece)) for piece in pieces]
    trainer = {"model_type": _BPE, "vocab_size": len(entries), "byte_fallback": 1, **ids}
    by_number = sorted((_TRAINER_FIELDS[name], value) for name, value in trainer.items())
    # name, then add_dummy_prefix, remove_extra_whitespaces and escape_whitespaces: no space is added or removed
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return b"".join(
        [*entries, _field(_TRAINER, b"".join(_field(*f) for f in by_number)), _field(_NORMALIZER, normalizer)]
    )


def model_pieces(data: bytes) -> list[tuple[str, float, int]]:
    """The pieces of a SentencePiece model, in order.

    Args:
        data: A serialized `ModelProto`, such as the bytes of a `tokenizer.model`.

    Returns:
        `(piece, score, kind)` of each token, as `model_bytes` takes them.

    Raises:
        ValueError: If the bytes are no such message.

    Example:

    >>> model_pieces(model_bytes([("<unk>", 0.0, 2), ("a", -1.5, 1)], {"unk_id": 0}))
    [('<unk>', 0.0, 2), ('a', -1.5, 1)]
    """
    pieces = []
    for number, value, _ in _fields(data):
        if number == _PIECES:
            found = {field: content for field, content, _ in _fields(value)}
            score = struct.unpack("<f", found.get(2, bytes(4)))[0]
            pieces.append(
                (found.get(1, b"").decode(), score, found.get(3, 1))
            )  # 1 is the kind's default, a normal piece
    return pieces


def first_pieces(data: bytes, count: int) -> bytes:
    """The model with its first `count` pieces only; all else stays as it is.

    Args:
        data: As in `model_pieces`.
        count: Integer, how many pieces are kept; no more than there are.
    """
    kept, seen = [], 0
    for number, value, raw in _fields(data):
        if number == _PIECES:
            seen += 1
            if seen > count:
                continue
        if number == _TRAINER:  # of a number that stands twice in a message the last one counts
            raw = _field(_TRAINER, value + _field(_TRAINER_FIELDS["vocab_size"], count))
        kept.append(raw)
    return b"".join(kept)


def _fields(data: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """The fields of a message: number, value (an integer, or bytes) and the field as it stands there."""
    place = 0
    while place < len(data):
        start = place
        value: int | bytes
        key, place = _read_varint(data, place)
        kind = key & 7
        if kind == _VARINT:
            value, place = _read_varint(data, place)
        else:
            if kind == _LENGTH:
                size, place = _read_varint(data, place)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"The bytes are no SentencePiece model: field of type {kind} at byte {start}")
            value, place = data[place : place + size], place + size
        if place > len(data):
            raise ValueError(f"The bytes are no SentencePiece model: they end within the field at byte {start}")
        yield key >> 3, value, data[start:place]


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in protobuf's variable length, and the place behind it."""
    number = shift = 0
    while place < len(data):
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
    raise ValueError("The bytes are no SentencePiece model: they end within a number")
