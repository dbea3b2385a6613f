"""Speed and memory of the engine under a load that repeats, for one cache after the other.

Clients ask again as soon as they have an answer. Prompts are random tokens of mixed lengths, equal
for every cache; answers have a fixed length. Nothing goes over HTTP, so what is measured is the
engine: queueing, passes, sampling and detokenization.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rotq.errors import RotqError
from rotq.kv.calibration.file import KVCalibration
from rotq.models.limits import vocabulary_of
from rotq.serve.engine.build import build_engine
from rotq.serve.engine.engine import Engine
from rotq.serve.engine.generation import Event, Generation
from rotq.serve.engine.observer import Observer, State
from rotq.serve.engine.sampling import Sampling
from rotq.serve.engine.text_stream import Decode
from rotq.serve.settings import DENSE, Settings

PERCENTILES = (50, 90, 99)
_LOOK = 0.02
"""Seconds between looks at the cache."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of equal clients, drawn with a seed: the same for every cache."""

    requests: int
    clients: int
    """At most so many requests are under way."""
    prompt_tokens: int
    """Of the longest prompt; the shortest has half of them."""
    output_tokens: int
    seed: int = 0

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Token ids of every request's prompt, uniform over the vocabulary."""
        drawn = random.Random(self.seed)
        shortest = max(1, self.prompt_tokens // 2)
        return [
            [
                drawn.randrange(vocabulary)
                for _ in range(drawn.randint(shortest, self.prompt_tokens))
            ]
            for _ in range(self.requests)
        ]


@dataclass(kw_only=True)
class Measured:
    """Figures of one cache under one load; times in seconds."""

    kv: str
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    """Prompt tokens and output tokens."""
    first_token: dict[str, float]
    """From a request's arrival, by percentile."""
    inter_token: dict[str, float]
    request: dict[str, float]
    peak_running: int
    peak_tokens: int
    """Most tokens that running sequences had stored at once."""
    peak_cache_bytes: int
    """Most bytes of pages and sinks that held something."""
    bits_per_element: float
    """Per key or value element when most tokens were stored, unfilled parts of pages included."""
    cache_bytes_total: int
    capacity_tokens: int
    """Tokens that all pages of the pool hold."""
    rows: int
    """Sequences of a decode step, padding included."""
    load: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class _Stopwatch(Observer):
    def __init__(self) -> None:
        self.first: list[float] = []
        self.next: list[float] = []
        self.whole: list[float] = []

    def first_token(self, seconds: float) -> None:
        self.first.append(seconds)

    def next_token(self, seconds: float) -> None:
        self.next.append(seconds)

    def retired(self, sequence: Generation, outcome: str, seconds: float) -> None:
        self.whole.append(seconds)


def measure(
    model: Any,
    calibration: KVCalibration | None,
    settings: Settings,
    load: Load,
    decode: Decode,
) -> Measured:
    """Run a load once, after a short one that is not counted.

    Args:
        model: As for ``build_engine``.
        calibration: Of the packed cache; None for a dense one.
        settings: Memory and batch.
        load: What is asked for.
        decode: Of the model's tokenizer.

    Raises:
        RotqError: the cache cannot hold a single request, or a request failed.
    """
    watch = _Stopwatch()
    engine = build_engine(model, calibration, settings, observer=watch)
    longest = load.prompt_tokens + load.output_tokens
    if longest > engine.longest:
        raise RotqError(f"requests of {longest} tokens; this cache and model hold {engine.longest}")
    prompts = load.prompts(vocabulary_of(model))
    engine.start()
    try:
        _drive(engine, prompts[:1], load, decode)
        for times in (watch.first, watch.next, watch.whole):
            times.clear()
        began = time.monotonic()
        states = _drive(engine, prompts, load, decode)
        seconds = time.monotonic() - began
    finally:
        engine.close()
    generated = len(watch.first) + len(watch.next)
    peak = max(states, key=lambda state: state.tokens)
    return Measured(
        kv=DENSE if calibration is None else calibration.spec.name,
        seconds=seconds,
        output_tokens_per_second=generated / seconds,
        total_tokens_per_second=(generated + sum(map(len, prompts))) / seconds,
        first_token=percentiles(watch.first),
        inter_token=percentiles(watch.next),
        request=percentiles(watch.whole),
        peak_running=max(state.running for state in states),
        peak_tokens=peak.tokens,
        peak_cache_bytes=max(state.cache_bytes for state in states),
        bits_per_element=peak.bits_per_element,
        cache_bytes_total=peak.cache_bytes_total,
        capacity_tokens=engine.allocator.pages.size * engine.allocator.page_size,
        rows=engine.runner.rows,
        load=asdict(load),
    )


def _drive(engine: Engine, prompts: Sequence[list[int]], load: Load, decode: Decode) -> list[State]:
    """Keep ``load.clients`` requests under way until all are done; what was seen meanwhile."""
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def emit(event: Event) -> None:
        if event.last:
            ended.put(event)

    waiting = [
        Generation(
            prompt=prompt,
            max_tokens=load.output_tokens,
            sampling=Sampling(temperature=0),
            decode=decode,
            emit=emit,
        )
        for prompt in reversed(prompts)
    ]
    under_way, states = 0, [engine.state()]
    while waiting or under_way:
        while waiting and under_way < load.clients:
            sequence = waiting.pop()
            sequence.created = time.monotonic()
            if not engine.submit([sequence]):
                raise RotqError("the engine's queue is shorter than the number of clients")
            under_way += 1
        try:
            event = ended.get(timeout=_LOOK)
        except queue.Empty:
            states.append(engine.state())
            continue
        if event.failure is not None:
            raise RotqError(f"a request of the benchmark failed: {event.failure}")
        under_way -= 1
        states.append(engine.state())
    return states


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99: the smallest value that so many percent do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return {
        f"p{percent}": ordered[max(0, -(-percent * len(ordered) // 100) - 1)] if ordered else 0.0
        for percent in PERCENTILES
    }
