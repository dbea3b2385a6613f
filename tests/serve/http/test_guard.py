"""The outermost layer, with applications that misbehave."""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from rotq.serve.http.guard import App, Guard, Receive, Scope, Send

Message = MutableMapping[str, Any]
START: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Seen:
    """What a guard has done with one request."""

    def __init__(
        self, app: App, *, body: bytes | None = b"", headers: Any = (), **options: Any
    ) -> None:
        self.messages: list[Message] = []
        self.errors: list[Exception] = []
        self.counted: list[tuple[str, int]] = []
        limits = {"api_key": None, "hosts": (), "max_body": 100, "seconds": 0.1, **options}
        guard = Guard(
            app,
            count=lambda *answer: self.counted.append(answer),
            on_error=self.errors.append,
            **limits,
        )
        scope: Scope = {"type": "http", "path": "/v1/x", "headers": list(headers)}

        async def receive() -> Message:
            if body is None:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": body}

        async def send(message: Message) -> None:
            self.messages.append(message)

        asyncio.run(asyncio.wait_for(guard(scope, receive, send), 10))

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def code(self) -> str:
        return str(json.loads(self.messages[1]["body"])["error"]["code"])


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send(START)


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("secret")


async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await asyncio.sleep(60)


def test_who_sends_too_slowly_is_told() -> None:
    seen = Seen(reading, body=None)
    assert (seen.status, seen.code) == (408, "timeout")
    assert seen.counted == [("other", 408)]


def test_who_reads_too_slowly_is_cut_off() -> None:
    seen = Seen(stuck)
    assert seen.messages == [START]
    assert seen.counted == [("other", 200)]


def test_an_error_is_told_inside_and_not_outside() -> None:
    seen = Seen(broken)
    assert (seen.status, seen.code) == (500, "internal_error")
    assert "secret" not in str(seen.messages)
    assert [str(error) for error in seen.errors] == ["secret"]


def test_keys() -> None:
    def asked(*headers: tuple[bytes, bytes]) -> int:
        return Seen(reading, api_key="right", headers=headers).status

    assert asked() == 401
    assert asked((b"authorization", b"Bearer right")) == 200
    assert asked((b"Authorization", b"Bearer right")) == 200
    assert asked((b"authorization", b"Bearer righ")) == 401
    assert asked((b"authorization", b"Bearer \xff")) == 401


def test_hosts() -> None:
    def asked(host: bytes | None) -> int:
        headers = [] if host is None else [(b"host", host)]
        return Seen(reading, hosts=("localhost", "::1"), headers=headers).status

    assert [asked(host) for host in (b"localhost", b"localhost:80", b"[::1]:80", b"[::1]")] == [
        200
    ] * 4
    assert [asked(host) for host in (None, b"evil", b"evil:80", b"localhost.evil")] == [403] * 4


def test_a_length_that_is_too_large_is_refused_before_it_comes() -> None:
    seen = Seen(reading, body=None, headers=[(b"content-length", b"101")])
    assert (seen.status, seen.code) == (413, "body_too_large")
    assert Seen(reading, headers=[(b"content-length", b"100")]).status == 200
