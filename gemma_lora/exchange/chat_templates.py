"""A training's template as other programs write theirs: Jinja for transformers and llama.cpp, Go for Ollama.

Each gives a chat the text that `data.encoding.encode_prompt` gives its tokens: system text joins the first turn, white
space around a text is taken off, and a line's end stands between a model's turn and the next one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import CONTROL_TOKENS, Template


def jinja_of(template: Template) -> str:
    """The chat template that transformers, llama.cpp and vLLM apply to a chat.

    It ends where the model is to answer. What a template has before `{response}` is left to the model, which learned
    to say it.

    Args:
        template: The text around prompt and response.

    Returns:
        A Jinja template of one line. It raises on roles that do not alternate.

    Example:

    >>> import jinja2
    >>> chat = [{"role": "user", "content": " 2 + 2 "}]
    >>> jinja2.Template(jinja_of(Template("{prompt} =", "{response}<eos>"))).render(messages=chat, bos_token="<bos>")
    '<bos>2 + 2 ='
    """
    before, after = (_quoted(side) for side in template.prompt.removeprefix("<bos>").split("{prompt}"))
    opens, closes = (_quoted(side) for side in template.response.split("{response}"))
    return (
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for turn in turns %}"
        "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) or turn['role'] not in ['user', 'assistant', 'model']"
        " %}{{ raise_exception('The chat must be user and assistant in turns, with system text before them only.') }}"
        "{% endif %}"
        "{% if turn['role'] == 'user' %}"
        f"{{% if not loop.first %}}{{{{ {_quoted(chr(10))} }}}}{{% endif %}}"
        f"{{{{ {before} }}}}"
        f"{{% if loop.first and system | trim %}}{{{{ system + {_quoted(chr(10) * 2)} }}}}{{% endif %}}"
        f"{{{{ turn['content'] | trim }}}}{{{{ {after} }}}}"
        f"{{% else %}}{{{{ {opens} }}}}{{{{ turn['content'] | trim }}}}{{{{ {closes} }}}}"
        "{% endif %}{% endfor %}"
    )


def _quoted(text: str) -> str:
    """Text as a string of Jinja's, which knows Python's escapes."""
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "'" + "".join(escapes.get(sign, sign) for sign in text) + "'"


def modelfile_of(template: Template, source: str, adapter: str | None = None, notes: Sequence[str] = ()) -> str:
    """An Ollama Modelfile: what to load, the text around a prompt, where to stop, and greedy answers.

    Args:
        template: The text around prompt and response. Ollama adds `<bos>` itself.
        source: The GGUF file of the model, as seen from the Modelfile's folder.
        adapter: The GGUF file of an adapter, or None.
        notes: Lines of comment for its head.

    Raises:
        GemmaLoraError: If the template holds three quotation marks, which end a Modelfile's text.
    """
    before, after = (_go(side) for side in template.prompt.removeprefix("<bos>").split("{prompt}"))
    closes = _go(template.response.split("{response}")[1])
    # Ollama repeats this for every turn and cuts the last one at .Response; a line's end comes between turns. What a
    # template has before `{response}` is not written: the model says it, so it is in .Response.
    body = f"{before}{{{{ if .System }}}}{{{{ .System }}}}\n\n{{{{ end }}}}{{{{ .Prompt }}}}{after}"
    body += f"{{{{ .Response }}}}{closes}\n"
    if '"""' in body:
        raise GemmaLoraError('The template holds """, which a Modelfile cannot hold. Give another template.')
    lines = [*(f"# {note}" for note in notes), f"FROM {source}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    lines += [f'TEMPLATE """{body}"""']
    lines += [f"PARAMETER stop {_stop(text)}" for text in stop_texts(template)]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join(lines) + "\n"


def stop_texts(template: Template) -> tuple[str, ...]:
    """What ends an answer, `<eos>` included."""
    return tuple(dict.fromkeys(("<eos>", *(text for text in template.stop if text))))


def strings_beside_tokens(template: Template) -> tuple[str, ...]:
    """Those of a template's stops that are no control token: programs that stop at tokens do not know them."""
    return tuple(text for text in stop_texts(template) if text not in CONTROL_TOKENS)


def _go(text: str) -> str:
    """Text as it stands in a Go template."""
    return re.sub(r"\{\{|\}\}", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)


def _stop(text: str) -> str:
    return '"' + text.replace('"', '\\"').replace("\n", "\\n") + '"'
