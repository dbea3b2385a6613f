"""Phases: what is in none inside, threads that work at the same time, and nobody listening."""

import threading
import time

import pytest
import torch

from rotq.numerics import side_by_side
from rotq.phases import Recording, Span, costs, phase


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def span(number: int, name: str, start: float, end: float, parent: int | None, thread: int) -> Span:
    given = {"number": number, "name": name, "start": start, "end": end, "parent": parent}
    return Span(**given, thread=thread, cpu=1.0, raised=0)


def test_an_inner_phase_is_taken_from_the_outer_one():
    recording = Recording()
    with recording.listening("other"), phase("outer"):
        busy(0.02)
        with phase("inner"):
            busy(0.05)
    found = costs(recording.spans)
    assert set(found) == {"other", "outer", "inner"}
    assert found["inner"].cpu == pytest.approx(0.05, abs=0.01)
    assert found["outer"].cpu == pytest.approx(0.02, abs=0.01)
    assert found["other"].cpu < 0.01


def test_walls_sum_to_the_whole_whatever_runs_at_the_same_time():
    spans = [
        span(0, "other", 0.0, 10.0, None, 1),
        span(1, "solve", 1.0, 9.0, 0, 1),
        span(2, "columns", 1.0, 5.0, 1, 2),
        span(3, "sweeps", 3.0, 9.0, 1, 3),
    ]
    walls = {name: cost.wall for name, cost in costs(spans).items()}
    # two seconds are shared by columns and sweeps; the thread that waits for both has none
    assert walls == {"sweeps": 5.0, "columns": 3.0, "other": 2.0, "solve": 0.0}


def test_workers_are_in_the_phase_that_started_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    recording = Recording()

    @phase("part")
    def work(seconds: float) -> int:
        busy(seconds)
        return threading.get_ident()

    with recording.listening("other"), phase("all"):
        side_by_side(work, [0.01, 0.01])
    whole = next(item for item in recording.spans if item.name == "all")
    parts = [item for item in recording.spans if item.name == "part"]
    assert [item.parent for item in parts] == [whole.number] * 2
    assert {item.thread for item in parts}.isdisjoint({whole.thread})
    assert sum(item.cpu for item in parts) >= 0.02


def test_nothing_is_kept_where_nobody_listens():
    recording = Recording()
    with phase("alone"):
        pass
    assert recording.spans == []
    with recording.listening("other"):
        pass
    with phase("after"):
        pass
    assert [item.name for item in recording.spans] == ["other"]


def test_a_failure_ends_its_phase():
    recording = Recording()
    with pytest.raises(ValueError, match="broken"), recording.listening("other"), phase("load"):
        raise ValueError("broken")
    assert [item.name for item in recording.spans] == ["load", "other"]
