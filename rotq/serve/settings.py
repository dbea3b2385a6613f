"""What a server is to do, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rotq.kv.pool.pool import PAGE_SIZE

DENSE = "dense"
"""In place of a preset's name: keys and values in the model's dtype."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a server: memory, sequences, tokens, time."""

    kv_memory: int = 1 << 30
    """Bytes of the cache, allocated at start."""
    max_batch: int = 32
    """Sequences that run together; more wait."""
    max_queue: int = 128
    """Sequences that may wait; beyond it requests get 429."""
    max_length: int = 0
    """Tokens of a sequence; 0 takes what the model and the cache allow."""
    prefill_chunk: int = 0
    """Tokens of a prompt in one pass, whole pages; 0 takes what suits the device."""
    default_max_tokens: int = 256
    """Of a chat response whose request does not say."""
    request_timeout: float = 300.0
    """Seconds from a request's arrival to its end."""
    drain_timeout: float = 30.0
    """Seconds that running requests get after SIGTERM."""
    max_body: int = 4 << 20
    """Largest body of a request, in bytes."""

    def __post_init__(self) -> None:
        for name in ("kv_memory", "max_batch", "default_max_tokens", "max_body"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_queue", "max_length", "prefill_chunk", "drain_timeout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.prefill_chunk % PAGE_SIZE:
            raise ValueError(
                f"prefill_chunk must be a multiple of {PAGE_SIZE}, got {self.prefill_chunk}"
            )
        if not self.request_timeout > 0:
            raise ValueError(f"request_timeout must be positive, got {self.request_timeout}")
        if math.isinf(self.drain_timeout):
            raise ValueError("drain_timeout must be finite")


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``1.5GiB``, ``4GB`` or a plain number.

    Raises:
        ValueError: it is none of these.
    """
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = next((unit for unit in units if text.endswith(unit)), "B")
    number, factor = text.removesuffix(unit), units.get(unit, 1)
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size such as 512MiB, 4GB or 1000000") from None
    if size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return size
