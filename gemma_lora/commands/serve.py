"""`gemma-lora serve`: llama-cpp-python's server on this machine, with an exported file. No server of our own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_lora.base.files import GemmaLoraError, cache_dir
from gemma_lora.base.settings import DEFAULTS, SERVER_PORT, export_type
from gemma_lora.commands.models import load, require_model
from gemma_lora.commands.options import ADAPTER, MODEL, takes
from gemma_lora.exchange.destination import is_installed

EXAMPLES = (
    "Example: `gemma-lora serve --adapter runs/expenses/adapter --type Q8_0`  \n"
    "A file that is there: `gemma-lora serve --file expenses.gguf --port 8080`  \n"
    'Then: `gemma-lora generate --server http://127.0.0.1:8000 "12 lug 2024 Café Lumière 769,08 €"`'
)
_HOST = "127.0.0.1"
#: Modules of llama-cpp-python's server.
_NEEDED = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")


@takes(*MODEL)
def serve(
    adapter: Annotated[Path | None, ADAPTER] = None,
    file: Annotated[Path | None, typer.Option(help="A GGUF file to serve as it is, instead of an adapter.")] = None,
    type: Annotated[
        str | None, typer.Option(help="What the adapter's model is stored in: F16 by default, Q8_0, Q4_K_M, …")
    ] = None,
    port: Annotated[int, typer.Option(help="Where it listens, on this machine alone.", min=1, max=65535)] = SERVER_PORT,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together.", min=16)] = 2048,
    **chosen: Any,
) -> None:
    """Start an OpenAI-compatible server with a tuned model (llama-cpp-python's; `pip install "gemma_lora[serve]"`).

    The model is exported once; the file stays in the cache folder. The server listens on 127.0.0.1 only, and ends with
    Ctrl-C.
    """
    if (adapter is None) == (file is None):
        raise GemmaLoraError("Give --adapter or --file; one of them.")
    try:
        kind = export_type("gguf", type)
    except ValueError as error:
        raise GemmaLoraError(str(error).replace("`type`", "--type")) from None
    if file is not None:
        _require_file(file, type, chosen)
    _require_server()
    require_free(port)
    if adapter is not None:
        require_model(adapter, chosen)
        file = _exported(adapter, str(kind), chosen)
    address = f"http://{_HOST}:{port}"
    typer.echo(f'{address}/v1 (ask it: gemma-lora generate --server {address} "…"; Ctrl-C ends it)', err=True)
    sys.stderr.flush()
    command = server_command(Path(str(file)), port, context)
    os.execv(command[0], command)  # this process becomes the server: what JAX holds is freed


def _require_file(file: Path, type: str | None, chosen: dict[str, Any]) -> None:
    if not file.is_file():
        raise GemmaLoraError(f"{file}: no such file. Give a GGUF file, such as gemma-lora export writes.")
    if type is not None or any(value != getattr(DEFAULTS, name) for name, value in chosen.items()):
        raise GemmaLoraError("--file is served as it is. Leave --type, --model and --quantization out.")


def _require_server() -> None:
    """Raises if llama-cpp-python's server cannot be run."""
    if missing := [name for name in _NEEDED if not is_installed(name)]:
        raise GemmaLoraError(
            f"llama-cpp-python's server is not installed ({', '.join(missing)}). Install it (it is compiled, some "
            'minutes): pip install "gemma_lora[serve]"'
        )


def require_free(port: int) -> None:
    """Raises if something listens at a port of this machine already."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((_HOST, port))
        except OSError as error:
            message = f"--port {port}: cannot be listened at ({error.strerror}). Give another --port."
            raise GemmaLoraError(message) from None


def server_command(file: Path, port: int, context: int) -> list[str]:
    """The command that runs the server.

    Args:
        file: A GGUF file.
        port: Where it listens.
        context: Tokens of prompt and answer together.
    """
    options = {
        "model": file.absolute(),
        "model_alias": file.stem,
        "host": _HOST,
        "port": port,
        "n_ctx": context,
        "n_threads": os.cpu_count() or 1,
        # Else it keeps the logits of every token: 1 MB each, with Gemma's vocabulary.
        "logits_all": False,
        "verbose": False,
    }
    return [sys.executable, "-m", "llama_cpp.server", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def _exported(adapter: Path, kind: str, chosen: dict[str, Any]) -> Path:
    """The adapter's model as a GGUF file in the cache folder, made if it is not there."""
    digest = hashlib.sha256(json.dumps([kind, sorted(chosen.items())], default=str).encode())
    for name in ("adapter_config.json", "adapter_model.safetensors", "template.json"):
        path = adapter / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    source = Path(str(chosen["model"]))
    digest.update(str(source.stat().st_mtime_ns if source.is_file() else "").encode())
    path = cache_dir() / "serve" / f"{adapter.resolve().parent.name}-{kind}-{digest.hexdigest()[:16]}.gguf"
    if not path.is_file():
        typer.echo(f"Exporting to {path} …", err=True)
        loaded = load(adapter, chosen)
        from gemma_lora.exchange.export import export

        for sentence in export(loaded, path, "gguf", kind, adapter=adapter).notes:
            typer.echo(sentence, err=True)
    return path
