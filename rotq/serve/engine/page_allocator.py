"""Who holds which page: reservations, sharing of equal prompt pages, and what is kept for later.

A sequence is admitted if the pages for all tokens that it may ever have can be promised to it, so
no running sequence waits for memory, is thrown out or starts anew. Pages are taken one by one, as
tokens come; a page of a prompt that was met before is shared, and takes nothing.

A page's key is the hash of the whole prompt up to its end. The keys and values of a token depend
on what is before it and on how the prompt is cut into passes (within a pass tokens see each other
whole, earlier ones packed). Passes are chunks of the same number of pages, so equal prompts are cut
alike, and a shared page holds the very bits that would have been computed. A chunk's pages are
shared together or not at all: who began in the middle of one would see its first pages packed.
Pages of generated tokens are not shared: they were computed token by token, a prompt's are not.

When its last holder goes, a published page stays until its place is needed, the one that was left
longest ago first. Only the engine's thread calls this.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class PagePool:
    """Numbered places that are free, held by someone, or kept for who asks for their key.

    Args:
        size: Places.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._holders = [0] * size
        self._key_of: dict[int, bytes] = {}
        self._place_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Places that can be taken: free ones, and kept ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def filled(self) -> int:
        """Places with something in them, held or kept."""
        return self.size - len(self._free)

    def take(self) -> int:
        """Hold a place for something new; if none is free, the one kept longest gives way."""
        if not self._free:
            oldest, _ = self._idle.popitem(last=False)
            del self._place_of[self._key_of.pop(oldest)]
            self._free.append(oldest)
        place = self._free.pop()
        self._holders[place] = 1
        return place

    def has(self, key: bytes) -> bool:
        """Whether there is a place of a key."""
        return key in self._place_of

    def hold(self, key: bytes) -> int:
        """Hold the place of a key that there is."""
        place = self._place_of[key]
        self._idle.pop(place, None)
        self._holders[place] += 1
        return place

    def publish(self, place: int, key: bytes) -> None:
        """Let others find a place; nothing if the key is known or the place has one."""
        if key not in self._place_of and place not in self._key_of:
            self._key_of[place] = key
            self._place_of[key] = place

    def release(self, place: int) -> None:
        """Stop holding a place: it is kept if it has a key, else free once nobody holds it."""
        self._holders[place] -= 1
        if self._holders[place]:
            return
        if place in self._key_of:
            self._idle[place] = None
        else:
            self._free.append(place)


@dataclass(kw_only=True)
class Allocation:
    """Pages and sinks that one sequence holds, and how many more it was promised."""

    keys: list[bytes]
    """Of the pages in whole chunks of its prompt, but for the last token of the prompt."""
    promised: int
    """Pages that it may still take."""
    pages: list[int] = field(default_factory=list)
    sink: int | None = None


class PageAllocator:
    """Pages and sinks of a pool.

    Args:
        num_pages: Of the pool.
        num_sinks: Sequences whose sinks it can hold.
        page_size: Tokens of a page.
        sinks: Tokens before the first page.
        chunk_pages: Pages that one pass over a prompt fills.
    """

    def __init__(
        self, *, num_pages: int, num_sinks: int, page_size: int, sinks: int, chunk_pages: int = 1
    ) -> None:
        self.page_size, self.sinks, self.chunk_pages = page_size, sinks, chunk_pages
        self.pages = PagePool(num_pages)
        self.first = PagePool(num_sinks)
        self._promised = 0

    def emptied(self) -> PageAllocator:
        """Another one for the same pool, in which nobody holds anything."""
        return PageAllocator(
            num_pages=self.pages.size,
            num_sinks=self.first.size,
            page_size=self.page_size,
            sinks=self.sinks,
            chunk_pages=self.chunk_pages,
        )

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens takes; its sinks are not in pages."""
        return max(0, -(-(tokens - self.sinks) // self.page_size))

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """Of pages in whole chunks of a prompt before its last token, whose logits are wanted."""
        keys, key, start = [], b"", 0
        for end in range(self.sinks + self.page_size, len(prompt), self.page_size):
            tokens = array("q", prompt[start:end]).tobytes()
            key, start = hashlib.blake2b(key + tokens, digest_size=32).digest(), end
            keys.append(key)
        return keys[: len(keys) // self.chunk_pages * self.chunk_pages]

    def admit(self, keys: list[bytes], tokens: int) -> Allocation | None:
        """Promise a sequence all it may need; None while that is not possible.

        Args:
            keys: See ``keys``; none to take over nothing.
            tokens: At most so many, the prompt included.
        """
        allocation = Allocation(keys=keys, promised=self.pages_for(tokens))
        self._promised += allocation.promised
        while self.reuse(allocation):
            pass
        if allocation.sink is None and self.sinks:
            allocation.sink = self.first.take() if self.first.available else None
        if self._promised > self.pages.available or (self.sinks and allocation.sink is None):
            self.release(allocation)
            return None
        return allocation

    def reuse(self, allocation: Allocation) -> bool:
        """Take over the next chunk of the prompt, if somebody has computed all of it."""
        held = len(allocation.pages)
        keys = allocation.keys[held : held + self.chunk_pages]
        first = held == 0 and self.sinks > 0
        known = bool(keys) and all(self.pages.has(key) for key in keys)
        if not known or (first and not self.first.has(keys[0])):
            return False
        if first:
            self._hold_sink(allocation, keys[0])
        allocation.pages += [self.pages.hold(key) for key in keys]
        self._promised -= len(keys)
        allocation.promised -= len(keys)
        return True

    def _hold_sink(self, allocation: Allocation, key: bytes) -> None:
        """The first page goes with its sinks."""
        if allocation.sink is not None:
            self.first.release(allocation.sink)
        allocation.sink = self.first.hold(key)

    def extend(self, allocation: Allocation, tokens: int) -> None:
        """Take pages until there are enough for so many tokens."""
        while len(allocation.pages) < self.pages_for(tokens):
            assert allocation.promised > 0, "a sequence outgrew its promise"
            self._promised -= 1
            allocation.promised -= 1
            allocation.pages.append(self.pages.take())

    def publish(self, allocation: Allocation, tokens: int) -> None:
        """Let others find the prompt pages that the first ``tokens`` tokens have filled."""
        full = min(len(allocation.keys), max(0, tokens - self.sinks) // self.page_size)
        full -= full % self.chunk_pages
        for index in range(full):
            self.pages.publish(allocation.pages[index], allocation.keys[index])
        if full and allocation.sink is not None:
            self.first.publish(allocation.sink, allocation.keys[0])

    def release(self, allocation: Allocation) -> None:
        """Give everything back; the end of a prompt is given up before its beginning."""
        self._promised -= allocation.promised
        allocation.promised = 0
        for page in reversed(allocation.pages):
            self.pages.release(page)
        allocation.pages = []
        if allocation.sink is not None:
            self.first.release(allocation.sink)
            allocation.sink = None
