"""Where a job's time goes: phases that lie inside each other, on one thread or several.

Functions name the phase they are, with ``@phase("moments")`` or ``with phase("load"):``. That costs
a look at a context variable until somebody listens (``Recording``). No torch here.
"""

from __future__ import annotations

import itertools
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Span:
    """One run of a phase. Seconds, from the start of the recording."""

    name: str
    thread: int
    number: int
    """Of this span, in the order they begin."""
    parent: int | None
    """Number of the one it lies in, perhaps on another thread."""
    start: float
    end: float
    cpu: float
    """Seconds of processors, without those of the spans inside; child processes count."""
    raised: int
    """Bytes by which the largest resident memory rose, without the spans inside."""


class Recording:
    """Collects the spans of what runs inside ``with recording.listening():``."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._began = time.perf_counter()
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self.numbers = itertools.count()

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """All that is in no other phase is in ``name``."""
        token = _current.set(_Open(self, name, None))
        try:
            yield
        finally:
            opened = _current.get()
            assert opened is not None, "phases are left in the order they were entered"
            _current.reset(token)
            self.close(opened)

    def now(self) -> float:
        """Seconds since the recording was made."""
        return time.perf_counter() - self._began

    def cpu(self) -> float:
        """Seconds of processors: of a worker thread its own, else of the process and its children.

        torch's own threads are the process'; a worker of ``side_by_side`` computes alone.
        """
        if threading.get_ident() != self._main:
            return time.thread_time()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def close(self, opened: _Open) -> None:
        """Keep a span, and take its cost from the one it lies in."""
        cpu, raised = self.cpu() - opened.cpu, _peak() - opened.peak
        with self._lock:
            if opened.parent is not None:
                opened.parent.inner_cpu += cpu
                opened.parent.inner_raised += raised
            span = Span(
                name=opened.name,
                thread=threading.get_ident(),
                number=opened.number,
                parent=None if opened.parent is None else opened.parent.number,
                start=opened.start,
                end=self.now(),
                cpu=max(0.0, cpu - opened.inner_cpu),
                raised=max(0, raised - opened.inner_raised),
            )
            self.spans.append(span)


class _Open:
    """A span that has not ended."""

    def __init__(self, recording: Recording, name: str, parent: _Open | None) -> None:
        self.recording, self.name, self.parent = recording, name, parent
        self.number = next(recording.numbers)
        self.inner_cpu, self.inner_raised = 0.0, 0
        self.start, self.cpu, self.peak = recording.now(), recording.cpu(), _peak()


_current: ContextVar[_Open | None] = ContextVar("rotq_phase", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is inside, or the decorated function, is phase ``name`` of whatever is recorded."""
    parent = _current.get()
    if parent is None:
        yield
        return
    opened = _Open(parent.recording, name, parent)
    token = _current.set(opened)
    try:
        yield
    finally:
        _current.reset(token)
        opened.recording.close(opened)


@dataclass(kw_only=True)
class Cost:
    """What all spans of one name took, without the spans inside them."""

    calls: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    raised: int = 0


def costs(spans: Iterable[Span]) -> dict[str, Cost]:
    """By name, the dearest first. Walls sum to the recording's length.

    Each moment belongs to the innermost spans that are open; those of several threads share it.
    """
    found: dict[str, Cost] = {}
    for span in spans:
        cost = found.setdefault(span.name, Cost())
        cost.calls += 1
        cost.cpu += span.cpu
        cost.raised += span.raised
    for name, seconds in _moments(list(spans)):
        found[name].wall += seconds
    return dict(sorted(found.items(), key=lambda item: -item[1].wall))


def _moments(spans: list[Span]) -> Iterator[tuple[str, float]]:
    """Stretches of time in which no span begins or ends, shared among the innermost spans."""
    events = sorted(
        [(span.start, True, span) for span in spans] + [(span.end, False, span) for span in spans],
        key=lambda event: event[0],
    )
    opened: dict[int, Span] = {}
    for (begin, opens, span), (end, *_) in pairwise(events):
        if opens:
            opened[span.number] = span
        else:
            del opened[span.number]
        outer = {inside.parent for inside in opened.values()}
        innermost = [inside for number, inside in opened.items() if number not in outer]
        for inside in innermost:
            yield inside.name, (end - begin) / len(innermost)


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
