"""What every request meets first: the host, the key, the size of its body, the time it may take.

A plain ASGI layer, outside of the framework: it sees bytes before anybody parses them, and also
the framework's own error responses, so no traceback can leave.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from rotq.serve.http.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Paths that are served without a key."""

BODY_SECONDS = 30.0
"""Until the next part of a request's body."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine for itself."""


class Guard:
    """Lets through what may pass, and answers the rest.

    Args:
        app: What is guarded.
        api_key: Of clients; None for none.
        hosts: Names that a request may be for; empty for all. A page of another site that has made
            its name point to this machine comes with a name of its own.
        max_body: Bytes.
        seconds: Until a response is cut off, as for readers who do not read.
        count: Told path and status of every response.
        on_error: Told what nobody expected.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        hosts: Sequence[str],
        max_body: int,
        seconds: float,
        count: Callable[[str, int], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.app, self.api_key, self.hosts = app, api_key, hosts
        self.max_body, self.seconds = max_body, seconds
        self.count, self.on_error = count, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, pass it on, and count its response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = _Response(send)
        try:
            self._check(scope)
            async with asyncio.timeout(self.seconds):
                await self.app(scope, self._limited(receive), response)
        except ApiError as error:
            await response.fail(error)
        except HTTPException as error:
            await response.fail(ApiError(error.status_code, str(error.detail)))
        except TimeoutError:
            await response.fail(ApiError(408, "the request took too long", code="timeout"))
        except Exception as error:
            self.on_error(error)
            await response.fail(ApiError(500, "the server failed", code="internal_error"))
        finally:
            self.count(_route(scope), response.status or 499)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name.strip("[]") not in self.hosts:
            raise ApiError(403, "this server answers to its own names only", code="unknown_host")
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                raise ApiError(401, "a valid API key is needed", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        taken, whole = 0, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal taken, whole
            try:
                # once the body is whole, this waits for the client to leave
                async with asyncio.timeout(None if whole else BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come in time") from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > self.max_body:
                # of the one kind that the framework does not take for a fault of its own
                raise HTTPException(413, self._too_large().message)
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.max_body} bytes"
        return ApiError(413, message, code="body_too_large")


class _Response:
    """Passes a response on, and knows how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Respond with an error; a stream that has begun is cut off instead, by the server."""
        if self.status is not None:
            return
        body = json.dumps(error.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **error.headers,
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": raw})
        await self({"type": "http.response.body", "body": body})


def _route(scope: Scope) -> str:
    """A path that was declared, or one word for all others: clients must not make up metrics."""
    route = scope.get("route")
    return getattr(route, "path", "other")
