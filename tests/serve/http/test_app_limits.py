"""HTTP: who may ask, how much at once, how long, and what happens when clients go away."""

import asyncio
import json
import socket
import threading

import httpx
import pytest
from asking import http, post, refused, wait_until
from tiny_served import Running, byte_tokenizer, running_server, served_model


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
    assert engine.allocator.pages.available == engine.allocator.pages.size - _kept(server)


def _kept(server: Running) -> int:
    pool = server.served.engine.allocator.pages
    return pool.size - pool.available


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
