"""One sequence: what was asked for, what it holds, what it has become, and what it tells."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rotq.kv.pool.pool import Row
from rotq.serve.engine.page_allocator import Allocation
from rotq.serve.engine.sampling import Picked, Sampler, Sampling
from rotq.serve.engine.text_stream import Decode, Piece, TextStream

Finish = Literal["stop", "length"]
Failure = Literal["timeout", "shutdown", "internal", "cancelled"]

_CONTEXT = 8
"""Tokens of the prompt that the first token's text is read with."""

_NUMBERS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Event:
    """What the engine tells about a sequence."""

    piece: Piece
    finish: Finish | None = None
    """The last event has a finish or a failure."""
    failure: Failure | None = None
    prompt: tuple[Picked, ...] | None = None
    """Of all prompt tokens, if they were asked for; in the first event."""
    completion_tokens: int = 0
    """Tokens generated up to this event."""
    cached_tokens: int = 0
    """Of the prompt, found in pages of others."""

    @property
    def last(self) -> bool:
        """Whether no event follows, as it has a finish or a failure."""
        return self.finish is not None or self.failure is not None


NOTHING = Piece(text="", picked=(), offsets=())


@dataclass(kw_only=True, eq=False)
class Generation:
    """A prompt and its continuation; all but ``cancelled`` is for the engine's thread to change."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    decode: Decode
    emit: Callable[[Event], None]
    """Called by the engine's thread; must not block."""
    client: str = ""
    """Who asks; those who wait take turns."""
    index: int = 0
    """Which of the choices of its request."""
    stops: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    """End the text, and are no part of it."""
    prompt_logprobs: bool = False
    owed: bool = False
    """A character that the prompt leaves unfinished has been told to nobody; see ``TextStream``."""
    deadline: float = float("inf")
    """When the sequence fails with ``timeout``, on the clock of ``time.monotonic``."""
    number: int = field(default_factory=lambda: next(_NUMBERS))
    created: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """Set by anyone; nobody listens any more."""
    keys: list[bytes] | None = None
    """Keys of its prompt's pages, once they are known."""
    allocation: Allocation | None = None
    count: int = 0
    """Tokens whose keys and values are stored."""
    generated: list[int] = field(default_factory=list)
    described: list[Picked] = field(default_factory=list)
    """Prompt tokens with log probabilities that no event has carried yet."""
    cached: int = 0
    last_emitted: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling, self.index)
        context = self.prompt[-_CONTEXT:]
        self.text = TextStream(self.decode, self.stops, context, owed=self.owed)

    @property
    def total(self) -> int:
        """Tokens that it may have stored in the end; its last one is not."""
        return len(self.prompt) + max(1, self.max_tokens) - 1

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are left."""
        return self.count < len(self.prompt)

    def row(self, fresh: int) -> Row:
        """Its place in a forward pass over ``fresh`` of its tokens."""
        assert self.allocation is not None
        sink = -1 if self.allocation.sink is None else self.allocation.sink
        return Row(pages=self.allocation.pages, sink=sink, count=self.count, fresh=fresh)

    def accept(self, picked: Picked) -> Event:
        """Take a chosen token: its text, and whether it was the last."""
        self.generated.append(picked.token)
        ended = picked.token in self.end_tokens
        piece = NOTHING if ended else self.text.push(picked)
        finish: Finish | None = None
        if ended or self.text.stopped:
            finish = "stop"
        elif len(self.generated) >= self.max_tokens:
            finish = "length"
        if finish is not None and not self.text.stopped:
            piece = joined((piece, self.text.finish()))
        return self.event(piece, finish=finish)

    def event(
        self,
        piece: Piece = NOTHING,
        *,
        finish: Finish | None = None,
        failure: Failure | None = None,
    ) -> Event:
        """An event with the current counts, and with prompt tokens that were not yet told."""
        prompt = None
        if self.described:
            prompt, self.described = tuple(self.described), []
        return Event(
            piece=piece,
            finish=finish,
            failure=failure,
            prompt=prompt,
            completion_tokens=len(self.generated),
            cached_tokens=self.cached,
        )


def joined(pieces: Sequence[Piece]) -> Piece:
    """Texts and tokens of several pieces, one behind the other."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        picked=tuple(item for piece in pieces for item in piece.picked),
        offsets=tuple(item for piece in pieces for item in piece.offsets),
    )
