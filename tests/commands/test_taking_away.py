"""`export`, `serve`, `generate --server`: mistakes are said before a model is loaded, the rest is handed on."""

import json
import os
import socket
import subprocess
import sys

import pytest

from gemma_lora import cli
from gemma_lora.commands import serve as serving
from tests.exchange.small_models import small


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("gemma_lora.base.hardware.use_compilation_cache", lambda: None)
    monkeypatch.setattr("gemma_lora.gemma.load.load_gemma", lambda *a, **k: pytest.fail("a model was loaded"))


@pytest.fixture
def adapter(tmp_path):
    """Files of an adapter's names: what is in them is not read before the model is loaded."""
    folder = tmp_path / "runs" / "adapter"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return folder


EXPORTS = {
    "no such adapter": (["--adapter", "nowhere", "--output", "x"], "nowhere: no such folder"),
    "a format": (["--output", "x", "--format", "onnx"], "--format must be one of huggingface, gguf, gguf-lora"),
    "a type": (["--output", "x", "--type", "Q4_K_M"], "--type of the format huggingface must be one of F32, BF16"),
    "an ending": (["--output", "x", "--format", "gguf"], "a GGUF file ends in .gguf. Give another --output"),
    "no adapter": (["--output", "x.gguf", "--format", "gguf-lora"], "Give --adapter"),
    "a file": (["--output", "file"], "file: is a file. Give a folder as --output"),
    "a template": (["--output", "x", "--template", "none.json"], "none.json: no such template"),
    "a model": (["--output", "x", "--model", "gone.gguf"], "gone.gguf: no such file"),
}


@pytest.mark.parametrize("what", EXPORTS)
def test_export_says_what_is_wrong_before_it_loads(command, tmp_path, what):
    (tmp_path / "file").write_text("")
    arguments, message = EXPORTS[what]
    status, out, err = command("export", *arguments)
    assert (status, out) == (2, "") and message in err


def test_export_writes_and_tells(command, monkeypatch, adapter):
    monkeypatch.setattr("gemma_lora.commands.export.load", lambda folder, chosen: small(3))
    status, out, err = command("export", "--adapter", adapter, "--output", "out", "--type", "bf16")
    assert status == 0 and "Rounding the merged weights to BF16 moves them by" in err
    assert "out/config.json" in out.splitlines()


SERVES = {
    "nothing": ([], "Give --adapter or --file; one of them"),
    "both": (["--adapter", "a", "--file", "b.gguf"], "Give --adapter or --file; one of them"),
    "no file": (["--file", "b.gguf"], "b.gguf: no such file"),
    "a type for a file": (["--file", "there.gguf", "--type", "F16"], "--file is served as it is"),
    "a model for a file": (["--file", "there.gguf", "--model", "gemma3_1b"], "--file is served as it is"),
    "a type": (["--adapter", "a", "--type", "Q9"], "--type of the format gguf must be one of F16"),
    "no adapter": (["--adapter", "a"], "a: no such folder"),
}


@pytest.mark.parametrize("what", SERVES)
def test_serve_says_what_is_wrong_before_it_loads(command, monkeypatch, tmp_path, what):
    monkeypatch.setattr(serving, "is_installed", lambda name: True)
    (tmp_path / "there.gguf").write_text("")
    arguments, message = SERVES[what]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, _, err = command("serve", *arguments, "--port", port)
    assert status == 2 and message in err


def test_serve_without_the_servers_packages_and_with_a_port_that_is_taken(command, monkeypatch, tmp_path):
    (tmp_path / "there.gguf").write_text("")
    monkeypatch.setattr(serving, "is_installed", lambda name: name != "fastapi")
    status, _, err = command("serve", "--file", "there.gguf")
    assert status == 2 and "not installed (fastapi). Install it" in err and '"gemma_lora[serve]"' in err
    monkeypatch.setattr(serving, "is_installed", lambda name: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = command("serve", "--file", "there.gguf", "--port", taken.getsockname()[1])
    assert status == 2 and "cannot be listened at" in err and "Give another --port" in err


def test_serve_exports_once_and_becomes_the_server(command, monkeypatch, adapter):
    monkeypatch.setattr(serving, "is_installed", lambda name: True)
    monkeypatch.setattr(serving, "require_free", lambda port: None)
    loads, started = [], []
    monkeypatch.setattr(serving, "load", lambda folder, chosen: loads.append(folder) or small(3))
    monkeypatch.setattr(serving.os, "execv", lambda program, command: started.append(command))
    for _ in range(2):
        status, _, err = command("serve", "--adapter", adapter, "--port", 8123, "--context", 64)
        assert status == 0 and "http://127.0.0.1:8123/v1" in err
    assert len(loads) == 1 and started[0] == started[1]
    options = dict(zip(started[0][3::2], started[0][4::2], strict=True))
    assert started[0][1:3] == ["-m", "llama_cpp.server"]
    assert (options["--host"], options["--port"], options["--n_ctx"]) == ("127.0.0.1", "8123", "64")
    assert options["--logits_all"] == "False"
    with open(options["--model"], "rb") as file:
        assert file.read(4) == b"GGUF"
    (adapter / "adapter_model.safetensors").write_text("another")
    command("serve", "--adapter", adapter)
    assert len(loads) == 2


def test_generate_asks_a_server_and_loads_nothing(command, monkeypatch):
    asked = {}

    def ask(url, prompts, most, answering, stop, timeout):
        asked.update(url=url, prompts=prompts, most=most, temperature=answering.temperature, stop=stop, timeout=timeout)
        yield from ("one", "two")

    monkeypatch.setattr("gemma_lora.generation.server.ask", ask)
    options = ["--server", "http://127.0.0.1:8000", "--timeout", 5, "--max-new-tokens", 9, "--stop", "END"]
    assert command("generate", "a", "b", *options) == (0, "one\ntwo\n", "")
    expected = {"url": "http://127.0.0.1:8000", "prompts": ["a", "b"], "most": 9, "stop": ["END"], "timeout": 5.0}
    assert asked == expected | {"temperature": 0.0}
    status, _, err = command("generate", "a", *options, "--model", "gemma3_1b")
    assert status == 2 and "--server answers with its own model" in err


EARLY = """
import json, sys
from gemma_lora import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["gemma-lora", *arguments]
    try:
        cli.main()
    except SystemExit as exit_:
        late = {"jax", "keras", "keras_hub"} & set(sys.modules)
        if exit_.code != 2 or late:
            raise RuntimeError(f"{arguments}: status {exit_.code}, {late} imported")
    else:
        raise RuntimeError(f"{arguments}: was not refused")
"""


@pytest.mark.slow
def test_all_of_it_is_said_before_jax_is_imported(tmp_path):
    cases = [["export", *arguments] for arguments, _ in EXPORTS.values() if "file" not in arguments]
    cases += [["serve", "--file", "gone.gguf"], ["serve", "--adapter", "gone"], ["generate", "--server", "x", "hi"]]
    root = os.path.dirname(os.path.dirname(cli.__file__))
    command = [sys.executable, "-c", EARLY, json.dumps(cases)]
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
