"""Asking a server that speaks OpenAI's protocol: `gemma-lora serve`, llama.cpp's own, vLLM's, Ollama's.

Only the standard library is used, and no JAX is imported: the model is the server's.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.settings import MOST_NEW_TOKENS, SERVER_TIMEOUT, Answering
from gemma_lora.data.formats import Prompt, turns_before_answer

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LIST_TIMEOUT = 10.0  # seconds for the list of models, which takes none
_MOST_SHOWN = 300  # signs of a server's own message


def ask(
    url: str,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None = None,
    answering: Answering | None = None,
    stop: Sequence[str] = (),
    timeout: float = SERVER_TIMEOUT,
) -> Iterator[str]:
    """Answers of a server to prompts, one after the other. The server applies its model's chat template.

    Args:
        url: The server's address, `http://127.0.0.1:8000`, with or without `/v1`.
        prompts: As `generate` takes them.
        max_new_tokens: Integer, the most tokens of an answer; 128 by default.
        answering: How tokens are chosen; greedily by default.
        stop: Texts that end an answer.
        timeout: Seconds to wait for one answer.

    Yields:
        The answers, stripped of outer white space, as `generate` gives them.

    Raises:
        GemmaLoraError: If the address is none, nobody answers, it takes too long, or the answer is not of the protocol.
    """
    base = _base(url)
    answering = answering or Answering()
    chats = [[{"role": _ROLES[role], "content": text} for role, text in turns_before_answer(p)] for p in prompts]
    settings = {
        "model": _first_model(base),
        "max_tokens": max_new_tokens or MOST_NEW_TOKENS,
        "temperature": answering.temperature,
        "seed": answering.seed,
        # Servers have values of their own for these, which would change greedy answers, too.
        "top_p": answering.top_p or 1.0,
        "top_k": answering.top_k or 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
    }
    if stop:
        settings["stop"] = list(stop)
    for chat in chats:
        answer = _call(f"{base}/chat/completions", timeout, settings | {"messages": chat})
        try:
            yield answer["choices"][0]["message"]["content"].strip()
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _foreign(base) from None


_ROLES = {"user": "user", "model": "assistant"}


def _base(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    try:
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        port_is_right = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise GemmaLoraError(f"--server: {url!r} is no address. Give one such as http://127.0.0.1:8000.")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _first_model(base: str) -> str:
    """The model's name on the server: some servers refuse a request without it."""
    listed = _call(f"{base}/models", _LIST_TIMEOUT)
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise _foreign(base) from None


def _call(url: str, timeout: float, body: dict[str, Any] | None = None) -> Any:
    """What a server answers to a GET, or with a body to a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # A proxy that the environment names is for other machines.
    local = urllib.parse.urlsplit(url).hostname in _LOOPBACK
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({})) if local else urllib.request.build_opener()
    try:
        with opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = _said(error)
        raise GemmaLoraError(f"{url}: the server refused ({error.code}{': ' if said else ''}{said}).") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            message = (
                f"{url}: no answer within {timeout:g} seconds. Give a longer --timeout, or fewer --max-new-tokens."
            )
            raise GemmaLoraError(message) from None
        message = f"{url}: cannot be reached ({reason}). Start it: gemma-lora serve --adapter runs/expenses/adapter"
        raise GemmaLoraError(message) from None
    except ValueError:
        raise _foreign(url) from None


def _said(error: urllib.error.HTTPError) -> str:
    """A server's own message, in whichever of the usual places it is."""
    try:
        text = error.read().decode("utf-8", "replace")
    except OSError:
        return ""
    try:
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value.get("detail", text)) if isinstance(value, dict) else value)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:_MOST_SHOWN]


def _foreign(url: str) -> GemmaLoraError:
    return GemmaLoraError(f"{url}: does not answer as an OpenAI-compatible server. Is it another program's address?")
