"""The text around a prompt and its answer, stored with an adapter so that it is the same ever after."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError

#: Control tokens that a template may hold; in a user's own text they stay plain text.
CONTROL_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around a prompt and a response.

    Args:
        prompt: Text with `{prompt}` where the user's text goes.
        response: Text with `{response}` where the answer goes, and the token that ends it.
        stop: Tokens that end a generated answer.

    Example:

    >>> Template("Expense: {prompt}\\nJSON:", " {response}<eos>").stop
    ('<eos>',)
    """

    prompt: str
    response: str
    stop: tuple[str, ...] = ("<eos>",)

    def __post_init__(self):
        for name in ("prompt", "response"):
            text = getattr(self, name)
            if not isinstance(text, str) or text.count("{" + name + "}") != 1:
                raise ValueError(f"Template.{name} must be text that holds {{{name}}} once. Received: {text!r}")
        if not self.stop or not all(isinstance(token, str) for token in self.stop):
            raise ValueError(f"Template.stop must name at least one token. Received: {self.stop!r}")

    @classmethod
    def base(cls) -> Template:
        """For weights that only go on with a text: the prompt, a line's end, the answer. They know no turns."""
        return cls("{prompt}\n", "{response}<eos>", ("<eos>",))

    @classmethod
    def gemma_chat(cls) -> Template:
        """Gemma's chat template for one turn of the user and one of the model."""
        return cls(
            "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
            "{response}<end_of_turn>",
            ("<end_of_turn>", "<eos>"),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "response": self.response, "stop": list(self.stop)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Template:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a field is missing or of the wrong type.
        """
        if not isinstance(values, dict) or not {"prompt", "response"} <= set(values):
            raise ValueError(f"a template needs the fields prompt and response. Received: {values!r}")
        if unknown := sorted(set(values) - {"prompt", "response", "stop"}):
            raise ValueError(
                f"a template has the fields prompt, response and stop. Received also: {', '.join(unknown)}"
            )
        stop = values.get("stop", ["<eos>"])
        if not isinstance(stop, list | tuple):
            raise ValueError(f"a template's stop is a list of tokens. Received: {stop!r}")
        return cls(values["prompt"], values["response"], tuple(stop))


#: Templates that have a word of their own.
NAMED = {"base": Template.base, "chat": Template.gemma_chat}


def find_template(template: Template | str | os.PathLike | None) -> Template | None:
    """The template that is meant: itself, a word ("base", "chat"), or a file's.

    Raises:
        GemmaLoraError: If the file is missing or holds no template.
        ValueError: If it is none of these.

    Example:

    >>> find_template("chat") == Template.gemma_chat()
    True
    """
    if template is None or isinstance(template, Template):
        return template
    if not isinstance(template, str | os.PathLike):
        raise ValueError(f"`template` must be a Template, a file, 'base' or 'chat'. Received: {template!r}")
    if template in NAMED:
        return NAMED[str(template)]()
    if not Path(template).is_file():
        raise GemmaLoraError(f"{template}: no such template. Give a template.json, or one of {', '.join(NAMED)}.")
    return read_template(template)


def read_template(path: str | os.PathLike) -> Template:
    """Reads a `template.json`.

    Raises:
        GemmaLoraError: If it cannot be read, or holds no template.
    """
    try:
        return Template.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise GemmaLoraError(
            f"{path}: not a template ({error}). It needs the fields prompt and response, and may have stop."
        ) from error


def default_template(model: Any) -> Template:
    """The template that a model's weights were made with.

    Args:
        model: What `load_gemma` gave; it says whether the weights are instruction-tuned. A model that does not say is
            taken for a base model.

    Returns:
        Gemma's chat template for instruction-tuned weights, else `Template.base()`.
    """
    return Template.gemma_chat() if getattr(model, "gemma_lora_instruction_tuned", False) else Template.base()


def template_of(model: Any, template: Template | None = None) -> Template:
    """The template to use: the given one, else the one the model was fine-tuned with, else its weights' own.

    Args:
        model: A KerasHub Gemma, with an adapter or without.
        template: The caller's or the dataset's, or None if they name none.
    """
    return template or getattr(model, "gemma_lora_template", None) or default_template(model)


def template_reason(model: Any, template: Template | None = None, origin: str = "the dataset's own") -> str:
    """One line that says which template `template_of` gives for the same arguments, and why.

    Args:
        model, template: As for `template_of`.
        origin: Where a given template is from.
    """
    if template is not None:
        why = origin
    elif getattr(model, "gemma_lora_template", None) is not None:
        why = "the adapter's"
    elif getattr(model, "gemma_lora_instruction_tuned", False):
        why = "Gemma's chat template, for the weights are instruction-tuned"
    else:
        why = "the base model's, for the weights are not instruction-tuned"
    chosen = template_of(model, template)
    return f"Template: {chosen.prompt + chosen.response!r} ({why})."
