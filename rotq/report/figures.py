"""Charts of what jobs report and what was measured of checkpoints; see ``svg``."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rotq.report.lines import size
from rotq.report.results import JobReport, LayerResult
from rotq.report.svg import WIDTH, Axis, Chart, spanning

_LEFT, _RIGHT = 112, WIDTH - 12
_MOST_BINS = 64


def error_figure(report: JobReport) -> Chart:
    """Relative error of each layer: a row of bars for each kind, a bar for each block."""
    kinds = _by_kind(report.layers)
    errors = {
        kind: {
            block: statistics.fmean(layer.relative_error for layer in found)
            for block, found in blocks.items()
        }
        for kind, blocks in kinds.items()
    }
    highest = max((e for blocks in errors.values() for e in blocks.values()), default=1.0)
    panel, top = 54, 8
    chart = Chart(top + panel * len(kinds) + 34, "Relative error of each layer, block by block")
    columns = _columns(kinds)
    for row, (kind, blocks) in enumerate(errors.items()):
        base = top + panel * (row + 1) - 8
        axis = Axis(0, highest * 1.05 or 1.0, base, base - panel + 16)
        chart.y_axis(axis, _LEFT + 46, _RIGHT, "{:.2g}", most=2)
        chart.text(_LEFT - 4, base - 16, _shortened(kind), anchor="end", kind="ink")
        for block, error in blocks.items():
            x, width = _column(columns, block)
            y = axis.place(error)
            told = f"block {block}, {kind}: {error:.3%}{_mean_of(kinds[kind][block])}"
            chart.bar(x, y, width, base - y, 0, told)
    _block_axis(chart, columns, top + panel * len(kinds) + 10)
    return chart


def bits_figure(report: JobReport) -> Chart:
    """Bits of each layer: a cell for each kind and block, darker where there are more."""
    kinds = _by_kind(report.layers)
    columns, top, row_height = _columns(kinds), 6, 26
    chart = Chart(top + row_height * len(kinds) + 34, "Bits of each layer, block by block")
    all_bits = [layer.bits for layer in report.layers]
    low, high = min(all_bits, default=0), max(all_bits, default=0)
    for row, (kind, blocks) in enumerate(kinds.items()):
        y = top + row_height * row
        chart.text(_LEFT - 4, y + 17, _shortened(kind), anchor="end", kind="ink")
        for block, layers in blocks.items():
            bits = statistics.fmean(layer.bits for layer in layers)
            x, width = _column(columns, block)
            strength = 0.2 + 0.4 * (bits - low) / (high - low) if high > low else 0.4
            stored = statistics.fmean(layer.bits_per_weight for layer in layers)
            told = f"block {block}, {kind}: {bits:g} bits, {stored:.3f} stored{_mean_of(layers)}"
            chart.bar(x, y, width, row_height - 3, 0, told, strength)
            if width >= 9:
                chart.text(x + width / 2, y + 16, f"{bits:.2g}", anchor="middle", kind="ink")
    _block_axis(chart, columns, top + row_height * len(kinds) + 12)
    return chart


def flatness_figure(report: JobReport) -> Chart:
    """max / rms of the inputs of each kind of site, before the rotations and after them."""
    kinds: dict[str, list[Mapping[str, Mapping[str, float | None]]]] = {}
    for name, change in report.flatness.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(change)
    panel, top = 92, 26
    chart = Chart(top + panel * len(kinds) + 30, "Largest input over rms, before and after")
    chart.legend(("after the rotations", "before"), 14, _LEFT + 46)
    most = max(map(len, kinds.values()), default=1)
    across = Axis(0, max(most - 1, 1), _LEFT + 54, _RIGHT - 8)
    for row, (kind, changes) in enumerate(kinds.items()):
        base = top + panel * (row + 1) - 10
        values = [c[w]["max_over_rms"] or 0.0 for c in changes for w in ("before", "after")]
        axis = spanning(values, base, base - panel + 20, log=True)
        chart.y_axis(axis, _LEFT + 46, _RIGHT, "{:g}", most=3)
        chart.text(_LEFT - 4, base - 32, kind, anchor="end", kind="ink")
        for color, when in ((1, "before"), (0, "after")):
            points = [
                (across.place(block), axis.place(change[when]["max_over_rms"] or 0.0))
                for block, change in enumerate(changes)
            ]
            chart.line(points, color, f"{kind}, {when}", dashed=when == "before")
    chart.counts(across, top + panel * len(kinds) + 8)
    chart.text(_RIGHT, top + panel * len(kinds) + 24, "block", anchor="end")
    return chart


def positions_figure(found: Mapping[str, Sequence[float]]) -> Chart:
    """Mean KL to the reference at each position of a window, a line for each checkpoint.

    Args:
        found: KL of position 1, 2, ... in nats, by name.
    """
    chart = Chart(300, "KL to the original over positions of a window")
    chart.legend(list(found), 16, _LEFT - 30)
    binned = {name: _binned(values) for name, values in found.items()}
    last = max((position for points in binned.values() for position, _ in points), default=1)
    across = Axis(0, last, _LEFT - 30, _RIGHT - 10)
    axis = spanning([v for b in binned.values() for _, v in b], 252, 34)
    chart.y_axis(axis, _LEFT - 38, _RIGHT, "{:.3g}")
    for color, (name, points) in enumerate(binned.items()):
        placed = [(across.place(position), axis.place(value)) for position, value in points]
        chart.line(placed, color, name)
    chart.counts(across, 272)
    chart.text(_RIGHT, 290, "position in the window", anchor="end")
    return chart


def size_figure(found: Sequence[Mapping[str, Any]]) -> Chart:
    """Size against KL: a point for each checkpoint of ``rotq compare``."""
    chart = Chart(320, "Size of each checkpoint against its KL to the original")
    across = spanning([one["bytes"] / 1e6 for one in found], _LEFT - 30, _RIGHT - 120)
    kls = [one["evaluation"]["kl"] for one in found]
    axis = spanning(kls, 268, 22, log=min(kls, default=0) > 0 and max(kls) > 4 * min(kls))
    chart.y_axis(axis, _LEFT - 38, _RIGHT, "{:.3g}")
    chart.text(_LEFT - 38, 12, "KL, nats per token")
    for color, one in enumerate(found):
        x, y = across.place(one["bytes"] / 1e6), axis.place(one["evaluation"]["kl"])
        told = f"{one['name']}: {size(one['bytes'])}, KL {one['evaluation']['kl']:.4f}"
        chart.dot(x, y, color, told)
        chart.text(x + 9, y - 6, _shortened(one["name"], 20), kind="ink")
    chart.counts(across, 288)
    chart.text(_RIGHT, 308, "MB of weights", anchor="end")
    return chart


def ratio_figure(found: Sequence[Mapping[str, Any]]) -> Chart:
    """ln(ppl / the original's) with its 95 % interval, a row for each checkpoint."""
    chart = Chart(30 * len(found) + 52, "Logarithm of the ratio of perplexities, 95 % intervals")
    held = [one["ln_ratio"][end] for one in found for end in ("low", "high")]
    across, bottom = spanning(held, _LEFT + 90, _RIGHT - 10), 30 * len(found) + 12
    for value in across.ticks(7):
        chart.rule(across.place(value), 6, across.place(value), bottom)
        chart.text(across.place(value), bottom + 16, f"{value:.3g}", anchor="middle")
    for row, one in enumerate(found):
        y, interval = 24 + 30 * row, one["ln_ratio"]
        ends = f"({interval['low']:.4f} to {interval['high']:.4f})"
        told = f"{one['name']}: {interval['mean']:.4f} {ends}"
        chart.text(_LEFT + 76, y + 4, _shortened(one["name"], 24), anchor="end", kind="ink")
        chart.line(
            [(across.place(interval["low"]), y), (across.place(interval["high"]), y)], row, told
        )
        chart.dot(across.place(interval["mean"]), y, row, told)
    chart.text(_RIGHT, bottom + 34, "ln(perplexity / the original's)", anchor="end")
    return chart


def kv_figure(found: Mapping[str, Sequence[float]]) -> Chart:
    """Relative error of each layer's attention with a packed cache, bars by checkpoint.

    Args:
        found: First layer first, by name.
    """
    chart = Chart(286, "Relative error of attention with a packed cache, layer by layer")
    chart.legend(list(found), 16, _LEFT - 30)
    axis = spanning([value for values in found.values() for value in values], 240, 34)
    chart.y_axis(axis, _LEFT - 38, _RIGHT, "{:.2g}")
    layers = max(map(len, found.values()), default=1)
    columns = Axis(0, layers, _LEFT - 30, _RIGHT)
    width = 0.8 * (columns.place(1) - columns.place(0)) / max(len(found), 1)
    for color, (name, values) in enumerate(found.items()):
        for layer, value in enumerate(values):
            x, y = columns.place(layer) + color * width, axis.place(value)
            chart.bar(x, y, width, 240 - y, color, f"{name}, layer {layer}: {value:.2%}")
    _block_axis(chart, columns, 258, "layer")
    return chart


def _by_kind(layers: Sequence[LayerResult]) -> dict[str, dict[int, list[LayerResult]]]:
    """Layers by what they are in a block, with experts under one name, and by block."""
    found: dict[str, dict[int, list[LayerResult]]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
        block = int(parts[at]) if at >= 0 else 0
        kind = re.sub(r"\b\d+\b", "*", ".".join(parts[at + 1 :]))
        found.setdefault(kind, {}).setdefault(block, []).append(layer)
    return found


def _columns(kinds: Mapping[str, Mapping[int, Any]]) -> Axis:
    last = max((block for blocks in kinds.values() for block in blocks), default=0)
    return Axis(0, last + 1, _LEFT + 50, _RIGHT)


def _column(columns: Axis, block: int) -> tuple[float, float]:
    """Left end and width of a block's bar."""
    width = columns.place(block + 1) - columns.place(block)
    return columns.place(block) + 0.08 * width, 0.84 * width


def _block_axis(chart: Chart, columns: Axis, y: float, name: str = "block") -> None:
    half = (columns.place(1) - columns.place(0)) / 2
    shown = Axis(columns.low, columns.high - 1, columns.start + half, columns.end - half)
    if shown.high > 0:
        chart.counts(shown, y)
    else:
        chart.text(columns.start + half, y, "0", anchor="middle")
    chart.text(_RIGHT, y + 16, name, anchor="end")


def _binned(values: Sequence[float]) -> list[tuple[float, float]]:
    """Means of neighbours, as (middle position, value); positions count from 1."""
    step = max(1, math.ceil(len(values) / _MOST_BINS))
    starts = range(0, len(values), step)
    parts = [values[start : start + step] for start in starts]
    return [
        (start + (len(part) + 1) / 2, statistics.fmean(part))
        for start, part in zip(starts, parts, strict=True)
    ]


def _shortened(name: str, most: int = 17) -> str:
    """The end of a name, which tells it from others."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def _mean_of(layers: Sequence[LayerResult]) -> str:
    return f", mean of {len(layers)}" if len(layers) > 1 else ""
