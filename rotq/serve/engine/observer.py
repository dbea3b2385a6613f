"""What can be seen of an engine from outside: its state when asked, and events as they happen."""

from __future__ import annotations

from dataclasses import dataclass

from rotq.serve.engine.generation import Generation


@dataclass(frozen=True, kw_only=True)
class State:
    """Of the engine, at one moment."""

    running: int
    waiting: int
    tokens: int
    """Whose keys and values are stored for running sequences."""
    pages: int
    """With something in them, kept ones included."""
    pages_total: int
    cache_bytes: int
    """Of pages and sinks with something in them."""
    cache_bytes_total: int
    """Allocated."""
    bits_per_element: float
    """Of running sequences, unfilled parts of pages included; 0 if none runs."""
    generated: int
    """Tokens since the start."""
    prompted: int
    reused: int
    """Prompt tokens found in pages of others."""
    alive: bool


class Observer:
    """Is told what happens, by the engine's thread; does nothing."""

    def first_token(self, seconds: float) -> None:
        """Since a sequence came."""

    def next_token(self, seconds: float) -> None:
        """Since its token before."""

    def retired(self, sequence: Generation, outcome: str, seconds: float) -> None:
        """Since a sequence came."""

    def failed(self, error: Exception) -> None:
        """A forward pass did."""
