"""Requests to a server of ``tiny_served``, and what must be true of its answers."""

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
from tiny_served import Running

JSON = {"content-type": "application/json"}


@functools.cache
def http() -> httpx.Client:
    """One for all: making a client takes longer than a request."""
    return httpx.Client(timeout=30)


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
