"""Which tokens of an example carry loss, as a picture in a notebook or a terminal."""

from __future__ import annotations

import dataclasses
import html
import os

from gemma_lora.data.encoding import encode_parts, parts_of
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template


@dataclasses.dataclass(frozen=True)
class MaskView:
    """Tokens coloured by loss weight; see `show_mask`."""

    pieces: list[tuple[str, bool]]

    def _repr_html_(self) -> str:
        box = "padding:1px 2px;margin:1px;border-radius:2px;white-space:pre-wrap;"
        styles = {  # colours of their own on both, so that a dark page changes nothing
            True: box + "background:#0b5394;color:#fff;font-weight:bold;text-decoration:underline",
            False: box + "background:#e8e8e8;color:#444",
        }
        spans = [f'<span style="{styles[loss]}">{html.escape(piece)}</span>' for piece, loss in self.pieces]
        legend = "bold and underlined on blue: carries loss (the model learns to write it); grey: read only"
        body = f"{''.join(spans)}<br><small>{legend}</small>"
        return f'<div style="font-family:monospace;line-height:1.9">{body}</div>'

    def __str__(self) -> str:
        if os.environ.get("NO_COLOR"):
            line = " ".join(f"[{piece}]" if loss else piece for piece, loss in self.pieces)
            return f"{line}\n(in brackets: carries loss)"
        line = "".join(f"\x1b[{'1;4;97;44' if loss else '2'}m{piece}\x1b[0m" for piece, loss in self.pieces)
        return f"{line}\n(bold, underlined: carries loss)"

    def print(self) -> None:
        """Prints the coloured tokens to a terminal."""
        print(str(self))


# What would break the line, or command the terminal, is shown as a sign: "↵", "␛" and their like.
_SIGNS = {code: 0x2400 + code for code in range(32)} | {ord("▁"): " ", ord("\n"): "↵", 0x7F: "␡"}
_SIGNS |= dict.fromkeys(range(0x80, 0xA0), "�")


def show_mask(example: Example, tokenizer, template: Template | None) -> MaskView:
    """Shows which tokens of an example carry loss, in a notebook (its value) or a terminal (`print(...)`).

    Args:
        example: The example.
        tokenizer: As in `encode`, with `id_to_token`.
        template: The text around a prompt.

    Returns:
        A view with an HTML form and a text form. With NO_COLOR set, brackets stand for colour.
    """
    ((ids, mask),) = encode_parts([parts_of(example, template)], tokenizer)
    words = [str(tokenizer.id_to_token(int(i))).translate(_SIGNS) for i in ids]
    return MaskView(list(zip(words, mask.tolist(), strict=True)))
