"""Which layer a tensor of a PEFT file belongs to, and which of a configuration's patterns name that layer.

A file's names are those of the training program's modules. What torch.compile, FSDP and PEFT itself wrap around a
module, and the two names that a Gemma's text model has in a multimodal one, change nothing about which layer it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

#: PEFT's names of what an adapter holds for a module; the last with DoRA only.
FACTORS, MAGNITUDE = ("lora_A", "lora_B"), "lora_magnitude_vector"

#: module, factor, and the adapter's name where the file keeps it: "….q_proj.lora_A.default.weight".
_TENSOR = re.compile(
    rf"(?P<module>.+)\.(?:(?P<factor>{'|'.join(FACTORS)})(?:\.(?P<adapter>[^.]+))?\.weight"
    rf"|(?P<magnitude>{MAGNITUDE})(?:\.(?!weight$)(?P<owner>[^.]+))?(?:\.weight)?)"
)
_PEFT = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: A Gemma's text block, under the names that its model has alone, as a backbone, and inside a multimodal model.
_BLOCK = re.compile(
    r"(?:model\.language_model\.model\.|language_model\.model\.|model\.language_model\.|language_model\.|model\.)?"
    r"(?P<place>layers\.\d+\..+)"
)
#: Parts of a Gemma that this package has no adapter for, each with a reason.
_ELSEWHERE = {
    "vision_tower": "the vision tower, and only text models are read here",
    "multi_modal_projector": "the projector of images, and only text models are read here",
    "audio_tower": "the audio tower, and only text models are read here",
    "lm_head": "the output table, which in a Gemma is the embedding",
    "embed_tokens": "the embedding",
}


@dataclasses.dataclass(frozen=True)
class TensorName:
    """What a tensor's name says.

    Args:
        module: transformers' name of the layer in a text model, `model.layers.0.self_attn.q_proj`.
        factor: `lora_A`, `lora_B` or `lora_magnitude_vector`.
        adapter: The adapter's name, where the file keeps it, else None.
        keys: The names that a pattern of the configuration may mean: PEFT's own in the training program, and `module`.
    """

    module: str
    factor: str
    adapter: str | None
    keys: tuple[str, ...]


def tensor_name(name: str) -> TensorName | None:
    """Reads a tensor's name; None if it is not one of a LoRA or DoRA layer.

    Example:

    >>> tensor_name("base_model.model._orig_mod.model.language_model.layers.3.mlp.up_proj.lora_B.default.weight").module
    'model.layers.3.mlp.up_proj'
    """
    match = _TENSOR.fullmatch(name)
    if match is None:
        return None
    own = unwrapped(match["module"])
    block = _BLOCK.fullmatch(own)
    module = f"model.{block['place']}" if block else own
    as_written = match["module"].rpartition(_PEFT)[2]
    keys = tuple(dict.fromkeys((as_written, own, module)))
    return TensorName(module, match["factor"] or match["magnitude"], match["adapter"] or match["owner"], keys)


def unwrapped(module: str) -> str:
    """A module's name without what torch.compile, FSDP, data parallelism and PEFT put before and between."""
    parts = [part for part in module.split(".") if part not in _WRAPPERS]
    name = ".".join(parts)
    while name.startswith((_PEFT, f"module.{_PEFT}")):
        name = name.removeprefix("module.").removeprefix(_PEFT)
    return name.removeprefix("module.")


def elsewhere(module: str) -> str | None:
    """Which part of a Gemma outside its text blocks a module is, in words; None if it is none of those known."""
    parts = module.split(".")
    return next((words for part, words in _ELSEWHERE.items() if part in parts), None)


def pattern_for(patterns: Iterable[str], keys: Iterable[str]) -> str | None:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first pattern that is a name's end.

    A pattern is a regular expression. It must match from the name's beginning or from behind a dot, up to the end.

    Args:
        patterns: In the configuration's order.
        keys: A layer's names.

    Returns:
        The pattern, or None.

    Raises:
        re.error: If a pattern is no regular expression.

    Reference: peft 0.21, `peft.utils.other.get_pattern_key`.
    """
    keys = tuple(keys)
    for pattern in patterns:
        if any(re.match(rf"(.*\.)?({pattern})$", key) for key in keys):
            return pattern
    return None


def is_targeted(config: dict[str, Any], keys: Iterable[str]) -> bool:
    """PEFT's rule for which modules get LoRA: `target_modules`, `exclude_modules`, `layers_to_transform`.

    Raises:
        re.error: If a pattern is no regular expression.

    Reference: peft 0.21, `peft.tuners.tuners_utils.check_target_module_exists`.
    """
    keys = tuple(keys)
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and any(_names(excluded, key) for key in keys):
        return False
    if targets is None or targets == "all-linear":  # PEFT writes what it has chosen; nothing is written by hand only
        return True
    if not any(_names(targets, key) for key in keys):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    if any(key in targets for key in keys):  # named in full, a layer is chosen whatever its number
        return True
    chosen = layers if isinstance(layers, list) else [layers]
    numbers = (re.search(r"\.(\d+)\.", key) for key in keys)
    return any(int(number[1]) in chosen for number in numbers if number)


def _names(targets: str | list[str], key: str) -> bool:
    """Whether a regular expression matches a whole name, or one of a list is the name's end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, key) is not None
    return any(key == target or key.endswith(f".{target}") for target in targets)
