"""Runs steps one after the other, prints what they find, and keeps count of time and failures."""

from __future__ import annotations

import platform
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

Step = Callable[["Run"], None]


class Run:
    """What all steps share.

    Args:
        dry: In Triton's interpreter: tiny sizes, one repetition.
        seconds: After these no step begins.
        model: Folder of a model, or None.
    """

    def __init__(self, *, dry: bool, seconds: float, model: Path | None) -> None:
        self.dry, self.seconds, self.model = dry, seconds, model
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.failures = 0
        self.results: dict[str, Any] = {}
        self._started = time.monotonic()
        self._step = ""
        self._flush: torch.Tensor | None = None

    def pick(self, whole: Any, tiny: Any) -> Any:
        """A size: ``tiny`` when dry."""
        return tiny if self.dry else whole

    def step(self, name: str, limit: int, step: Step) -> None:
        """Run one, for at most ``limit`` seconds; whatever it raises is a failure."""
        left = max(0.0, self.seconds - (time.monotonic() - self._started))
        if left < limit / 3:
            self.say(name, f"SKIPPED: {left:.0f} s are left, it may take {limit}")
            return
        self._step, begun = name, time.monotonic()
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(limit)
        try:
            step(self)
            self.synchronize()
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
            traceback.print_exc()
        finally:
            signal.alarm(0)
        self.say(name, f"took {time.monotonic() - begun:.1f} s")

    def say(self, name: str, text: str) -> None:
        """A line, at once."""
        for line in text.splitlines():
            print(f"{name:4} {line}", flush=True)

    def note(self, what: str, value: Any, unit: str = "") -> None:
        """A figure, printed and kept."""
        self.results[f"{self._step} {what}"] = value
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        self.say(self._step, f"{what}: {shown} {unit}".rstrip())

    def fail(self, text: str) -> None:
        """Count a failure."""
        self.failures += 1
        self.results[f"{self._step} failure {self.failures}"] = text
        self.say(self._step, f"FAIL {text}")

    def expect(self, condition: bool, what: str) -> None:
        """Say what holds, or fail."""
        if condition:
            self.say(self._step, f"ok   {what}")
        else:
            self.fail(what)

    def each(self, cases: dict[str, Callable[[], None]]) -> None:
        """Run cases; one that raises is a failure and the others go on."""
        for name, case in cases.items():
            try:
                case()
                self.synchronize()
            except Exception as error:
                self.fail(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                if "CUDA error" in str(error):
                    raise

    def synchronize(self) -> None:
        """Wait for the GPU, so that an asynchronous fault has the name of its step."""
        if not self.dry:
            torch.cuda.synchronize()

    def host_us(self, call: Callable[[], Any], number: int = 100) -> float:
        """Wall time of a call until it returns, us: the host's part where the GPU keeps up."""
        number = self.pick(number, 1)
        for _ in range(self.pick(3, 0)):
            call()
        self.synchronize()
        begun = time.perf_counter()
        for _ in range(number):
            call()
        taken = (time.perf_counter() - begun) / number
        self.synchronize()
        return 1e6 * taken

    def device_us(self, call: Callable[[], Any], number: int = 20) -> float:
        """Median time between two events around a call, us, with a cold L2 cache."""
        if self.dry:
            return self.host_us(call)
        for _ in range(3):
            call()
        if self._flush is None:
            self._flush = torch.empty(1 << 28, dtype=torch.int8, device=self.device)
        pairs = []
        for _ in range(number):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in pairs)

    def graph_us(self, call: Callable[[], Any]) -> float:
        """As ``device_us``, of a CUDA graph of the call: without what the host takes."""
        return self.device_us(self.captured(call).replay if not self.dry else call)

    def captured(self, call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """A graph of a call, which is warm."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph

    def report(self) -> dict[str, Any]:
        """All figures, and of what."""
        card = "interpreter" if self.dry else torch.cuda.get_device_name(0)
        return {
            "card": card,
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "failures": self.failures,
            "results": self.results,
        }


def _too_long(*_: Any) -> None:
    raise TimeoutError("it took longer than its step may")
