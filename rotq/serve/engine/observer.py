"""What can be seen of an engine from outside: its state when asked, and events as they happen."""

from __future__ import annotations

from dataclasses import dataclass

from rotq.serve.engine.generation import Generation


@dataclass(frozen=True, kw_only=True)
class State:
    """A snapshot of the engine."""

    running: int
    waiting: int
    tokens: int
    """Whose keys and values are stored for running sequences."""
    pages: int
    """Pages with something in them, those kept for later included."""
    pages_total: int
    cache_bytes: int
    """Of pages and sinks with something in them."""
    cache_bytes_total: int
    """Bytes allocated for pages and sinks."""
    bits_per_element: float
    """Of running sequences, unfilled parts of pages included; 0 if none runs."""
    generated: int
    """Tokens generated since the engine was made; the next two count from there too."""
    prompted: int
    reused: int
    """Prompt tokens found in pages of others."""
    alive: bool


class Observer:
    """Is told what happens, by the engine's thread; does nothing."""

    def first_token(self, seconds: float) -> None:
        """The first token was emitted, ``seconds`` after the request arrived."""

    def next_token(self, seconds: float) -> None:
        """A later token was emitted, ``seconds`` after the one before it."""

    def retired(self, sequence: Generation, outcome: str, seconds: float) -> None:
        """A sequence ended with a finish or a failure, ``seconds`` after it arrived."""

    def failed(self, error: Exception) -> None:
        """A forward pass raised ``error``."""
