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
from rotq.serve.http.errors import ApiError, of_failure
from rotq.serve.http.responses import ChatWriter, Choice, CompletionWriter, Writer
from rotq.serve.http.schemas import ChatRequest, Common, CompletionRequest
from rotq.serve.http.tokenization import Tokenization
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
        tokenizer: Of transformers.
        name: The model's, as clients call it.
        end_tokens: That end a text.
        vocabulary: Tokens that the model knows.
        settings: Limits.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        name: str,
        end_tokens: frozenset[int],
        vocabulary: int,
        settings: Settings,
    ) -> None:
        self.engine, self.name, self.settings = engine, name, settings
        self.end_tokens = end_tokens
        self.tokenization = Tokenization(tokenizer, vocabulary)
        self.draining = False

    async def complete(self, request: CompletionRequest, client: str) -> Call:
        """Begin to answer.

        Raises:
            ApiError: the request cannot be served, or not now.
        """
        self._check_model(request.model)
        prompts = await asyncio.to_thread(self.tokenization.prompts, request)
        top = request.logprobs
        writer = CompletionWriter(
            model=self.name,
            token_text=self.tokenization.token_text,
            top=top,
            prompt_lengths=[len(ids) for ids in prompts],
        )
        choices = request.n or 1
        if request.echo:
            texts = [
                prompt if isinstance(prompt, str) else self.tokenization.decode(prompt)
                for prompt in request.prompts
            ]
            writer.echoed = [text for text in texts for _ in range(choices)]
        limit = _DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
        scored = bool(request.echo) and top is not None
        return self._begin(request, writer, prompts, limit, top, client, scored=scored)

    async def chat(self, request: ChatRequest, client: str) -> Call:
        """Begin to answer.

        Raises:
            ApiError: the request cannot be served, or not now.
        """
        self._check_model(request.model)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        ids = await asyncio.to_thread(self.tokenization.conversation, request)
        top = (request.top_logprobs or 0) if request.logprobs else None
        writer = ChatWriter(
            model=self.name,
            token_text=self.tokenization.token_text,
            top=top,
            prompt_lengths=[len(ids)],
        )
        room = self.engine.longest - len(ids)
        limit = request.limit or max(1, min(self.settings.default_max_tokens, room))
        return self._begin(request, writer, [ids], limit, top, client)

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"no model {name[:100]!r} here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _begin(
        self,
        request: Common,
        writer: Writer,
        prompts: Sequence[Sequence[int]],
        limit: int,
        top: int | None,
        client: str,
        *,
        scored: bool = False,
    ) -> Call:
        if self.draining or not self.engine.alive:
            raise of_failure("shutdown")
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        call = Call(writer)
        wanted = [ids for ids in prompts for _ in range(request.n or 1)]
        if len(wanted) > max(1, self.settings.max_queue):
            raise ApiError(400, f"at most {self.settings.max_queue} sequences in one request")
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            top_k=request.top_k or 0,
            seed=request.seed,
            logprobs=top,
        )
        for index, ids in enumerate(wanted):
            self._check_length(ids, limit)
            call.sequences.append(
                Generation(
                    prompt=ids,
                    max_tokens=limit,
                    sampling=sampling,
                    decode=self.tokenization.decode,
                    emit=call.listen(index),
                    client=request.user or client,
                    index=index % (request.n or 1),
                    stops=request.stops,
                    end_tokens=frozenset() if request.ignore_eos else self.end_tokens,
                    prompt_logprobs=scored,
                    deadline=time.monotonic() + self.settings.request_timeout,
                )
            )
        if not self.engine.submit(call.sequences):
            seconds = self.engine.retry_after()
            message = f"the queue is full; try again in {seconds} s"
            raise ApiError(429, message, code="queue_full", retry_after=seconds)
        return call

    def _check_length(self, ids: Sequence[int], limit: int) -> None:
        longest = self.engine.longest
        if len(ids) + max(1, limit) - 1 > longest:
            raise ApiError(
                400,
                f"a prompt of {len(ids)} tokens and {limit} more are over this server's limit of "
                f"{longest} tokens",
                code="context_length_exceeded",
            )
