"""The HTTP side: routes, streams, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

import rotq
from rotq.serve.http.errors import ApiError
from rotq.serve.http.guard import Guard
from rotq.serve.http.openapi import describe_model
from rotq.serve.http.responses import Choice
from rotq.serve.http.schemas import ChatRequest, Common, CompletionRequest, ErrorBody
from rotq.serve.http.service import Call, Service
from rotq.serve.metrics import Metrics

T = TypeVar("T")

_GRACE = 15.0
"""Seconds beyond a request's own time-out, after which its connection is cut."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is not as it must be.",
        401: "No valid API key.",
        403: "Meant for another host.",
        404: "No such model.",
        408: "The request took too long.",
        413: "The body is too large.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The server failed.",
        503: "The server is shutting down.",
        504: "No answer in time.",
    }.items()
}


def create_app(
    service: Service,
    metrics: Metrics,
    *,
    describe: Callable[[], dict[str, Any]],
    api_key: str | None = None,
    hosts: Sequence[str] = (),
    on_error: Callable[[Exception], None] = lambda _: None,
) -> Guard:
    """The ASGI application.

    Args:
        service: What answers.
        metrics: Of this server.
        describe: What ``/stats`` tells.
        api_key: See ``Guard``.
        hosts: See ``Guard``.
        on_error: Told what nobody expected.
    """
    app = FastAPI(title="rotq serve-kv", version=rotq.__version__, docs_url=None, redoc_url=None)
    describe_model(
        app,
        name=service.name,
        vocabulary=service.tokenization.vocabulary,
        takes_nothing=service.tokenization.takes_nothing,
    )
    _handle_errors(app)
    _add_model_routes(app, service)
    _add_watching_routes(app, service, metrics, describe)
    return Guard(
        app,
        api_key=api_key,
        hosts=hosts,
        max_body=service.settings.max_body,
        seconds=service.settings.request_timeout + _GRACE,
        count=metrics.responded,
        on_error=on_error,
    )


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or score it."""
        return await _answer(service.complete(body, _client(request)), request, body)

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation under the model's chat template."""
        return await _answer(service.chat(body, _client(request)), request, body)

    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "rotq"}

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """List the model; a server has one."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        if name != service.name:
            raise ApiError(404, "no such model here", param="model", code="model_not_found")
        return card


def _add_watching_routes(
    app: FastAPI, service: Service, metrics: Metrics, describe: Callable[[], dict[str, Any]]
) -> None:
    page = files("rotq.serve.http").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def root() -> HTMLResponse:
        """A page to try it."""
        policy = "default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        """200 while requests are taken, 503 while draining or dead."""
        if service.draining or not service.engine.alive:
            status = "draining" if service.draining else "dead"
            raise ApiError(503, f"the server is {status}", code=status)
        return {"status": "ok"}

    @app.get("/stats", responses={401: _ERRORS[401]})
    async def stats() -> dict[str, Any]:
        """The cache and the queue at this moment, for the page."""
        return describe()

    @app.get("/metrics", responses={401: _ERRORS[401]}, response_class=Response)
    async def prometheus() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        body = ApiError(error.status_code, str(error.detail)).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        # the framework raises it again, and the guard tells whoever runs the server
        failure = ApiError(500, "the server failed", code="internal_error")
        return JSONResponse(failure.body, failure.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        wrong = _of_validation(error.errors())
        return JSONResponse(wrong.body, wrong.status)


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """One thing that is wrong, in one line; never what was sent, which may be large.

    Of several ways in which a value could be right, the one that it came furthest on.
    """
    first = max(errors, key=lambda error: len(error["loc"]))
    *way, last = [str(part) for part in first["loc"] if part != "body"] or [""]
    # names that pydantic gives to the ways are not the client's
    place = [part for part in (*[step for step in way if "[" not in step], last) if part]
    param = place[0] if place and first["type"] != "json_invalid" else None
    if first["type"] == "json_invalid":
        message = "the body is no JSON"
    elif first["type"] == "extra_forbidden":
        message = f"{'.'.join(place)[:100]} is not supported by this server"
    else:
        message = f"{'.'.join(place)[:100] or 'the body'}: {first['msg']}"
    return ApiError(400, message, param=param and param[:100])


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


async def _answer(beginning: Coroutine[Any, Any, Call], request: Request, body: Common) -> Response:
    call = await _unless_left(request, beginning)
    if call is None:
        # nobody is there to read it
        return Response(status_code=499)
    if body.stream:
        return StreamingResponse(
            _stream(call, body.wants_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    try:
        choices = await _unless_left(request, call.collect())
    finally:
        call.cancel()
    if choices is None:
        return Response(status_code=499)
    return JSONResponse(call.writer.response(choices))


async def _unless_left(request: Request, doing: Coroutine[Any, Any, T]) -> T | None:
    """The result, or None if the client leaves before it is there."""
    work, leaving = asyncio.create_task(doing), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(call: Call, usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; an error is the last of them."""
    choices = [Choice() for _ in call.sequences]
    try:
        for index in range(len(choices)):
            opening = call.writer.opening(index)
            if opening is not None:
                yield _event(opening)
        async for index, event in call.events():
            choices[index].count(event)
            yield _event(call.writer.chunk(index, event))
        if usage:
            yield _event(call.writer.last_chunk(choices))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        call.cancel()


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
