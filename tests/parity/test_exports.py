"""Every way out of the package in docs/take_it_with_you.md: what is written runs in transformers and llama.cpp."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import gemma_lora as gl
from gemma_lora.data.encoding import encode_prompt
from tests.exchange.small_models import logits_of, small

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "data/expenses/adapter"
IDS = np.random.default_rng(7).integers(4, 340, (2, 14)).astype("int32")
#: llama.cpp looks GELU up in a table of float16, which moves logits by about 6e-4 of the largest one.
GELU = 2e-3
#: A model of each generation; Gemma 3 with a block that sees everything, DoRA, and packed bases.
MODELS = {
    "gemma1": {"generation": 1},
    "gemma2-dora": {"generation": 2, "dora": True},
    "gemma3": {"generation": 3, "layers": 6, "rslora": True},
    "gemma3-nf4": {"generation": 3, "base": "nf4"},
}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request):
    """`(model, its logits in KerasHub)`."""
    model = small(**MODELS[request.param])
    return model, logits_of(model, IDS)


def llama_of(path, **named):
    import llama_cpp

    # float32 keys and values, as in KerasHub
    return llama_cpp.Llama(str(path), n_threads=2, type_k=0, type_v=0, verbose=False, **named)


def llama_logits(path, **named):
    llama = llama_of(path, n_ctx=64, logits_all=True, **named)
    try:
        rows = []
        for ids in IDS:
            llama.reset()
            llama.eval([int(i) for i in ids])
            rows.append(np.array(llama.scores[: len(ids)]))
        return np.stack(rows)
    finally:
        llama.close()


def assert_close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


# --- tiny models of every generation -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 2e-5), ("BF16", 0.1)])
def test_transformers_loads_the_folder(tiny, kind, tolerance, tmp_path):
    model, ours = tiny
    gl.export(model, tmp_path, "huggingface", kind)
    named = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **named)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert_close(ours, theirs.eval()(torch.tensor(IDS.astype("int64"))).logits.numpy(), tolerance)


def test_llama_cpp_runs_the_file(tiny, tmp_path):
    model, ours = tiny
    path = gl.export(model, tmp_path / "model.gguf", "gguf", "F32").path
    assert_close(llama_logits(path), ours, GELU)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_llama_cpp_puts_the_adapter_beside_its_base(generation, tmp_path):
    model = small(generation, rslora=True)
    ours = logits_of(model, IDS)
    adapter = gl.export(model, tmp_path / "adapter.gguf", "gguf-lora").path
    gl.detach_lora(model)
    base = gl.export(model, tmp_path / "base.gguf", "gguf", "F32").path
    assert_close(llama_logits(base, lora_path=str(adapter)), ours, GELU)
    assert np.abs(llama_logits(base) - ours).max() > 1e-2 * np.abs(ours).max()  # the adapter does something


# --- the expenses' adapter on the real model ---------------------------------------------------------------


@pytest.fixture(scope="module")
def lines():
    rows = (ROOT / "data/expenses/test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    return [json.loads(row)["prompt"] for row in rows]


@pytest.fixture(scope="module")
def tuned():
    return gl.load_adapter(gl.load_gemma(), ADAPTER)


@pytest.fixture(scope="module")
def answers(tuned, lines):
    return gl.generate(tuned, lines, max_new_tokens=64, mixed_precision=False)


@pytest.fixture(scope="module")
def half(tuned, tmp_path_factory):
    """The tuned model in F16."""
    path = tmp_path_factory.mktemp("exports") / "expenses.gguf"
    gl.export(tuned, path, "gguf", "F16")
    yield path
    path.unlink()


def llama_answers(path, lines, **named):
    """What llama.cpp answers to chats: its own use of the file's template and stop tokens."""
    llama = llama_of(path, n_ctx=256, **named)
    try:
        found = []
        for line in lines:
            chat = [{"role": "user", "content": line}]
            done = llama.create_chat_completion(chat, temperature=0.0, repeat_penalty=1.0, max_tokens=64)
            assert done["choices"][0]["finish_reason"] == "stop"
            found.append(done["choices"][0]["message"]["content"].strip())
        return found
    finally:
        llama.close()


@pytest.mark.real
def test_transformers_answers_and_tokenizes_as_this_package(tuned, lines, answers, tmp_path):
    gl.export(tuned, tmp_path, "huggingface", "F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for line, answer in zip(lines[:2], answers, strict=False):
        chat = [{"role": "user", "content": line}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        expected = encode_prompt(line, tuned.preprocessor.tokenizer, tuned.gemma_lora_template)
        assert ids["input_ids"][0].tolist() == expected.tolist()
        made = model.generate(**ids, max_new_tokens=64)[0, len(expected) :]
        assert tokenizer.decode(made, skip_special_tokens=True).strip() == answer
        assert made[-1] == tokenizer.eos_token_id  # it stopped by itself
    for text in ["  two  spaces\n\n\tand a tab ", "日本 🎉 <b>x</b> <unused3>", " 769,08 €"]:
        ours = [int(i) for i in tuned.preprocessor.tokenizer.tokenize(text)]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours


@pytest.mark.real
def test_llama_cpp_answers_as_this_package(half, lines, answers):
    assert llama_answers(half, lines) == answers


@pytest.mark.real
def test_llama_cpp_with_the_adapter_on_the_builtin_file(tuned, lines, answers, tmp_path):
    """The base stays in Q4_K_M, whose products llama.cpp rounds to 8 bits: most answers are the same."""
    from gemma_lora.gemma.load import builtin_gguf

    path = gl.export(tuned, tmp_path / "adapter.gguf", "gguf-lora").path
    chats = [text.format(prompt=line) for text in [tuned.gemma_lora_template.prompt] for line in lines]
    llama = llama_of(builtin_gguf(), n_ctx=256, lora_path=str(path))
    found = [
        llama(chat, temperature=0.0, repeat_penalty=1.0, max_tokens=64)["choices"][0]["text"].strip() for chat in chats
    ]
    llama.close()
    assert sum(a == b for a, b in zip(found, answers, strict=True)) >= len(lines) - 2


@pytest.mark.real
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_quantized_exports_answer_as_the_file_read_back(kind, tuned, lines, tmp_path):
    path = gl.export(tuned, tmp_path / "quantized.gguf", "gguf", kind).path
    again = gl.load_gemma(path)
    ours = gl.generate(again, lines, max_new_tokens=64, mixed_precision=False)
    theirs = llama_answers(path, lines)
    assert sum(a == b for a, b in zip(theirs, ours, strict=True)) >= len(lines) - 1  # llama.cpp rounds products too


@pytest.mark.real
def test_the_server_answers_as_this_package(half, lines, answers):
    """`gemma-lora serve --file`, asked by `gemma-lora generate --server`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gemma_lora.cli", "serve", "--file", str(half), "--port", str(port)]
    server = subprocess.Popen([*command, "--context", "256"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/v1/models", timeout=1)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.25)
        asked = [sys.executable, "-m", "gemma_lora.cli", "generate", "--server", address, "--max-new-tokens", "64"]
        done = subprocess.run([*asked, *lines], capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines() == answers, done.stderr
    finally:
        server.terminate()
        server.wait(20)
