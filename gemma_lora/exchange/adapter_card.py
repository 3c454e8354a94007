"""An adapter's card: the `README.md` that people and model hubs read in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_lora.base.files import write_text_atomic
from gemma_lora.gemma.origin import Origin

CARD = "README.md"
#: The end of a card of ours: a file without it is somebody else's, and is not written over.
_SIGNED = (
    "<!-- Written by gemma_lora's save_adapter, which writes it anew. Delete this line to keep your own text. -->\n"
)


def write_card(folder: Path, base: Origin, config: dict[str, Any]) -> None:
    """Writes the card of an adapter, unless the folder has one that was not written here.

    Args:
        folder: The adapter's.
        base: What it was trained on.
        config: PEFT's LoraConfig as a dictionary.
    """
    path = folder / CARD
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").endswith(_SIGNED):
        return
    write_text_atomic(path, card(base, config))


def card(base: Origin, config: dict[str, Any]) -> str:
    """The card's text: front matter that a hub reads, the base, the adapter, and how to load it."""
    kind = ("DoRA" if config["use_dora"] else "LoRA") + (", rank-stabilized" if config["use_rslora"] else "")
    ranks = sorted({config["r"], *config["rank_pattern"].values()})
    front = ["library_name: peft", *([f"base_model: {base.name}"] if base.name else []), "tags: [lora, gemma]"]
    lines = [
        "---",
        *front,
        "---",
        "# Adapter",
        "",
        f"{kind} of rank {', '.join(map(str, ranks))} on {base.name or 'a base that is not named'}.",
        "",
        *_of_file(base),
        'In gemma_lora: `gl.load_adapter(gl.load_gemma(...), "this folder")`. '
        'In PEFT: `PeftModel.from_pretrained(model, "this folder")`.',
        "",
        _SIGNED.rstrip("\n"),
    ]
    return "\n".join(lines) + "\n"


def _of_file(base: Origin) -> list[str]:
    """What is to be known of a base that was read from a GGUF file."""
    if base.gguf_sha256 is None and base.gguf_type is None:
        return []
    kind = f"{base.gguf_type} " if base.gguf_type else ""
    digest = f" with SHA-256 `{base.gguf_sha256}`" if base.gguf_sha256 else ""
    text = f"It was trained on a {kind}GGUF file{digest}, decoded to floats."
    if base.is_rounded:
        text += " The original weights differ from it by that file's rounding, so answers on them may differ a little."
    return [text, ""]
