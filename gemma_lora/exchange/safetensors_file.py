"""A safetensors file written one tensor after the other, so that a model is never in memory twice.

The format: eight bytes with the header's length, the header as JSON with each tensor's type, shape and place, then the
numbers. Reference: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

#: Our name of a type -> safetensors' and the bytes of one number.
TYPES = {"F32": ("F32", 4), "BF16": ("BF16", 2)}


def rounded(array: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as they are stored: float32, or bfloat16 rounded to nearest even as `ml_dtypes` does.

    Args:
        array: float32.
        kind: "F32" or "BF16".
    """
    import ml_dtypes

    return np.ascontiguousarray(array, np.float32) if kind == "F32" else array.astype(ml_dtypes.bfloat16)


def write(path: Path, entries: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], kind: str) -> int:
    """Writes a safetensors file.

    Args:
        path: Where it goes.
        entries: `(name, shape, read)`, where `read()` gives the numbers as `rounded` gives them.
        kind: "F32" or "BF16", for all of them.

    Returns:
        The bytes of all numbers.
    """
    entries = list(entries)
    stored, size = TYPES[kind]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in entries:
        start, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, read in entries:
            file.write(read().data if kind == "F32" else read().view(np.uint16).data)
    return end
