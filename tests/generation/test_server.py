"""The client of OpenAI-compatible servers: what it sends, and what it says of a server that answers wrong."""

import http.server
import json
import socket
import threading
import time

import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.base.settings import Answering
from gemma_lora.generation.server import ask

MODELS = {"data": [{"id": "expenses"}]}


def answer_of(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


@pytest.fixture
def server():
    """`start(answers)` gives an address and `[(path, body)]`; an answer is JSON, (status, bytes) or seconds."""
    started = []

    def start(*answers, models=MODELS):
        seen, waiting = [], list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(models)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append((self.path, json.loads(body)))
                self.reply(waiting.pop(0))

            def reply(self, answer):
                if isinstance(answer, float):
                    time.sleep(answer)
                    return
                status, raw = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())
                self.send_response(status)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        started.append(one)
        return f"http://127.0.0.1:{one.server_port}", seen

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def test_greedy_answers_to_texts_and_chats(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is for other machines
    address, seen = server(answer_of(" {} \n"), answer_of("two"))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    chat += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert list(ask(address, [" 12 lug ", chat])) == ["{}", "two"]
    (path, first), (_, second) = seen
    assert path == "/v1/chat/completions"
    greedy = {"model": "expenses", "max_tokens": 128, "temperature": 0.0, "repeat_penalty": 1.0, "min_p": 0.0}
    assert {name: first[name] for name in greedy} == greedy and "stop" not in first
    assert first["messages"] == [{"role": "user", "content": "12 lug"}]
    assert [turn["content"] for turn in second["messages"]] == ["Be brief.\n\na", "b", "c"]
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "user"]


def test_settings_are_handed_on(server):
    address, seen = server(answer_of("x"))
    answering = Answering(temperature=0.7, top_k=5, top_p=0.9, seed=3)
    list(ask(address + "/v1/", ["a"], max_new_tokens=7, answering=answering, stop=["END"]))
    expected = {"max_tokens": 7, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "stop": ["END"]}
    assert {name: seen[0][1][name] for name in expected} == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(GemmaLoraError, match="--server: .* is no address. Give one such as"):
        list(ask(url, ["a"]))


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(GemmaLoraError, match="cannot be reached .*refused.*Start it: gemma-lora serve"):
            list(ask(f"http://127.0.0.1:{free.getsockname()[1]}", ["a"]))


WRONG = {
    "late": (5.0, "no answer within 0.3 seconds. Give a longer --timeout"),
    "html": ((200, b"<html>"), "does not answer as an OpenAI-compatible server"),
    "no choices": ({"choices": []}, "does not answer as an OpenAI-compatible server"),
    "no text": ({"choices": [{"message": {"content": None}}]}, "does not answer as an OpenAI-compatible server"),
    "openai's error": ((400, b'{"error": {"message": "too long"}}'), r"the server refused \(400: too long\)"),
    "a detail": ((422, b'{"detail": "bad field"}'), r"the server refused \(422: bad field\)"),
    "plain": ((500, b"oh\nno"), r"the server refused \(500: oh no\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_one_sentence(server, what):
    answer, message = WRONG[what]
    address, _ = server(answer)
    with pytest.raises(GemmaLoraError, match=f"{address}.*{message}"):
        list(ask(address, ["a"], timeout=0.3))


def test_another_programs_address(server):
    address, _ = server(models=(404, b"not found"))
    with pytest.raises(GemmaLoraError, match="/v1/models: the server refused .404: not found"):
        list(ask(address, ["a"]))
    address, _ = server(models=["a list"])
    with pytest.raises(GemmaLoraError, match="Is it another program's address"):
        list(ask(address, ["a"]))
