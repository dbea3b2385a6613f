"""Between requests and the engine: limits, submission, events back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rotq.serve.engine.engine import Engine
from rotq.serve.engine.generation import Event, Generation
from rotq.serve.engine.sampling import Sampling
from rotq.serve.http.errors import ApiError, of_failure, of_full_queue
from rotq.serve.http.responses import ChatWriter, Choice, CompletionWriter, Writer
from rotq.serve.http.schemas import ChatRequest, Common, CompletionRequest
from rotq.serve.http.tokenization import Prompt, Tokenization
from rotq.serve.settings import Settings

_DEFAULT_COMPLETION = 16
"""OpenAI's default of ``max_tokens`` for completions."""


class Call:
    """One request under way: its sequences, and what the engine tells about them."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.sequences: list[Generation] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def listen(self, index: int) -> Any:
        """What a sequence tells its events; the engine's thread calls it."""

        def emit(event: Event) -> None:
            # a loop that has been closed has nobody left to tell
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return emit

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Until all sequences have ended.

        Raises:
            ApiError: one of them failed.
        """
        left = len(self.sequences)
        while left:
            index, event = await self._events.get()
            if event.failure is not None:
                raise of_failure(event.failure)
            yield index, event
            left -= event.last

    async def collect(self) -> list[Choice]:
        """All choices, once all sequences have ended."""
        choices = [Choice() for _ in self.sequences]
        async for index, event in self.events():
            choices[index].add(event)
        return choices

    def cancel(self) -> None:
        """Have the engine drop what has not ended, as nobody listens any more."""
        for sequence in self.sequences:
            sequence.cancelled = True


class Service:
    """What the endpoints call.

    Args:
        engine: Started.
        tokenization: Of the model.
        name: The model's, as clients call it.
        end_tokens: That end a text.
        settings: Limits.
    """

    def __init__(
        self,
        engine: Engine,
        tokenization: Tokenization,
        *,
        name: str,
        end_tokens: frozenset[int],
        settings: Settings,
    ) -> None:
        self.engine, self.tokenization = engine, tokenization
        self.name, self.settings = name, settings
        self.end_tokens = end_tokens
        self.draining = False

    async def complete(self, request: CompletionRequest, client: str) -> Call:
        """Begin to answer.

        Raises:
            ApiError: the request cannot be served, or not now.
        """
        self._check(request)
        top, echo, choices = request.logprobs, bool(request.echo), request.n or 1
        if (request.best_of or 1) > choices:
            raise ApiError(400, "best_of may not be more than n: all are told", param="best_of")
        async with self._in_time() as deadline:
            names = None if top is None else await self.tokenization.names()
            prompts = [
                await self.tokenization.prompt(
                    given, request.user or client, echo=echo, offsets=top is not None
                )
                for given in request.prompts
            ]
        writer = CompletionWriter(
            model=self.name,
            names=names,
            top=top,
            prompt_lengths=[len(prompt.ids) for prompt in prompts],
            echoed=[prompt for prompt in prompts for _ in range(choices)] if echo else None,
        )
        limit = _DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
        scored = echo and top is not None
        return self._begin(request, writer, prompts, limit, top, client, deadline, scored=scored)

    async def chat(self, request: ChatRequest, client: str) -> Call:
        """Begin to answer.

        Raises:
            ApiError: the request cannot be served, or not now.
        """
        self._check(request)
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        _check_contents(request)
        top = (request.top_logprobs or 0) if request.logprobs else None
        async with self._in_time() as deadline:
            names = None if top is None else await self.tokenization.names()
            ids = await self.tokenization.conversation(request.messages, request.user or client)
        writer = ChatWriter(model=self.name, names=names, top=top, prompt_lengths=[len(ids)])
        room = self.engine.longest - len(ids)
        limit = request.limit or max(1, min(self.settings.default_max_tokens, room))
        return self._begin(request, writer, [Prompt(ids=ids)], limit, top, client, deadline)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[float]:
        """What is inside may take as long as a request; gives the end of that."""
        seconds = self.settings.request_timeout
        deadline = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                yield deadline
        except TimeoutError:
            raise of_failure("timeout") from None

    def _check(self, request: Common) -> None:
        if request.model != self.name:
            raise ApiError(
                404,
                f"no model {request.model[:100]!r} here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        if request.wants_usage and not request.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        self._check_open()

    def _check_open(self) -> None:
        if self.draining or not self.engine.alive:
            raise of_failure("shutdown")

    def _begin(
        self,
        request: Common,
        writer: Writer,
        prompts: Sequence[Prompt],
        limit: int,
        top: int | None,
        client: str,
        deadline: float,
        *,
        scored: bool = False,
    ) -> Call:
        self._check_open()
        call = Call(writer)
        wanted = [prompt for prompt in prompts for _ in range(request.n or 1)]
        if len(wanted) > max(1, self.settings.max_queue):
            raise ApiError(400, f"at most {self.settings.max_queue} sequences in one request")
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            top_k=max(0, request.top_k or 0),
            seed=request.seed,
            logprobs=top,
        )
        for index, prompt in enumerate(wanted):
            self._check_length(prompt.ids, limit)
            call.sequences.append(
                Generation(
                    prompt=prompt.ids,
                    max_tokens=limit,
                    sampling=sampling,
                    decode=self.tokenization.decode,
                    emit=call.listen(index),
                    client=request.user or client,
                    index=index % (request.n or 1),
                    stops=request.stops,
                    end_tokens=frozenset() if request.ignore_eos else self.end_tokens,
                    prompt_logprobs=scored,
                    owed=prompt.owed,
                    deadline=deadline,
                )
            )
        if not self.engine.submit(call.sequences):
            raise of_full_queue(self.engine.retry_after())
        return call

    def _check_length(self, ids: Sequence[int], limit: int) -> None:
        longest = self.engine.longest
        if len(ids) + max(1, limit) - 1 > longest:
            raise ApiError(
                400,
                # clients (litellm, ...) know the case by these first words, which are OpenAI's
                f"This model's maximum context length is {longest} tokens here; a prompt of "
                f"{len(ids)} tokens and {limit} more are over it",
                code="context_length_exceeded",
            )


def _check_contents(request: ChatRequest) -> None:
    """Only an assistant may have said nothing."""
    for place, message in enumerate(request.messages):
        if not message.content and message.content != "" and message.role != "assistant":
            line = f"messages.{place}.content: a {message.role}'s message has text"
            raise ApiError(400, line, param="messages")
