"""Connections on which nothing comes are closed, and others live."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from rotq.serve.http import connection, guard
from rotq.serve.http.connection import Connection
from rotq.serve.http.guard import Guard

ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers once it has the body, and takes longer than a head may."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(1.2)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 2.0)
    options: dict[str, Any] = {"api_key": None, "hosts": (), "max_body": 1000, "seconds": 20}
    app = Guard(application, **options, count=lambda *_: None, on_error=lambda _: None)
    quiet: dict[str, Any] = {"log_level": "critical", "lifespan": "off", "timeout_keep_alive": 2}
    config = uvicorn.Config(app, port=0, http=Connection, **quiet)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def told(port: int, *parts: bytes, pause: float = 0.1) -> tuple[bytes, float]:
    """What comes back until the server closes the connection, and when that is."""
    began, found = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(pause)
        while more := client.recv(1000):
            found += more
    return found, time.monotonic() - began


def test_who_says_nothing_is_cut_off(port: int) -> None:
    for parts in ((), (b"GET /hea",), (b"G", b"E", b"T", b" ", b"/", b"x")):
        found, seconds = told(port, *parts, pause=0.05)
        assert found == b""
        assert 0.9 < seconds < 8


def test_a_body_that_does_not_come_is_an_error(port: int) -> None:
    found, seconds = told(port, POST)
    assert found.startswith(b"HTTP/1.1 408")
    assert b"the body did not come in time" in found
    assert seconds > 1.8


def test_what_comes_slowly_is_answered(port: int) -> None:
    """Half a head at a time, a body in parts, an answer that takes longer than a head may."""
    found, _ = told(port, ASK[:10], ASK[10:].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert found.startswith(b"HTTP/1.1 200")
    body = POST.replace(b"100", b"5").replace(b"Host", b"Connection: close\r\nHost")
    found, _ = told(port, body, b"....", pause=0.4)
    assert found.startswith(b"HTTP/1.1 200")


def test_a_second_request_has_its_own_time(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for _ in range(2):
            client.sendall(ASK)
            found = b""
            while not found.endswith(b"0\r\n\r\n"):
                found += client.recv(1000)
            time.sleep(1.2)
        client.sendall(ASK[:9])
        began = time.monotonic()
        assert client.recv(1000) == b""
        assert time.monotonic() - began < 8
