"""HTTP: answers, errors in OpenAI's form, limits, and what happens when clients go away."""

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
import transformers
from tiny_served import (
    Running,
    byte_tokenizer,
    protein_tokenizer,
    running_server,
    served_model,
)

JSON = {"content-type": "application/json"}


@functools.cache
def http() -> httpx.Client:
    """One for all: making a client takes longer than a request."""
    return httpx.Client(timeout=30)


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    http().close()
    http.cache_clear()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(served_model(), byte_tokenizer(), max_body=200_000) as running:
        yield running
        assert running.errors == []


def post(
    server: Running, body: Any, path: str = "/v1/completions", **headers: str
) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body}).encode()
    return http().post(server.url + path, content=content, headers={**JSON, **headers})


def chat(server: Running, **body: Any) -> httpx.Response:
    return post(server, body, "/v1/chat/completions")


def events(server: Running, body: Any, path: str = "/v1/completions") -> list[Any]:
    """The objects of a stream; checks its form."""
    response = post(server, {**body, "stream": True}, path)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error
    assert "Traceback" not in response.text
    return error


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_a_completion(server: Running) -> None:
    found = post(server, {"prompt": "Hello", "max_tokens": 7, "temperature": 0}).json()
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"
    assert found["choices"][0]["finish_reason"] in ("length", "stop")
    assert found["usage"]["prompt_tokens"] == 5
    assert found["usage"]["total_tokens"] == 5 + found["usage"]["completion_tokens"]


def test_a_stream_is_the_answer_in_parts(server: Running) -> None:
    body = {"prompt": ["One", "Two"], "max_tokens": 20, "temperature": 0, "n": 2, "seed": 1}
    whole = post(server, body).json()
    parts = events(server, {**body, "stream_options": {"include_usage": True}})
    for index, choice in enumerate(whole["choices"]):
        mine = [part["choices"][0] for part in parts if part["choices"]]
        mine = [part for part in mine if part["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["prompt_tokens"] == 6
    assert parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({part["id"] for part in parts}) == 1


def test_token_ids_are_prompts_too(server: Running) -> None:
    ids = byte_tokenizer()("Hello")["input_ids"]
    greedy = {"max_tokens": 6, "temperature": 0}
    text = post(server, {"prompt": "Hello", **greedy}).json()["choices"][0]["text"]
    assert post(server, {"prompt": ids, **greedy}).json()["choices"][0]["text"] == text
    two = post(server, {"prompt": [ids, ids], **greedy}).json()["choices"]
    assert [choice["text"] for choice in two] == [text, text]
    refused(post(server, {"prompt": [5, 258]}), 400, "258")
    refused(post(server, {"prompt": [5, -1]}), 400)


def test_echo_scores_the_prompt(server: Running) -> None:
    body = {"prompt": "H\u00e9llo", "max_tokens": 0, "echo": True, "logprobs": 2}
    found = post(server, body).json()["choices"][0]
    assert found["text"] == "H\u00e9llo"
    logprobs = found["logprobs"]
    assert len(logprobs["tokens"]) == 6
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][:2] == [0, 1]
    assert found["finish_reason"] == "length"


def test_echo_in_a_stream(server: Running) -> None:
    parts = events(server, {"prompt": "Hi", "max_tokens": 3, "echo": True, "temperature": 0})
    assert parts[0]["choices"][0]["text"] == "Hi"


def test_a_chat(server: Running) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 5, "temperature": 0}
    found = chat(server, **body).json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"]["role"] == "assistant"
    rendered = "<system>Be short.\n<user>ab\n<assistant>"
    assert found["usage"]["prompt_tokens"] == len(rendered)
    same = post(server, {"prompt": rendered, "max_tokens": 5, "temperature": 0}).json()
    assert found["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    parts = events(server, body, "/v1/chat/completions")
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == same["choices"][0]["text"]


def test_a_chat_without_a_limit_gets_the_default() -> None:
    with running_server(served_model(), byte_tokenizer(), default_max_tokens=9) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
        assert chat(server, **body).json()["usage"]["completion_tokens"] == 9


def test_chat_logprobs(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
    found = chat(server, **body, logprobs=True, top_logprobs=3).json()["choices"][0]
    content = found["logprobs"]["content"]
    assert len(content) == 4
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(
        entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
        for entry in content
    )
    refused(chat(server, **body, top_logprobs=3), 400, "logprobs")


def test_seeds_repeat(server: Running) -> None:
    def text(seed: int) -> str:
        body = {"prompt": "x", "max_tokens": 12, "seed": seed}
        return str(post(server, body).json()["choices"][0]["text"])

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_strings(server: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    text = post(server, body).json()["choices"][0]["text"]
    stop = text[8:10]
    found = post(server, {**body, "stop": stop}).json()["choices"][0]
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"
    streamed = events(server, {**body, "stop": [stop, "never"]})
    assert "".join(part["choices"][0]["text"] for part in streamed) == found["text"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, ["prompt"]),
        ({"prompt": []}, ["prompt"]),
        ({"prompt": {"a": 1}}, ["prompt"]),
        ({"prompt": "\ud800"}, ["surrogates"]),
        ({"prompt": ""}, ["no token"]),
        ({"max_tokens": "7"}, ["max_tokens", "integer"]),
        ({"max_tokens": -1}, ["max_tokens"]),
        ({"max_tokens": 10**40}, ["max_tokens"]),
        ({"max_tokens": 1.5}, ["max_tokens"]),
        ({"max_tokens": 641}, ["641"]),
        ({"temperature": "hot"}, ["temperature"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"temperature": 2.1}, ["temperature"]),
        ({"top_p": 0}, ["top_p"]),
        ({"n": 0}, ["n:"]),
        ({"n": 1000}, ["n:"]),
        ({"stop": ["a", "b", "c", "d", "e"]}, ["stop"]),
        ({"stop": ""}, ["stop"]),
        ({"stream": "yes"}, ["stream"]),
        ({"stream_options": {"include_usage": True}}, ["stream: true"]),
        ({"presence_penalty": 0.5}, ["presence_penalty"]),
        ({"logit_bias": {"5": 100}}, ["logit_bias"]),
        ({"suffix": "end"}, ["suffix"]),
        ({"best_of": 3}, ["best_of"]),
        ({"grammar": "x"}, ["grammar", "not supported"]),
        ({"logprobs": 21}, ["logprobs"]),
        ({"seed": 2**64}, ["seed"]),
    ],
    ids=str,
)
def test_wrong_requests(server: Running, change: dict[str, Any], words: list[str]) -> None:
    error = refused(post(server, {"prompt": "x", "max_tokens": 2, **change}), 400, *words)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"messages": [{"role": "developer", "content": "hi"}]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"max_completion_tokens": 0},
    ],
    ids=str,
)
def test_wrong_chats(server: Running, change: dict[str, Any]) -> None:
    refused(chat(server, **{"messages": [{"role": "user", "content": "hi"}], **change}), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 50_000,
        b'{"model":' + b"9" * 9000 + b"}",
    ],
    ids=["empty", "cut", "utf8", "list", "null", "string", "deep", "digits"],
)
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    refused(post(server, body), 400)


