"""Whether a Gemma's weights are instruction-tuned, as far as their name or their file says so.

It decides which text stands around a prompt by default (`data.templates.default_template`). A chat template inside a
file decides nothing: files of base models have one as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_lora.base.settings import BUILTIN_NAME

#: What a GGUF file says of its weights' making.
_FIELDS = ("general.name", "general.basename", "general.finetune")
#: "instruct" anywhere, or "it" as a word: `gemma-3-1b-it`, `gemma3_instruct_1b`, "Gemma 3 1b It".
_SAYS_SO = re.compile("instruct|(?<![a-z0-9])it(?![a-z0-9])", re.IGNORECASE)


def is_instruction_tuned(source: str | os.PathLike, fields: Mapping[str, Any] | None = None) -> bool:
    """Whether weights are instruction-tuned.

    Args:
        source: What `load_gemma` takes: the built-in name, a path, a preset's or a hub's name.
        fields: A GGUF file's metadata, if it is one.

    Returns:
        False for the built-in model and wherever nothing says otherwise, as in a folder of one's own.

    Example:

    >>> is_instruction_tuned("hf://google/gemma-3-1b-it"), is_instruction_tuned("gemma3_1b")
    (True, False)
    """
    text = os.fspath(source)
    if text == BUILTIN_NAME:
        return False
    # Of a path only its end: what a folder above is called says nothing about the file.
    name = text if "://" in text else Path(text).name
    told = [name, *(str((fields or {}).get(field, "")) for field in _FIELDS)]
    return any(_SAYS_SO.search(part) for part in told)
