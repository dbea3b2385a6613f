"""Which page holds which packed tokens, and the memory behind it.

Packed tokens are only ever appended: once coded, a token is never read back or coded again. A
sequence is a list of pages; sequences that were one before a beam split share their full pages,
and a page that two sequences hold is copied before one of them writes to it. All layers with the
same page size and window hold the same tokens, so they share one table and each has its own store.

Shape suffixes: B sequences, J pages of a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from rotq.ops import KVFormat, KVPages

GROWTH = 64
"""A store grows by at least 1 / GROWTH of what it holds, so that copying stays rare."""


@dataclass(kw_only=True)
class PageTable:
    """The pages of every sequence, in order of their tokens."""

    page_size: int
    rows: list[list[int]] = field(default_factory=list)
    """Physical pages of each sequence."""
    num_pages: int = 0
    """Physical pages that exist, used or free."""

    def reserve(
        self, lengths: Sequence[int], wanted: Sequence[int], *, busy: Sequence[int] = ()
    ) -> list[tuple[int, int]]:
        """Give every sequence the pages for its next tokens, its own where they are written.

        Args:
            lengths: Tokens that each sequence has in its pages.
            wanted: Tokens that it will have; not less.
            busy: Pages that are in nobody's list and must not be given out yet.

        Returns:
            (source, target) pages whose content the stores must copy, after growing to
            ``num_pages``.
        """
        held = Counter(page for row in self.rows for page in row)
        taken = held.keys() | busy
        free = [page for page in range(self.num_pages) if page not in taken]
        fresh = count(self.num_pages)
        copies = []
        for row, length, want in zip(self.rows, lengths, wanted, strict=True):
            if want > length and length % self.page_size and held[row[-1]] > 1:
                held[row[-1]] -= 1
                target = free.pop() if free else next(fresh)
                copies.append((row[-1], target))
                row[-1] = target
            while len(row) * self.page_size < want:
                row.append(free.pop() if free else next(fresh))
        needed = next(fresh)
        if needed > self.num_pages:
            self.num_pages = max(needed, self.num_pages * (GROWTH + 1) // GROWTH)
        return copies

    def drop_front(self, sequence: int, num_pages: int) -> None:
        """Release the first pages of a sequence."""
        del self.rows[sequence][:num_pages]

    def crop(self, lengths: Sequence[int]) -> None:
        """Release the pages behind each sequence's first ``lengths`` tokens."""
        for row, length in zip(self.rows, lengths, strict=True):
            del row[-(-length // self.page_size) :]

    def select(self, indices: Sequence[int]) -> None:
        """Let sequence i be what sequence ``indices[i]`` was; pages are shared, not copied."""
        self.rows = [list(self.rows[index]) for index in indices]

    def tensor(self) -> Tensor:
        """int32 (B, J), J of the longest sequence; page 0 where a sequence has none."""
        longest = max(map(len, self.rows), default=0)
        padded = [row + [0] * (longest - len(row)) for row in self.rows]
        return torch.tensor(padded, dtype=torch.int32).view(len(self.rows), longest)


class PageStore:
    """The codes of one layer; page numbers come from a ``PageTable``."""

    def __init__(self, format: KVFormat, num_heads: int, device: torch.device) -> None:
        self.pages = KVPages.empty(format, 0, num_heads, device)

    def prepare(self, num_pages: int, copies: Sequence[tuple[int, int]]) -> None:
        """Have ``num_pages`` pages, then copy pages as ``PageTable.reserve`` asked for."""
        if num_pages > self.pages.k_codes.shape[0]:
            self._grow(num_pages)
        if copies:
            device = self.pages.k_codes.device
            source, target = torch.tensor(copies, device=device).unbind(1)
            for tensor in self.pages.tensors():
                tensor[target] = tensor[source]

    def _grow(self, num_pages: int) -> None:
        """One tensor after the other, so that only one is held twice."""
        before = self.pages
        for name in ("k_codes", "v_codes", "k_norm", "v_norm", "k_sign", "k_gamma"):
            old = getattr(before, name)
            if old is None:
                continue
            new = old.new_zeros(num_pages, *old.shape[1:])
            new[: old.shape[0]] = old
            setattr(before, name, new)
