"""A command's options, made from the fields of the settings: type, default, bounds and help stand in one place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.settings import ANSWERING_FIELDS, FIELDS, Answering, Settings, check


def _option(name: str, answering: bool = False) -> inspect.Parameter:
    """A command's parameter for a field of `Settings` or `Answering`: type, default, bounds, help are the field's."""
    fields, of = (ANSWERING_FIELDS, Answering) if answering else (FIELDS, Settings)
    field = fields[name]
    hint: Any = str if name == "targets" else get_type_hints(of)[name]  # several names come in one word
    declared = [_dashed(name)] if field.metadata.get("flag") else []
    bounds = {bound: field.metadata[bound] for bound in ("min", "max") if bound in field.metadata}
    option = typer.Option(*declared, help=field.metadata["help"], **bounds)
    annotation = Annotated[hint, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def takes(*names: str, answering: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of these settings, which come to it, checked, as `**chosen`.

    They stand after its own positional parameters and before those by keyword only. With `answering` the options of
    `Answering` follow them.
    """
    more = list(ANSWERING_FIELDS) if answering else []

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
        last = [p for p in own if p.kind is p.KEYWORD_ONLY]

        def checked(**given: Any) -> None:
            try:
                settings = check(**{name: given.pop(name) for name in names})
                if answering:
                    settings |= vars(Answering(**{name: given.pop(name) for name in more}))
            except ValueError as error:  # which names settings as Python does
                raise GemmaLoraError(_as_options(str(error))) from None
            command(**given, **settings)

        options = [_option(name) for name in names] + [_option(name, answering=True) for name in more]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in first] + options + last
        checked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        checked.__annotations__ = {p.name: p.annotation for p in parameters}
        checked.__name__, checked.__doc__ = command.__name__, command.__doc__
        return checked

    return decorate


def _as_options(text: str) -> str:
    """A message with `row_length` written as --row-length."""
    known = FIELDS | ANSWERING_FIELDS
    return re.sub("`([a-z_]+)`", lambda m: _dashed(m[1]) if m[1] in known else m[0], text)


OFFERED = [name for name, field in FIELDS.items() if field.metadata.get("option", True)]
MODEL = ("model", "quantization", "double_quant")
STOP = typer.Option(help="End an answer before this text; may be given several times.")
ADAPTER = typer.Option(help="Adapter folder (PEFT): adapter_config.json and adapter_model.safetensors.")
