"""Decode steps as a CUDA graph, without a GPU: steps differ in memory alone, replays are passes."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_trace import Trace
from stubbed_step import stubbed
from tiny_served import calibration_of, served_model

from rotq.errors import RotqError
from rotq.kv.cache.layout import Held
from rotq.kv.pool.dense import DensePool
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import Row
from rotq.serve.engine.captured_step import CapturedStep
from rotq.serve.engine.model_runner import ModelRunner

MODEL = served_model()
CPU = torch.device("cpu")


def runner_of(model: Any = MODEL) -> ModelRunner:
    """Three rows, and two sequences whose prompts are done."""
    calibration = calibration_of(model, "k3v3")
    pool = PackedPool(model, calibration, num_pages=6, num_sinks=3, table_width=2)
    runner = ModelRunner(model, pool, rows=3)
    for first, sink in ((0, 0), (2, 1)):
        runner.prefill(range(9, 29), Row(pages=[first, first + 1], sink=sink, fresh=20))
    return runner


def rows_at(*counts: int) -> list[Row]:
    """One token of each sequence that has so many."""
    return [
        Row(pages=[2 * i, 2 * i + 1], sink=i, count=count, fresh=1)
        for i, count in enumerate(counts)
    ]


class Graph:
    """A CUDA graph whose replay is the pass again, into the memory of the first."""

    made: list[Graph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replays = 0
        self.step: Any = None
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.step()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """CUDA's graphs and streams, replaced."""
    none = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def nothing(*_: Any) -> Any:
        yield

    monkeypatch.setattr(Graph, "made", [])
    for name, stub in {
        "CUDAGraph": Graph,
        "graph": nothing,
        "stream": nothing,
        "Stream": lambda device: none,
        "current_stream": lambda device: none,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return Graph.made


class Replayed(CapturedStep):
    """Whose graphs can be replayed on a CPU."""

    def _record(self, layout: Any) -> None:
        super()._record(layout)
        assert self._graph is not None
        self._graph.step = lambda: self._again(layout)  # type: ignore[attr-defined]

    def _again(self, layout: Any) -> None:
        self.pool.waits = False
        logits, flag = self.step(layout)
        self.pool.waits = True
        self._logits.copy_(logits)  # type: ignore[attr-defined]
        self._flag.copy_(flag)  # type: ignore[attr-defined]


def captured(runner: ModelRunner) -> CapturedStep:
    runner.captured = Replayed(runner.pool, runner._forward, CPU)
    return runner.captured


@torch.no_grad()
def test_steps_are_equal_but_for_what_memory_holds() -> None:
    """No copy from the host, no question to the device, no branch on a length, no other memory.

    Not in inference mode, in which torch shows operators before they are taken apart.
    """
    runner = runner_of()
    step = CapturedStep(runner.pool, runner._forward, CPU)
    pool, traces = runner.pool, []
    pool.waits = False
    with stubbed(Counter()):
        # tables of layers are made once
        step._held = None
        for rows in (rows_at(20, 20), rows_at(21), rows_at(70, 100)):
            padded = [*rows, *[runner.padding()] * (3 - len(rows))]
            layout = pool.lay_out(padded, 1)
            given = [torch.zeros(3, 1, dtype=torch.int64), runner._positions(padded, 1)]
            if step._held is None:
                step._held = Held([*given, *layout.tensors()], CPU)
                step.step(layout.of(step._held.tensors[2:]))
            step._held.fill([*given, *layout.tensors()])
            with Trace() as trace, stubbed(Counter(), trace.note):
                step.step(layout.of(step._held.tensors[2:]))
            traces.append(trace)
    assert not traces[0].forbidden
    kernels = Counter(event[0] for event in traces[0].events)
    assert kernels["decode_kernel"] == kernels["merge_kernel"] == len(pool.layers)
    assert kernels["encode_kernel"] == 2
    for other in traces[1:]:
        assert len(other.events) == len(traces[0].events)
        for ours, theirs in zip(other.events, traces[0].events, strict=True):
            assert ours == theirs


def test_replays_are_passes(graphs: list[Graph]) -> None:
    eager, runner = runner_of(), runner_of()
    step = captured(runner)
    for count in range(20, 24):
        ids, rows = [count, 3], rows_at(count, count)
        assert torch.equal(runner.decode(ids, rows), eager.decode(ids, rows))
    assert [graph.replays for graph in graphs] == [4]
    assert step.is_captured
    for ours, theirs in zip(runner.pool.layers, eager.pool.layers, strict=True):
        for one, other in zip(ours.held(), theirs.held(), strict=True):
            assert torch.equal(one, other)


def test_a_step_with_a_new_sink_is_none_of_them(graphs: list[Graph]) -> None:
    eager, runner = runner_of(), runner_of()
    captured(runner)
    for count in range(1, 6):
        assert torch.equal(runner.decode([7], rows_at(count)), eager.decode([7], rows_at(count))), (
            count
        )
    assert [graph.replays for graph in graphs] == [6 - runner.pool.sinks]


def test_other_constants_are_captured_anew(graphs: list[Graph]) -> None:
    runner = runner_of()
    step = captured(runner)
    runner.decode([7], rows_at(20))
    reach = runner.pool.layers[0].reach
    reach.constants = replace(reach.constants)
    runner.decode([7], rows_at(21))
    assert [graph.replays for graph in graphs] == [1, 1]
    runner.pool.forget()
    # norms are to be settled by what is coded next
    runner.decode([7], rows_at(22))
    assert [graph.replays for graph in graphs] == [1, 1]
    assert step.is_captured


def test_norms_are_checked_after_a_replay(graphs: list[Graph]) -> None:
    runner = runner_of()
    step = captured(runner)
    runner.decode([7], rows_at(20))
    step._flag = torch.ones((), dtype=torch.bool)  # type: ignore[assignment]
    graphs[0].step = lambda: None
    with pytest.raises(RotqError, match="not finite"):
        runner.decode([7], rows_at(21))
    assert runner.pool.steady() is None


def test_what_cannot_be_captured_is_run_as_before(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, runner = runner_of(), runner_of()
    step = captured(runner)

    def fails(graph: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    for count in (20, 21):
        ids, rows = [3], rows_at(count)
        assert torch.equal(runner.decode(ids, rows), eager.decode(ids, rows))
    assert step.refused == "operation not permitted when stream is capturing"
    assert not step.is_captured
    assert runner.pool.waits


def test_a_pool_whose_steps_look_at_tokens_is_not_captured(graphs: list[Graph]) -> None:
    runner = ModelRunner(MODEL, DensePool(MODEL, num_pages=4, table_width=2), rows=2)
    step = captured(runner)
    runner.decode([7], [Row(pages=[1], fresh=1)])
    assert not graphs
    assert not step.is_captured


def test_a_cpu_has_no_graphs() -> None:
    assert runner_of().captured is None
