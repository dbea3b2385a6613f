"""Events of the engine as OpenAI's JSON objects: whole responses, and chunks of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rotq.serve.engine.generation import Event, joined
from rotq.serve.engine.sampling import Picked
from rotq.serve.engine.text_stream import Piece
from rotq.serve.http.token_names import TokenNames
from rotq.serve.http.tokenization import Prompt


@dataclass(kw_only=True)
class Choice:
    """What has come of one choice of a request so far."""

    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None
    prompt: tuple[Picked, ...] | None = None
    tokens: int = 0
    cached: int = 0

    def add(self, event: Event) -> None:
        """Take an event with its text."""
        self.pieces.append(event.piece)
        self.finish = event.finish or self.finish
        self.prompt = event.prompt or self.prompt
        self.count(event)

    def count(self, event: Event) -> None:
        """Take an event's counts only, for a stream whose text is sent and forgotten."""
        self.tokens, self.cached = event.completion_tokens, event.cached_tokens

    @property
    def piece(self) -> Piece:
        """The pieces of all events as one."""
        return joined(self.pieces)


@dataclass(kw_only=True)
class Writer:
    """The objects of one request; subclasses know the endpoint."""

    model: str
    names: TokenNames | None
    """None without log probabilities."""
    top: int | None
    """Likeliest tokens to report; None for no log probabilities."""
    prompt_lengths: Sequence[int]
    """Tokens of each prompt; every prompt has the same number of choices."""
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    kind = ""
    chunk_kind = ""
    prefix = ""

    def response(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The complete response body."""
        written = [self.choice(index, choice) for index, choice in enumerate(choices)]
        return self._frame(self.kind, written) | {"usage": self.usage(choices)}

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """The body of one chunk of a stream."""
        return self._frame(self.chunk_kind, [self.delta(index, event)])

    def last_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk behind all text, which has the token counts."""
        return self._frame(self.chunk_kind, []) | {"usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Tokens of the request; a prompt counts once for all its choices."""
        prompts = sum(self.prompt_lengths)
        generated = sum(choice.tokens for choice in choices)
        per_prompt = max(1, len(choices) // len(self.prompt_lengths))
        cached = sum(choice.cached for choice in choices[::per_prompt])
        return {
            "prompt_tokens": prompts,
            "completion_tokens": generated,
            "total_tokens": prompts + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, where there is one before any text."""

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice as part of the response body."""
        raise NotImplementedError

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """An event as part of a chunk."""
        raise NotImplementedError

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(kw_only=True)
class CompletionWriter(Writer):
    """Bodies of ``/v1/completions``: plain text."""

    echoed: Sequence[Prompt] | None = None
    """Each choice's prompt, if it is part of the response."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        piece = choice.piece
        return {
            "index": index,
            "text": self._echo(index) + piece.text,
            "logprobs": self._logprobs(index, piece, choice.prompt),
            "finish_reason": choice.finish,
        }

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """The event's text without the echoed prompt, which is a chunk of its own."""
        return {
            "index": index,
            "text": event.piece.text,
            "logprobs": self._logprobs(index, event.piece, event.prompt),
            "finish_reason": event.finish,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The echoed prompt, if one was asked for."""
        if not self.echoed:
            return None
        text = self._echo(index)
        plain = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        return self._frame(self.kind, [plain])

    def _echo(self, index: int) -> str:
        return (self.echoed[index].text or "") if self.echoed else ""

    def _logprobs(
        self, index: int, piece: Piece, prompt: tuple[Picked, ...] | None
    ) -> dict[str, Any] | None:
        if self.top is None or self.names is None:
            return None
        picked = (*(prompt or ()), *piece.picked)
        offsets = list(self.echoed[index].offsets or ()) if self.echoed and prompt else []
        offsets += [len(self._echo(index)) + offset for offset in piece.offsets]
        tops = [None if item.logprob is None else self._top(item) for item in picked]
        return {
            "tokens": [self.names[item.token].name for item in picked],
            "token_logprobs": [item.logprob for item in picked],
            "top_logprobs": tops if self.top else None,
            "text_offset": offsets,
        }

    def _top(self, item: Picked) -> dict[str, float | None]:
        """The likeliest tokens and, as at OpenAI, the one that is there."""
        assert self.names is not None
        found: dict[str, float | None] = {
            self.names[token].name: value for token, value in item.top
        }
        return found | {self.names[item.token].name: item.logprob}


@dataclass(kw_only=True)
class ChatWriter(Writer):
    """Bodies of ``/v1/chat/completions``: messages of the assistant."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        piece = choice.piece
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": choice.finish,
        }

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": event.piece.text} if event.piece.text else {},
            "logprobs": self._logprobs(event.piece) if event.piece.picked else None,
            "finish_reason": event.finish,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role without text, as OpenAI's streams begin."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._frame(self.chunk_kind, [choice])

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.top is None or self.names is None:
            return None
        content = [
            self._entry(item.token, item.logprob)
            | {"top_logprobs": [self._entry(token, value) for token, value in item.top]}
            for item in piece.picked
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        assert self.names is not None
        named = self.names[token]
        content = None if named.content is None else list(named.content)
        return {"token": named.name, "logprob": logprob, "bytes": content}