def test_unknown_things(server: Running) -> None:
    error = refused(post(server, {"prompt": "x", "model": "gpt"}), 404, "gpt", "tiny")
    assert error["code"] == "model_not_found"
    refused(http().get(server.url + "/v1/models/other/one"), 404)
    refused(http().get(server.url + "/v2/x"), 404)
    refused(http().get(server.url + "/v1/completions"), 405)
    refused(post(server, {"prompt": "x"}, **{"content-type": "text/plain"}), 400)


def test_a_prompt_that_is_too_long(server: Running) -> None:
    error = refused(post(server, {"prompt": "x" * 5000}), 400, "5000", "640")
    assert error["code"] == "context_length_exceeded"


def test_a_body_that_is_too_large(server: Running) -> None:
    refused(post(server, {"prompt": "x" * 300_000}), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 10_000

    response = http().post(server.url + "/v1/completions", content=chunks(), headers=JSON)
    refused(response, 413)


def test_models_health_and_numbers(server: Running) -> None:
    assert [item["id"] for item in http().get(server.url + "/v1/models").json()["data"]] == ["tiny"]
    assert http().get(server.url + "/v1/models/tiny").json()["object"] == "model"
    assert http().get(server.url + "/health").json() == {"status": "ok"}
    post(server, {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True})
    text = http().get(server.url + "/metrics").text
    for name in (
        "rotq_generated_tokens_total",
        "rotq_time_to_first_token_seconds_count",
        "rotq_inter_token_seconds_bucket",
        "rotq_cache_bytes_total",
        'rotq_http_responses_total{route="/v1/completions",status="200"}',
    ):
        assert name in text
    stats = http().get(server.url + "/stats").json()
    assert stats["cache_bytes_total"] <= 8 << 20
    assert stats["kv"] == "k3v3-oblivious"
    assert stats["calibrated"] is False


def test_an_api_key() -> None:
    with running_server(served_model(), byte_tokenizer(), api_key="s\u00e9cret") as server:
        for key in ("", "Bearer", "Bearer wrong", "s\u00e9cret"):
            response = http().get(
                server.url + "/v1/models", headers={"authorization": key.encode()}
            )
            assert refused(response, 401)["code"] == "invalid_api_key"
        for path in ("/stats", "/metrics", "/v1/models"):
            refused(http().get(server.url + path), 401)
        for path in ("/", "/health"):
            assert http().get(server.url + path).status_code == 200
        right = {"authorization": "Bearer s\u00e9cret".encode()}
        assert http().get(server.url + "/v1/models", headers=right).status_code == 200


def test_only_its_own_names() -> None:
    with running_server(served_model(), byte_tokenizer(), local=True) as server:
        port = server.url.rsplit(":", 1)[1]
        assert http().get(server.url + "/health").status_code == 200
        assert http().get(server.url + "/health", headers={"host": f"localhost:{port}"}).is_success
        refused(http().get(server.url + "/health", headers={"host": "evil.example"}), 403)


def test_past_the_bound_429() -> None:
    with running_server(served_model(), byte_tokenizer(), max_batch=1, max_queue=2) as server:

        async def flood() -> list[httpx.Response]:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "ignore_eos": True}
            async with httpx.AsyncClient(timeout=60) as client:
                url = server.url + "/v1/completions"
                return await asyncio.gather(*(client.post(url, json=body) for _ in range(20)))

        responses = asyncio.run(flood())
        full = [response for response in responses if response.status_code == 429]
        assert full
        assert len(full) + sum(response.is_success for response in responses) == 20
        assert all(int(response.headers["retry-after"]) >= 1 for response in full)
        assert refused(full[0], 429, "queue")["code"] == "queue_full"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: Running, stream: bool) -> None:
    engine = server.served.engine
    body = {"model": "tiny", "prompt": "x", "max_tokens": 620, "ignore_eos": True, "stream": stream}
    raw = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(raw)}\r\n\r\n"
        )
        connection.sendall(head.encode() + raw)
        wait_until(lambda: engine.state().running == 1)
        before = engine.state().generated
    wait_until(engine.idle)
    assert engine.state().generated - before < 600
    assert engine.ledger.pages.available == engine.ledger.pages.size - _kept(server)


