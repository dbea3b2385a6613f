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
from dataclasses import dataclass, field, replace
from itertools import accumulate, count

import torch
from torch import Tensor

from rotq.ops import KVFormat, KVPages

_STORED = ("k_codes", "v_codes", "k_norm", "v_norm", "k_sign", "k_gamma")

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
        self.joint: JointPages | None = None
        """What the pages are a part of, if they are."""

    def prepare(self, num_pages: int, copies: Sequence[tuple[int, int]]) -> None:
        """Have ``num_pages`` pages, then copy pages as ``PageTable.reserve`` asked for."""
        if num_pages > self.pages.k_codes.shape[0]:
            if self.joint is None:
                _enlarge(self.pages, num_pages)
            else:
                self.joint.grow(num_pages)
        if copies:
            device = self.pages.k_codes.device
            source, target = torch.tensor(copies, device=device).unbind(1)
            for tensor in self.pages.tensors():
                tensor[target] = tensor[source]


class JointPages:
    """The pages of several layers in one memory, as those of one layer with all their heads.

    So that one launch writes to all of them. Each layer's pages become slices of the joint ones,
    each of them contiguous, with those of the other layers between one and the next.

    Args:
        stores: Of layers with the same format and page table; what they hold is moved.
    """

    def __init__(self, stores: Sequence[PageStore]) -> None:
        self.stores = list(stores)
        heads = [store.pages.k_codes.shape[1] for store in stores]
        codes = stores[0].pages.k_codes
        form = stores[0].pages.format
        self.pages = KVPages.empty(form, codes.shape[0], sum(heads), codes.device)
        self._ends = list(accumulate(heads))
        held = [store.pages for store in stores]
        self._hand_out()
        for store, before in zip(stores, held, strict=True):
            for new, old in zip(store.pages.tensors(), before.tensors(), strict=True):
                new.copy_(old)
            store.joint = self

    def grow(self, num_pages: int) -> None:
        """Have ``num_pages`` pages, for all layers."""
        _enlarge(self.pages, num_pages)
        self._hand_out()

    def _hand_out(self) -> None:
        begin = 0
        for store, end in zip(self.stores, self._ends, strict=True):
            parts = {
                name: None if whole is None else whole[:, begin:end]
                for name in _STORED
                for whole in (getattr(self.pages, name),)
            }
            store.pages = replace(self.pages, **parts)
            begin = end


def _enlarge(pages: KVPages, num_pages: int) -> None:
    """One tensor after the other, so that only one is held twice."""
    for name in _STORED:
        old = getattr(pages, name)
        if old is None:
            continue
        new = old.new_zeros(num_pages, *old.shape[1:])
        new[: old.shape[0]] = old
        setattr(pages, name, new)
