"""A decode step as one CUDA graph: what a host would launch a thousand kernels for, in one call.

A pool's decode steps have one shape, whoever takes part and however long they are, so the graph of
one is that of all. What differs, ids, positions and the pool's layout, lies in memory that stays
(``layout.Held``): filled by one copy, then the graph is replayed. Python runs while it is captured
and at no replay, so what it decides must be the same for all steps: tests/serve/engine has a log of
two steps that are equal but for what memory holds. A step that is another, because a prompt was
shorter than the sinks or norms have not settled (``Pool.steady``), is run as it always was.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rotq.errors import reason
from rotq.kv.cache.layout import Held
from rotq.kv.pool.pool import Pool, PoolLayout, Row

CAPTURED = ("cuda",)
"""Devices whose steps are captured."""

_WARM = 2
"""Passes before the capture, in which memory is taken and kernels are compiled and loaded."""


class CapturedStep:
    """The decode steps of one pool and number of rows.

    Args:
        pool: Of the model that ``forward`` runs.
        forward: Takes ids and positions, int64 (B, 1) on the device, to fp32 logits (B, 1, V) by a
            pass over the pool, whose layout it was given.
        device: Of the model.
    """

    def __init__(
        self, pool: Pool, forward: Callable[[Tensor, Tensor], Tensor], device: torch.device
    ) -> None:
        self.pool, self.forward, self.device = pool, forward, device
        self.refused: str | None = None
        """Why steps are not captured, once that has been tried in vain."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steady: list[Any] = []
        self._held: Held | None = None
        self._logits: Tensor | None = None
        self._flag: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    def run(self, ids_B1: Tensor, position_B1: Tensor, rows: Sequence[Row]) -> Tensor | None:
        """The logits, which the next step overwrites; None for a step that is not as the others.

        Args:
            ids_B1: int64, on the CPU.
            position_B1: As ``ids_B1``.
            rows: B, of one fresh token or none.

        Raises:
            RotqError: what the step has stored cannot be relied on.
        """
        steady = self.pool.steady()
        layout = self.pool.lay_out(rows, 1)
        if self.refused is not None or steady is None or layout.sink_BTS.shape[1]:
            return None
        if not self._is_of(steady) and not self._capture(steady, len(rows)):
            return None
        assert self._held is not None
        assert self._graph is not None
        self._held.fill([ids_B1, position_B1, *layout.tensors()])
        self._graph.replay()
        self.pool.check(self._flag)
        return self._logits

    def _is_of(self, steady: Sequence[Any]) -> bool:
        """Whether the graph reads these constants."""
        same = zip(self._steady, steady, strict=False)
        return self.is_captured and all(ours is theirs for ours, theirs in same)

    def _capture(self, steady: list[Any], number: int) -> bool:
        """Capture a step of rows of padding, which stores nothing; whether that was possible."""
        self._graph = self._logits = self._flag = None
        layout = self.pool.lay_out([Row(sink=-1)] * number, 1)
        none_B1 = torch.zeros(number, 1, dtype=torch.int64)
        self._held = Held([none_B1, none_B1, *layout.tensors()], self.device)
        self.pool.waits = False
        try:
            self._record(layout.of(self._held.tensors[2:]))
        except RuntimeError as error:
            # a model that waits for its device, or moves what is on the host
            self.refused, self._graph = reason(error), None
            return False
        finally:
            self.pool.waits = True
        self._steady = steady
        return True

    def _record(self, layout: PoolLayout) -> None:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                self.step(layout)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits, self._flag = self.step(layout)
        self._graph = graph

    def step(self, layout: PoolLayout) -> tuple[Tensor, Tensor | None]:
        """What is captured: logits (B, 1, V), and the pool's ``flag``."""
        assert self._held is not None
        ids_B1, position_B1 = self._held.tensors[:2]
        self.pool.use(layout)
        logits = self.forward(ids_B1, position_B1)
        return logits, self.pool.flag()
