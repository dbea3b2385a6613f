"""Start a server, and end it without losing what it has promised.

SIGTERM or SIGINT: no new connections, new requests on old ones get 503, ``/health`` says draining,
and what runs or waits goes on. After ``drain_timeout`` what is left ends with an error of its own.
A second signal gives these errors at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn

from rotq.errors import RotqError
from rotq.kv.calibration.file import KVCalibration
from rotq.models.limits import vocabulary_of
from rotq.serve.engine.build import build_engine
from rotq.serve.engine.engine import Engine
from rotq.serve.http.app import create_app
from rotq.serve.http.connection import Connection
from rotq.serve.http.guard import LOOPBACK, Guard
from rotq.serve.http.service import Service
from rotq.serve.http.tokenization import Tokenization
from rotq.serve.metrics import Metrics
from rotq.serve.settings import DENSE, Settings

_LAST_WORDS = 5
"""Seconds that connections have to take the errors that end them."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The parts of a server whose engine has been started."""

    app: Guard
    service: Service
    engine: Engine
    facts: dict[str, Any]
    """What is served and how, for the line at start and for ``/stats``."""

    def close(self) -> None:
        """End the engine, and the processes that encode."""
        self.engine.close()
        self.service.tokenization.close()


def build_server(
    model: Any,
    tokenizer: Any,
    calibration: KVCalibration | None,
    settings: Settings,
    *,
    name: str,
    api_key: str | None = None,
    local: bool = False,
    on_error: Callable[[Exception], None] = lambda _: None,
) -> Served:
    """Build a server and start its engine.

    Args:
        model: A causal language model of transformers, in eval mode on one device.
        tokenizer: Its.
        calibration: Of the packed cache; None for a dense one.
        settings: Limits.
        name: Of the model, as clients call it.
        api_key: That clients must send; None for none.
        local: Only answer requests for this machine's own names.
        on_error: Told of what failed inside.

    Raises:
        RotqError: the model or its tokenizer cannot be served.
    """
    metrics = Metrics(on_error)
    engine = build_engine(model, calibration, settings, observer=metrics)
    metrics.watch(engine)
    tokenization = Tokenization(
        tokenizer,
        vocabulary_of(model),
        longest=engine.longest,
        limit=max(1, settings.max_queue),
        on_error=on_error,
    )
    service = Service(
        engine,
        tokenization,
        name=name,
        end_tokens=_end_tokens(model, tokenizer),
        settings=settings,
    )
    facts = _facts(engine, calibration, name, model)
    app = create_app(
        service,
        metrics,
        describe=lambda: facts | asdict(engine.state()) | {"draining": service.draining},
        api_key=api_key,
        hosts=LOOPBACK if local else (),
        on_error=on_error,
    )
    engine.start()
    return Served(app=app, service=service, engine=engine, facts=facts)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, as generation settings, configuration and tokenizer name them."""
    found: set[int] = set()
    config = getattr(model, "generation_config", None)
    for named in (
        getattr(config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if named is not None:
            found |= {named} if isinstance(named, int) else set(named)
    return frozenset(found)


def _facts(
    engine: Engine, calibration: KVCalibration | None, name: str, model: Any
) -> dict[str, Any]:
    cost, pages, captured = engine.cost, engine.allocator.pages.size, engine.runner.captured
    page_bits = 8 * cost.page / (engine.allocator.page_size * cost.elements)
    return {
        "model": name,
        "kv": DENSE if calibration is None else calibration.spec.name,
        "calibrated": bool(calibration is not None and calibration.source),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "page_bits_per_element": page_bits,
        "elements_per_token": cost.elements,
        "capacity_tokens": pages * engine.allocator.page_size,
        "max_tokens": engine.longest,
        "max_batch": engine.max_batch,
        "max_queue": engine.waiting.limit,
        "rows": engine.runner.rows,
        "warm_up_seconds": engine.warm_seconds,
        "cuda_graph": captured is not None and captured.is_captured,
        "cuda_graph_refused": None if captured is None else captured.refused,
    }


def run(
    served: Served, host: str, port: int, settings: Settings, *, on_ready: Callable[[int], None]
) -> None:
    """Serve until a signal ends it.

    Args:
        served: See ``build_server``.
        host: Address to bind.
        port: 0 for any that is free.
        settings: Limits.
        on_ready: Told the port once connections are taken.

    Raises:
        RotqError: the address cannot be bound.
    """
    config = uvicorn.Config(
        served.app,
        http=Connection,
        # what goes wrong is told by the guard; uvicorn would add the traces of those it cuts off
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_timeout + _LAST_WORDS),
    )
    # a request that the end of the server cuts off is no error of the server's
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    bound = _bind(host, port)
    try:
        served.service.tokenization.start()
        asyncio.run(_serve(_Server(config, served, settings), bound, on_ready))
    finally:
        served.close()
        bound.close()


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        raise RotqError(f"cannot listen on {host}:{port}: {error}") from None
    return bound


async def _serve(server: _Server, bound: socket.socket, on_ready: Callable[[int], None]) -> None:
    serving = asyncio.create_task(server.serve([bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        on_ready(bound.getsockname()[1])
    try:
        await serving
    finally:
        # before the loop ends, which waits for threads that wait for these
        server.served.close()


class _Server(uvicorn.Server):
    """A uvicorn server whose end drains the engine."""

    def __init__(self, config: uvicorn.Config, served: Served, settings: Settings) -> None:
        super().__init__(config)
        self.served, self._settings = served, settings

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours instead of uvicorn's, which raises the signal again in the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        service = self.served.service
        if service.draining:
            self._end()
            asyncio.get_running_loop().call_later(_LAST_WORDS, self._force)
            return
        service.draining = True
        self.should_exit = True
        asyncio.get_running_loop().call_later(self._settings.drain_timeout, self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self.served.close)

    def _force(self) -> None:
        self.force_exit = True
