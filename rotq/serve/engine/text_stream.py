"""Tokens to text as they come, and stop strings in it.

A token may end inside a character, and what a token reads like may depend on its neighbours; so
text is the difference between what the last tokens read with and without the new one, and waits
while it ends in an unfinished character. Text that may be the beginning of a stop string waits
too, until it is one or is not.

What comes before may end inside a character as well. Its bytes are held back, and the first tokens
may complete them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rotq.serve.engine.sampling import Picked

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of a character; a tail of more than so many tokens is no character and is let go."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that can be sent, and the tokens that it came with."""

    text: str
    picked: tuple[Picked, ...]
    offsets: tuple[int, ...]
    """Where each token's text begins, from the beginning of the generated text."""


def finished(decode: Decode, ids: Sequence[int]) -> int:
    """How many of the tokens can be read: those after them are the beginning of a character."""
    for end in range(len(ids), max(-1, len(ids) - _LONGEST_CHARACTER), -1):
        if not decode(ids[:end]).endswith(_UNFINISHED):
            return end
    return len(ids)


@dataclass(kw_only=True)
class _Token:
    picked: Picked
    start: int
    end: int | None
    """None while its text is unfinished."""


class TextStream:
    """The text of one sequence.

    Args:
        decode: See ``Decode``.
        stops: End the text in front of the first of them.
        context: Tokens before the first, which may decide how it reads (a leading space).
        owed: What is unfinished at the context's end has been shown to nobody: it is text of the
            stream even where no token completes it.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        context: Sequence[int] = (),
        *,
        owed: bool = False,
    ) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids = list(context)
        self._prefix, self._read = 0, finished(decode, context)
        self._shown = "" if owed else decode(self._ids)
        self._text = ""
        self._sent = 0
        self._tokens: list[_Token] = []
        self.stopped = False
        """A stop string was found; nothing more is taken."""

    def push(self, picked: Picked) -> Piece:
        """Take a token; what can be sent now."""
        self._ids.append(picked.token)
        self._tokens.append(_Token(picked=picked, start=len(self._text), end=None))
        fresh = self._fresh(wait=True)
        if fresh is None:
            return Piece(text="", picked=(), offsets=())
        return self._take(fresh, last=False)

    def finish(self) -> Piece:
        """All text and tokens that were held back, as no more tokens come."""
        return self._take(self._fresh(wait=False) or "", last=True)

    def _fresh(self, *, wait: bool) -> str | None:
        """Text of the tokens that have not been read; None to wait for more."""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        unfinished = after.endswith(_UNFINISHED)
        if wait and unfinished and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return None
        if after.startswith(self._shown):
            before = max(before, self._shown, key=len)
        self._prefix, self._read, self._shown = self._read, len(self._ids), ""
        return after[len(before) :]

    def _take(self, fresh: str, *, last: bool) -> Piece:
        searched = max(0, len(self._text) - max(map(len, self._stops), default=1) + 1)
        self._text += fresh
        for token in self._tokens:
            token.end = len(self._text) if token.end is None else token.end
        cut = self._find_stop(max(searched, self._sent))
        if cut is not None:
            self.stopped = True
            self._text = self._text[:cut]
            self._tokens = [token for token in self._tokens if token.start < cut]
        return self._send(len(self._text) if last or self.stopped else self._safe())

    def _find_stop(self, start: int) -> int | None:
        """Where the first stop string begins."""
        found = [self._text.find(stop, start) for stop in self._stops]
        return min((at for at in found if at >= 0), default=None)

    def _safe(self) -> int:
        """Up to here no stop string can begin any more."""
        longest = max(map(len, self._stops), default=1) - 1
        for at in range(max(self._sent, len(self._text) - longest), len(self._text)):
            if any(stop.startswith(self._text[at:]) for stop in self._stops):
                return at
        return len(self._text)

    def _send(self, end: int) -> Piece:
        text, whole = self._text[self._sent : end], end == len(self._text)
        ready = [token for token in self._tokens if whole or (token.end or 0) <= end]
        self._tokens = self._tokens[len(ready) :]
        self._sent = end
        return Piece(
            text=text,
            picked=tuple(token.picked for token in ready),
            offsets=tuple(token.start for token in ready),
        )
