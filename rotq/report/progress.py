"""What a running job tells: nothing, one line per block, or a live bar on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rotq.report.results import LayerResult

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar


class Progress:
    """Listener of a job. This one says nothing; it is the library's default."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""

    def block_started(self, index: int, total: int) -> None:
        """Block ``index`` of ``total`` begins."""

    def layer_done(self, layer: LayerResult) -> None:
        """A linear layer has its codes."""

    def block_done(self, index: int, seconds: float, peak_rss: int) -> None:
        """Block ``index`` is on disk; ``peak_rss`` in bytes."""

    def tuning_step(self, step: int, total: int, divergence: float) -> None:
        """Step ``step`` of ``total`` is done; KL to the original before it, nats per token."""

    def transform_step(self, name: str, step: int, total: int, loss: float) -> None:
        """Step ``step`` of ``total`` of a basis' training is done; its loss before it."""

    def gradient_block(self, way: str, done: int, total: int) -> None:
        """``done`` of ``total`` blocks were run ``forward``, or then ``backward``."""

    def message(self, text: str) -> None:
        """A warning or a step worth a line."""


class PlainProgress(Progress):
    """One line per block on ``stream``, for logs and CI."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._clock = _Clock()
        self._layers: list[LayerResult] = []
        self._tuning: list[float] = []
        self._transform: list[float] = []
        self._gradients = _Clock()

    def block_started(self, index: int, total: int) -> None:
        self._clock.start(index, total)
        self._layers = []

    def layer_done(self, layer: LayerResult) -> None:
        self._layers.append(layer)

    def block_done(self, index: int, seconds: float, peak_rss: int) -> None:
        self._clock.done(index)
        self.message(
            f"block {index + 1}/{self._clock.total}  {_worst(self._layers)}{seconds:.1f} s  "
            f"peak {peak_rss / 1e9:.2f} GB  {self._clock.left()} left"
        )

    def tuning_step(self, step: int, total: int, divergence: float) -> None:
        self._tuning.append(divergence)
        if (step + 1) % max(1, total // 8) == 0:
            mean = sum(self._tuning) / len(self._tuning)
            self.message(f"tuning step {step + 1}/{total}  KL {mean:.4f} on calibration windows")
            self._tuning = []

    def transform_step(self, name: str, step: int, total: int, loss: float) -> None:
        self._transform.append(loss)
        if (step + 1) % max(1, total // 8) == 0:
            mean = sum(self._transform) / len(self._transform)
            self.message(f"transform {name} step {step + 1}/{total}  loss {mean:.4f}")
            self._transform = []

    def gradient_block(self, way: str, done: int, total: int) -> None:
        self._gradients = _Clock.after(self._gradients, done, total)
        if done % max(1, total // 8) == 0:
            self.message(f"gradients {way} {done}/{total} blocks  {self._gradients.left()} left")

    def message(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


class RichProgress(Progress):
    """A live bar on stderr: block, last layer and its error, memory, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichBar

        self._clock, self._gradients = _Clock(), _Clock()
        self._bar: RichBar = RichBar(
            TextColumn("block"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=None)
        self._memory = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def block_started(self, index: int, total: int) -> None:
        self._clock.start(index, total)
        self._bar.update(self._task, completed=index, total=total)

    def layer_done(self, layer: LayerResult) -> None:
        short = ".".join(layer.name.split(".")[-2:])
        self._describe(f"{short} {layer.relative_error:.2%}")

    def block_done(self, index: int, seconds: float, peak_rss: int) -> None:
        self._clock.done(index)
        self._memory = f"peak {peak_rss / 1e9:.2f} GB"
        self._bar.update(self._task, completed=index + 1)
        self._describe(f"{seconds:.1f} s")

    def transform_step(self, name: str, step: int, total: int, loss: float) -> None:
        self._describe(f"transform {name} {step + 1}/{total}  loss {loss:.4f}")

    def gradient_block(self, way: str, done: int, total: int) -> None:
        self._gradients = _Clock.after(self._gradients, done, total)
        left = self._gradients.left()
        self._bar.update(self._task, description=f"gradients {way} {done}/{total}  {left} left")

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def _describe(self, event: str) -> None:
        parts = [event, self._memory, f"{self._clock.left()} left"]
        self._bar.update(self._task, description="  ".join(part for part in parts if part))


class _Clock:
    """Time left, from the blocks done in this run; a resumed job does not start at block 0."""

    def __init__(self) -> None:
        self.total = 0
        self._began: float | None = None
        self._first = 0
        self._next = 0

    @classmethod
    def after(cls, before: _Clock, done: int, total: int) -> _Clock:
        """Of a loop over all blocks, when ``done`` are; a new one behind the first."""
        clock = cls() if done == 1 else before
        clock.start(done, total)
        clock.done(done - 1)
        return clock

    def start(self, index: int, total: int) -> None:
        self.total = total
        if self._began is None:
            self._began, self._first, self._next = time.monotonic(), index, index

    def done(self, index: int) -> None:
        self._next = index + 1

    def left(self) -> str:
        """Minutes and seconds; ``?`` before the first block is done."""
        finished = self._next - self._first
        if self._began is None or finished < 1:
            return "?"
        seconds = (time.monotonic() - self._began) / finished * (self.total - self._next)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _worst(layers: list[LayerResult]) -> str:
    if not layers:
        return ""
    worst = max(layers, key=lambda layer: layer.relative_error)
    return f"worst {'.'.join(worst.name.split('.')[-2:])} {worst.relative_error:.2%}  "
