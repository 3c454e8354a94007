"""Worked examples in a prompt: a fair chance for a model that was not tuned, and a fair end of its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template

#: What may stand between worked examples, the plainest first.
_SEPARATORS = ("\n", "\n\n", "\n\n\n", "\n###\n", "\n-----\n")


def separator_of(responses: Sequence[str], template: Template) -> str:
    """Text to put between worked examples: the plainest that occurs in none of the answers.

    A model that was shown worked examples goes on with the next one when its answer is done. So its answer ends where
    this text begins, and answers of several lines are not cut at their first line's end.

    Args:
        responses: The answers of the lines that may be shown.
        template: The task's template; the text it puts before an answer counts as part of it.

    Example:

    >>> plain = Template("{prompt}\\n", "{response}<eos>")
    >>> separator_of(["one", "two"], plain), separator_of(["one\\ntwo"], plain)
    ('\\n', '\\n\\n')
    """
    shown = [template.response.replace("{response}", response).strip() for response in responses]
    free = (text for text in _SEPARATORS if not any(text in answer for answer in shown))
    if (found := next(free, None)) is not None:
        return found
    dashes = 6
    while any(f"\n{'-' * dashes}\n" in answer for answer in shown):
        dashes += 1
    return f"\n{'-' * dashes}\n"


def before(separator: str, text: str) -> tuple[str, bool]:
    """A text up to a separator, and whether it was there; white space that an answer begins with is none.

    Example:

    >>> before("\\n", " 4\\nnext question"), before("\\n", "4")
    ((' 4', True), ('4', False))
    """
    begins = len(text) - len(text.lstrip())
    end = text.find(separator, begins)
    return (text, False) if end < 0 else (text[:end], True)


def few_shot_template(template: Template, examples: Sequence[Example]) -> Template:
    """A template that shows worked examples before the question, as plain text; answers of one line.

    `evaluate(…, shots=…)` shows them as tokens, which chats, control tokens in a user's text and answers of several
    lines need.

    Args:
        template: The task's template.
        examples: The examples to show, in this order.

    Returns:
        A `Template` whose answers also end at a line's end.
    """
    shown = []
    for example in examples:
        prompt = template.prompt.replace("{prompt}", example.prompt)
        response = template.response.replace("{response}", example.response)
        for token in template.stop:
            response = response.replace(token, "")
        shown.append(f"{prompt}{response}\n")
    return dataclasses.replace(template, prompt="".join(shown) + template.prompt, stop=(*template.stop, "\n"))
