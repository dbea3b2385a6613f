"""Continuous batching: one thread admits sequences, runs them together and retires them.

Each round: those who have gone or are late leave; the waiting are admitted while places and pages
can be promised; one prompt, in turn, advances by one pass; all others decode one token. So a long
prompt delays a running text by one pass, never by its length.

Greedy output does not depend on what else is being served: see ``model_runner`` for the shapes, and
``page_allocator`` for why a shared page holds what would have been computed.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from rotq.kv.pool.pool import Cost, Row
from rotq.serve.engine.generation import Event, Failure, Generation
from rotq.serve.engine.model_runner import ModelRunner
from rotq.serve.engine.observer import Observer, State
from rotq.serve.engine.page_allocator import PageAllocator
from rotq.serve.engine.prefill import prefill_chunk, reuse_prefix
from rotq.serve.engine.queue import FairQueue

_IDLE = 0.05
"""Seconds between looks at deadlines while nothing runs."""

_FAILURES = 3
"""Passes that may fail one after the other; then the engine is dead."""


class Engine:
    """Serves sequences until it is closed.

    Args:
        runner: Of the model.
        allocator: Of its pool.
        cost: Of the pool's pages.
        longest: Tokens that a sequence may have.
        max_batch: Sequences that run together.
        max_queue: Sequences that wait.
        observer: See there.
        warm_seconds: That ``warm_up`` took, if it was run.
    """

    def __init__(
        self,
        runner: ModelRunner,
        allocator: PageAllocator,
        cost: Cost,
        *,
        longest: int,
        max_batch: int,
        max_queue: int,
        observer: Observer | None = None,
        warm_seconds: float | None = None,
    ) -> None:
        self.runner, self.allocator, self.cost = runner, allocator, cost
        self.longest, self.max_batch = longest, max_batch
        self.warm_seconds = warm_seconds
        self.waiting = FairQueue(max_queue)
        self.observer = observer or Observer()
        self._running: list[Generation] = []
        self._prompts: deque[Generation] = deque()
        self._wake = threading.Event()
        self._stop = False
        self._stop_with: Failure = "shutdown"
        self._failures = 0
        self._generated = self._prompted = self._reused = 0
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._serve, name="rotq-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which admits and runs what is submitted."""
        self._thread.start()

    def submit(self, sequences: Sequence[Generation]) -> bool:
        """Queue all sequences of a request; False if the queue is full or the engine stops."""
        if not self.alive or not self.waiting.enter(sequences):
            return False
        self._wake.set()
        return True

    def retry_after(self) -> int:
        """Seconds after which a place in the queue may be free, an estimate."""
        return min(60, max(1, math.ceil(self._seconds * len(self.waiting) / self.max_batch)))

    @property
    def alive(self) -> bool:
        """Whether the thread runs and still takes sequences."""
        return self._thread.is_alive() and not self._stop

    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._running and not len(self.waiting)

    def close(self, failure: Failure = "shutdown") -> None:
        """Fail what runs and waits with ``failure``, and end the thread."""
        self.waiting.close()
        self._stop_with = failure
        self._stop = True
        self._wake.set()
        self._thread.join()

    def state(self) -> State:
        """A snapshot; any thread may ask, the numbers need not be of the very same moment."""
        allocator, running = self.allocator, list(self._running)
        tokens = sum(sequence.count for sequence in running)
        allocations = [sequence.allocation for sequence in running]
        held = {page for part in allocations if part for page in list(part.pages)}
        first = {part.sink for part in allocations if part and part.sink is not None}
        size = self.cost.of(len(held), len(first))
        return State(
            running=len(running),
            waiting=len(self.waiting),
            tokens=tokens,
            pages=allocator.pages.filled,
            pages_total=allocator.pages.size,
            cache_bytes=self.cost.of(allocator.pages.filled, allocator.first.filled),
            cache_bytes_total=self.runner.pool.nbytes,
            bits_per_element=8 * size / (tokens * self.cost.elements) if tokens else 0.0,
            generated=self._generated,
            prompted=self._prompted,
            reused=self._reused,
            alive=self.alive,
        )

    def _serve(self) -> None:
        while not self._stop:
            try:
                self._sweep()
                self._admit()
                if not self._prefill() | self._decode():
                    self._wake.wait(_IDLE if len(self.waiting) else None)
                    self._wake.clear()
                    continue
                self._failures = 0
            except Exception as error:
                self._recover(error)
        for sequence in [*self._running, *self.waiting.leave(lambda _: True)]:
            self._fail(sequence, self._stop_with)

    def _recover(self, error: Exception) -> None:
        """A pass failed: what was running is lost, what waits is not, and pages are not trusted."""
        self.observer.failed(error)
        for sequence in list(self._running):
            self._fail(sequence, "internal")
        self.allocator = self.allocator.emptied()
        self._failures += 1
        if self._failures >= _FAILURES:
            self.waiting.close()
            self._stop_with, self._stop = "internal", True

    def _sweep(self) -> None:
        """Let go of who has gone and who is late."""
        now = time.monotonic()

        def over(sequence: Generation) -> bool:
            return sequence.cancelled or now > sequence.deadline

        for sequence in [*filter(over, self._running), *self.waiting.leave(over)]:
            self._fail(sequence, "cancelled" if sequence.cancelled else "timeout")

    def _admit(self) -> None:
        while len(self._running) < self.max_batch:
            sequence = self.waiting.admit(self._allocate)
            if sequence is None:
                return
            self._running.append(sequence)
            self._prompts.append(sequence)

    def _allocate(self, sequence: Generation) -> bool:
        if sequence.keys is None:
            # prompt tokens whose logits are wanted must be computed
            reuse = not sequence.prompt_logprobs
            sequence.keys = self.allocator.keys(sequence.prompt) if reuse else []
        sequence.allocation = self.allocator.admit(sequence.keys, sequence.total)
        return sequence.allocation is not None

    def _prefill(self) -> bool:
        """One pass over one prompt; whether there was one."""
        while self._prompts:
            sequence = self._prompts.popleft()
            if sequence.allocation is None:
                continue
            self._reused += reuse_prefix(sequence, self.allocator)
            computed, logits = prefill_chunk(sequence, self.allocator, self.runner)
            self._prompted += computed
            if sequence.prefilling:
                self._prompts.append(sequence)
            else:
                self._choose(sequence, logits[-1])
            return True
        return False

    def _decode(self) -> bool:
        """One token for everyone whose prompt is done; whether there was anyone."""
        ready = [sequence for sequence in self._running if not sequence.prefilling]
        for first in range(0, len(ready), self.runner.rows):
            group = ready[first : first + self.runner.rows]
            for sequence, logits_V in zip(group, self._step(group), strict=True):
                sequence.count += 1
                self._choose(sequence, logits_V)
        return bool(ready)

    def _step(self, group: Sequence[Generation]) -> Tensor:
        rows: list[Row] = []
        for sequence in group:
            assert sequence.allocation is not None
            self.allocator.extend(sequence.allocation, sequence.count + 1)
            rows.append(sequence.row(1))
        return self.runner.decode([item.generated[-1] for item in group], rows)

    def _choose(self, sequence: Generation, logits_V: Tensor) -> None:
        now = time.monotonic()
        try:
            if sequence.max_tokens == 0:
                self._retire(sequence, sequence.event(sequence.text.finish(), finish="length"))
                return
            event = sequence.accept(sequence.sampler.pick(logits_V))
        except Exception as error:
            # a tokenizer that cannot read its own tokens costs one sequence
            self.observer.failed(error)
            self._fail(sequence, "internal")
            return
        self._generated += 1
        if len(sequence.generated) == 1:
            self.observer.first_token(now - sequence.created)
        else:
            self.observer.next_token(now - sequence.last_emitted)
        sequence.last_emitted = now
        if event.last:
            self._retire(sequence, event)
        elif event.piece.text or event.piece.picked or event.prompt:
            sequence.emit(event)

    def _fail(self, sequence: Generation, failure: Failure) -> None:
        self._retire(sequence, sequence.event(failure=failure))

    def _retire(self, sequence: Generation, event: Event) -> None:
        if sequence.allocation is not None:
            self.allocator.release(sequence.allocation)
            sequence.allocation = None
            self._running.remove(sequence)
        seconds = time.monotonic() - sequence.created
        if event.finish:
            self._seconds += 0.1 * (seconds - self._seconds)
        self.observer.retired(sequence, event.finish or event.failure or "", seconds)
        sequence.emit(event)
