"""Which weights a model has: its name for other tools, and the GGUF file they were read from, if it was one.

`load_gemma` records it; an adapter's folder says which base it was trained on, and loading it on another one warns.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_lora.base.files import sha256_of
from gemma_lora.base.settings import BUILTIN_NAME

#: The built-in model's name on a model hub.
BUILTIN_HUB_NAME = "google/gemma-3-270m"
#: KerasHub's presets of Google's text models -> the same weights' name on Hugging Face.
_PRESETS = (
    (re.compile(r"gemma_(instruct_)?(2b|7b)_en"), "google/gemma-{1}{it}"),
    (re.compile(r"gemma_1\.1_(instruct_)(2b|7b)_en"), "google/gemma-1.1-{1}{it}"),
    (re.compile(r"gemma2_(instruct_)?(2b|9b|27b)_en"), "google/gemma-2-{1}{it}"),
    (re.compile(r"gemma3_(instruct_)?(270m)"), "google/gemma-3-{1}{it}"),
    (re.compile(r"gemma3_(instruct_)?(1b|4b|12b|27b)(?:_text)?"), "google/gemma-3-{1}{it_or_pt}"),
)
#: Where a GGUF file says what it was made of: the file's own repository last, for that may hold GGUF files only.
_FIELDS = ("general.base_model.0.repo_url", "general.source.repo_url", "general.source.huggingface.repository")
_HUB_URL = re.compile(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+)/?")
#: llama.cpp's numbers for a file's main type (`general.file_type`).
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Args:
        name: What other tools load: `owner/name` on a hub, a folder, a preset, or a GGUF file's name.
        gguf_sha256: The SHA-256 of the GGUF file they were decoded from, 64 hexadecimal digits, or None.
        gguf_type: That file's main type, `"Q4_K_M"` for example, or None.
    """

    name: str | None = None
    gguf_sha256: str | None = None
    gguf_type: str | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether the weights went through a file of fewer bits than 16 per weight."""
        return self.gguf_type is not None and self.gguf_type not in ("F32", "F16", "BF16")

    def differs_from(self, other: Origin) -> str | None:
        """How these weights are others than `other`, in a sentence's words; None where nothing says that they are.

        Names are compared where both are known. If these weights come from a GGUF file, the other must be of that file.
        """
        if not other.name:
            return None
        renamed = self.name is not None and not _same_name(self.name, other.name)
        other_file = self.gguf_sha256 is not None and self.gguf_sha256 != other.gguf_sha256
        return f"{self} is not {other}" if renamed or other_file else None

    def __str__(self) -> str:
        if self.gguf_sha256 is None:
            return self.name or "a base without a name"
        kind = f"{self.gguf_type} " if self.gguf_type else ""
        return f"{self.name or 'a base without a name'} from a {kind}GGUF file (SHA-256 {self.gguf_sha256[:8]}…)"


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """What is known when weights are read; a file's SHA-256 is computed when somebody asks."""

    name: str
    path: Path | None
    identity: tuple[int, ...] | None  # the file's, as it was then
    gguf_type: str | None
    gguf_sha256: str | None  # where it is known already


def record_origin(
    model: Any,
    source: str,
    gguf: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    sha256: str | None = None,
) -> None:
    """Says of a model where its weights come from; `load_gemma` calls it.

    Args:
        model: A KerasHub `CausalLM`.
        source: What `load_gemma` was given.
        gguf: The GGUF file that was read, if any.
        fields: That file's metadata.
        sha256: That file's SHA-256, where it has been computed.
    """
    kind = _FILE_TYPES.get((fields or {}).get("general.file_type", -1))
    identity = None if gguf is None else _identity(gguf)
    model.gemma_lora_origin = _Recorded(hub_name(source, fields), gguf, identity, kind, sha256)


def is_known(model: Any) -> bool:
    """Whether it is recorded where a model's weights come from."""
    return getattr(model, "gemma_lora_origin", None) is not None


def origin_of(model: Any) -> Origin:
    """Where a model's weights come from, as far as it is known; of a model that was not made by `load_gemma`, nothing.

    A GGUF file's SHA-256 is that of the file that was read: it is computed at the first call, and is None if the file
    has changed since.
    """
    recorded = getattr(model, "gemma_lora_origin", None)
    if recorded is None:
        return Origin()
    if recorded.path is None:
        return Origin(recorded.name)
    digest = recorded.gguf_sha256 or _digest(recorded.path, recorded.identity)
    return Origin(recorded.name, digest, recorded.gguf_type)


def hub_name(source: str, fields: Mapping[str, Any] | None = None) -> str:
    """What other tools call the weights that `load_gemma(source)` reads.

    Args:
        source: As in `load_gemma`.
        fields: A GGUF file's metadata, if it is one.

    Example:

    >>> hub_name("gemma3_instruct_1b"), hub_name("hf://me/my-gemma"), hub_name("models/some.gguf")
    ('google/gemma-3-1b-it', 'me/my-gemma', 'some.gguf')
    """
    if source == BUILTIN_NAME:
        return BUILTIN_HUB_NAME
    if source.startswith("hf://"):
        return source.removeprefix("hf://")
    if source.endswith(".gguf"):
        told = (_HUB_URL.fullmatch(str((fields or {}).get(field, ""))) for field in _FIELDS)
        return next((match[1] for match in told if match), Path(source).name)
    # A preset's handle ends in its name, then perhaps its version: kaggle://keras/gemma3/keras/gemma3_1b/3.
    handle = re.sub(r"/\d+$", "", source).rsplit("/", 1)[-1] if source.startswith("kaggle://") else source
    for pattern, name in _PRESETS:
        if match := pattern.fullmatch(handle):
            instruct, size = match.groups()
            return name.format(None, size, it="-it" if instruct else "", it_or_pt="-it" if instruct else "-pt")
    return source


def _same_name(one: str, other: str) -> bool:
    """Whether two names may be of the same weights: case does not count, and of a path only its end does."""
    if _is_path(one) or _is_path(other):
        one, other = (name.rstrip("/").rsplit("/", 1)[-1] for name in (one, other))
    return one.lower() == other.lower()


def _is_path(name: str) -> bool:
    return name.count("/") != 1 or name.startswith((".", "/", "~"))


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=16)
def _digest(path: Path, identity: tuple[int, ...]) -> str | None:
    """The SHA-256 of a file if it is still the one of this identity."""
    try:
        found = sha256_of(path) if _identity(path) == identity else None
        return found if found and _identity(path) == identity else None
    except OSError:
        return None
