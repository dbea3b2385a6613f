"""What a packed cache takes of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Memory of a cache, by allocated bytes."""

    tokens: int
    """Of all sequences; shared pages count for each."""
    packed: int
    """Bytes of pages, free ones included."""
    whole: int
    """Bytes of sinks and recent window."""
    tables: int
    """Bytes of page tables and masks."""
    constants: int
    """Bytes of the calibration, which all caches of a model share; not part of ``total``."""
    elements: int
    """Key and value elements of the tokens, all layers."""

    @property
    def total(self) -> int:
        """Bytes that grow with the tokens."""
        return self.packed + self.whole + self.tables

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per key or value element."""
        return 8 * self.total / max(1, self.elements)

    def below(self, dtype: torch.dtype) -> float:
        """How many times smaller than a dense cache of ``dtype``."""
        return self.elements * dtype.itemsize / max(1, self.total)