def _kept(server: Running) -> int:
    shelf = server.served.engine.ledger.pages
    return shelf.size - shelf.available


def test_a_request_that_takes_too_long() -> None:
    with running_server(served_model(), byte_tokenizer(), request_timeout=0.2) as server:
        body = {"prompt": "x", "max_tokens": 600, "ignore_eos": True}
        assert refused(post(server, body), 504)["code"] == "timeout"
        response = post(server, {**body, "stream": True})
        assert response.status_code == 200
        last = response.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_slow_reader_loses_nothing_and_delays_nobody(server: Running) -> None:
    body = {
        "model": "tiny",
        "prompt": "slow",
        "max_tokens": 120,
        "temperature": 0,
        "ignore_eos": True,
    }
    wanted = post(server, body).json()["choices"][0]["text"]
    with http().stream(
        "POST", server.url + "/v1/completions", json={**body, "stream": True}
    ) as slow:
        lines = slow.iter_lines()
        next(lines)
        wait_until(server.served.engine.idle)
        assert post(server, {"prompt": "x", "max_tokens": 2}).is_success
        rest = [line for line in lines if line.startswith("data: {")]
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in rest)
    assert wanted.endswith(text)
    assert len(rest) > 40


def test_failures_inside_stay_inside() -> None:
    with running_server(served_model(), byte_tokenizer()) as server:
        model = server.served.engine.stepper.model
        forward = model.forward

        def failing(*_: Any, **__: Any) -> Any:
            model.forward = forward
            raise RuntimeError("secret detail")

        model.forward = failing
        error = refused(post(server, {"prompt": "x"}), 500)
        assert "secret" not in error["message"]
        assert post(server, {"prompt": "x"}).is_success
        server.served.service.complete = failing  # type: ignore[method-assign]
        assert "secret" not in refused(post(server, {"prompt": "x"}), 500)["message"]
        assert [type(error) for error in server.errors] == [RuntimeError, RuntimeError]
        server.errors.clear()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_proteins(name: str) -> None:
    """Amino acids in, amino acids out, by the same endpoint; no chat template, so no chat."""
    model = served_model(vocab=24) if name == "llama" else _protgpt2()
    with running_server(model, protein_tokenizer()) as server:
        body = {
            "prompt": "MKTAYIAKQR",
            "max_tokens": 40,
            "n": 3,
            "seed": 5,
            "top_k": 20,
            "ignore_eos": True,
        }
        found = post(server, body).json()
        assert found["usage"]["prompt_tokens"] == 10
        for choice in found["choices"]:
            assert set(choice["text"]) <= set("ACDEFGHIKLMNPQRSTVWY")
        assert len({choice["text"] for choice in found["choices"]}) == 3
        scored = post(
            server, {"prompt": "MKTAYIAKQR", "max_tokens": 0, "echo": True, "logprobs": 1}
        )
        logprobs = scored.json()["choices"][0]["logprobs"]
        assert "".join(logprobs["tokens"]) == "MKTAYIAKQR"
        refused(chat(server, messages=[{"role": "user", "content": "hi"}]), 400, "/v1/completions")


def _protgpt2() -> Any:
    """Learned positions instead of RoPE, as ProtGPT2 has them."""
    config = transformers.GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=80)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def test_turns_between_clients() -> None:
    """One client's pile of requests does not keep another waiting."""
    with running_server(served_model(), byte_tokenizer(), max_batch=1, max_queue=50) as server:
        done: list[str] = []

        def ask(user: str) -> None:
            body = {"prompt": "x", "max_tokens": 30, "ignore_eos": True, "user": user}
            assert post(server, body).is_success
            done.append(user)

        threads = [threading.Thread(target=ask, args=("busy",)) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.served.engine.state().waiting >= 8)
        threads.append(threading.Thread(target=ask, args=("other",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
        assert done.index("other") < 8
