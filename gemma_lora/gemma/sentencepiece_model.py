"""A SentencePiece model file, written without generated code.

The sentencepiece package has Python code that protobuf's compiler generated. Code generated for protobuf 7.36
(sentencepiece 0.2.3) refuses to run with an older protobuf, such as Colab's 5.29. The file has few fields, and its
format is simple, so it is written here: then any version of the two packages serves.

Reference: protobuf's documentation, "Encoding"; SentencePiece's `sentencepiece_model.proto` for the fields' numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

_VARINT, _LENGTH, _FIXED32 = 0, 2, 5  # protobuf's wire types
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
