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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rotq.ops import KVFormat, KVPages

_STORED = ("k_codes", "v_codes", "k_norm", "v_norm", "k_sign", "k_gamma")

GROWTH = 64
"""A store grows by at least 1 / GROWTH of what it holds, so that copying stays rare."""


@dataclass(kw_only=True)
class PageTable:
    """The pages of every sequence, in order of their tokens.

    A step that needs no page costs the same however many there are: which are free, and the table
    as a tensor, are kept from step to step.
    """

    page_size: int
    rows: list[list[int]] = field(default_factory=list)
    """Physical pages of each sequence."""
    num_pages: int = 0
    """Physical pages that exist, used or free."""
    _free: list[int] | None = field(default=None, repr=False)
    """Pages in nobody's list; None where that has to be found out."""
    _shared: bool = field(default=True, repr=False)
    """Whether a page may be in two lists."""
    _table: Tensor | None = field(default=None, repr=False)
    """As ``tensor`` gave it, before what is in ``_changed``."""
    _changed: list[tuple[int, int, int]] = field(default_factory=list, repr=False)
    """Sequence, place in its list, page."""

    def begin(self, batch: int) -> None:
        """So many sequences without pages."""
        self.rows = [[] for _ in range(batch)]
        self._forget()

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
        asking = [
            b
            for b, (row, length, want) in enumerate(zip(self.rows, lengths, wanted, strict=True))
            if len(row) * self.page_size < want
            or (self._shared and want > length and length % self.page_size)
        ]
        if not asking:
            return []
        held: Counter[int] = Counter()
        if self._shared or self._free is None:
            held = Counter(page for row in self.rows for page in row)
            self._shared = any(number > 1 for number in held.values())
            taken = held.keys() | busy
            self._free = [page for page in range(self.num_pages) if page not in taken]
        free, fresh, copies = self._free, count(self.num_pages), []
        for b in asking:
            row, length, want = self.rows[b], lengths[b], wanted[b]
            if want > length and length % self.page_size and held[row[-1]] > 1:
                held[row[-1]] -= 1
                target = free.pop() if free else next(fresh)
                copies.append((row[-1], target))
                row[-1] = target
                self._changed.append((b, len(row) - 1, target))
            while len(row) * self.page_size < want:
                row.append(free.pop() if free else next(fresh))
                self._changed.append((b, len(row) - 1, row[-1]))
        needed = next(fresh)
        if needed > self.num_pages:
            self.num_pages = max(needed, self.num_pages * (GROWTH + 1) // GROWTH)
            free[:] = range(needed, self.num_pages)
        if busy:
            # they will be free at the next step
            self._free = None
        return copies

    def release(self, sequence: int) -> None:
        """Release all pages of a sequence."""
        self.rows[sequence] = []
        self._forget()

    def drop_front(self, sequence: int, num_pages: int) -> None:
        """Release the first pages of a sequence."""
        del self.rows[sequence][:num_pages]
        self._forget()

    def crop(self, lengths: Sequence[int]) -> None:
        """Release the pages behind each sequence's first ``lengths`` tokens."""
        for row, length in zip(self.rows, lengths, strict=True):
            del row[-(-length // self.page_size) :]
        self._forget()

    def select(self, indices: Sequence[int]) -> None:
        """Let sequence i be what sequence ``indices[i]`` was; pages are shared, not copied."""
        self.rows = [list(self.rows[index]) for index in indices]
        self._forget()
        self._shared = True

    def tensor(self) -> Tensor:
        """int32 (B, J), J of the longest sequence; page 0 where a sequence has none.

        A tensor that was given out is not changed afterwards.
        """
        longest = max(map(len, self.rows), default=0)
        if self._table is None:
            padded = [row + [0] * (longest - len(row)) for row in self.rows]
            self._table = torch.tensor(padded, dtype=torch.int32).view(len(self.rows), longest)
        elif self._changed:
            self._table = F.pad(self._table, (0, longest - self._table.shape[1]))
            if self._table.numel():
                sequence, place, page = torch.tensor(self._changed).unbind(1)
                changed = self._table.clone()
                changed[sequence, place] = page.int()
                self._table = changed
        self._changed.clear()
        return self._table

    def _forget(self) -> None:
        """What is kept from step to step."""
        self._free = self._table = None
        self._changed.clear()


class PageStore:
    """The codes of one layer; page numbers come from a ``PageTable``."""

    joint: JointPages | None = None
    """What the pages are a part of, if they are."""

    def __init__(self, format: KVFormat, num_heads: int, device: torch.device) -> None:
        self.pages = KVPages.empty(format, 0, num_heads, device)

    def prepare(self, num_pages: int, copies: Sequence[tuple[int, int]]) -> None:
        """Have ``num_pages`` pages, then copy pages as ``PageTable.reserve`` asked for."""
        if num_pages > self.pages.k_codes.shape[0]:
            if self.joint is None:
                self._grow(num_pages)
            else:
                self.joint.grow(num_pages)
        if copies:
            device = self.pages.k_codes.device
            source, target = torch.tensor(copies, device=device).unbind(1)
            for tensor in self.pages.tensors():
                tensor[target] = tensor[source]

    def _grow(self, num_pages: int) -> None:
        _enlarge(self.pages, num_pages)


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
            parts: dict[str, Any] = {
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
