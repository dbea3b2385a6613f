"""Charts as SVG text: no library, no script, no font file, the same bytes for the same figures.

Colours are classes, so that one chart is right on light and on dark: a page has ``STYLE`` once, a
file of its own has it inside. Marks carry a <title>, which browsers show under the pointer.

Lengths are in SVG's user units, at a width of ``WIDTH`` those of CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 760
NUM_COLORS = 6

_LIGHT = ("#00798c", "#c8404f", "#a8740b", "#6b4c9a", "#33691e", "#9c4f96")
_DARK = ("#4fc3d4", "#ff8a94", "#e8b84a", "#b79cea", "#9ccc65", "#e29adb")
_INK = {
    "ink": ("#1c1e22", "#e8e6e0"),
    "soft": ("#5b606b", "#a3a9b6"),
    "rule": ("#dddad2", "#343a46"),
}


def _rules(shade: int) -> str:
    colors = (_LIGHT, _DARK)[shade]
    rules = [f".c{number}{{fill:{color};stroke:{color}}}" for number, color in enumerate(colors)]
    rules += [
        f".chart .{name}{{fill:{shades[shade]};stroke:none}}" for name, shades in _INK.items()
    ]
    return "".join([*rules, f".chart .grid{{stroke:{_INK['rule'][shade]};stroke-width:1}}"])


STYLE = (
    ".chart text{font:12px system-ui,sans-serif}.chart .line{fill:none;stroke-width:2}"
    f".chart .dashed{{stroke-dasharray:5 4}}{_rules(0)}"
    f"@media (prefers-color-scheme:dark){{{_rules(1)}}}"
)


@dataclass(frozen=True)
class Axis:
    """From values to places."""

    low: float
    high: float
    start: float
    """Where ``low`` is drawn."""
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is drawn; what lies outside is drawn at the edge."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        share = (value - low) / ((high - low) or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 5, *, whole: bool = False) -> list[float]:
        """Round values from low to high; ``whole`` for what is counted."""
        if not self.log:
            step = _round_step((self.high - self.low) / most)
            step = math.ceil(step) if whole else step
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**power for power in powers for f in factors]
            found = [value for value in found if self.low <= value * 1.0001 <= self.high * 1.0002]
            if len(found) <= most + 1:
                return found
        return found[:: math.ceil(len(found) / most)]


def _round_step(about: float) -> float:
    if about <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(about))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= about * 0.999)


def spanning(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = True
) -> Axis:
    """An axis that holds the values with some room above, and 0 unless it is logarithmic."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = min(known, default=1.0), max(known, default=1.0)
    if log:
        return Axis(low / 1.3, high * 1.3, start, end, log=True)
    room = 0.08 * ((high - min(low, 0.0)) or 1.0)
    return Axis(min(low, 0.0) if zero else low - room, high + room, start, end)


@dataclass
class Chart:
    """Marks on a rectangle."""

    height: float
    label: str
    """What it shows, for readers that see no pictures."""
    marks: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", kind: str = "soft"
    ) -> None:
        """A line of text whose baseline is at y."""
        self.marks.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )

    def rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line of the grid."""
        self.marks.append(
            f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def bar(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        color: int,
        told: str,
        strength: float = 1,
    ) -> None:
        """A filled rectangle."""
        self.marks.append(
            f'<rect class="c{color % NUM_COLORS}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{max(height, 0.5):.1f}" stroke-width="0" fill-opacity="{strength:.2f}">'
            f"<title>{escape(told)}</title></rect>"
        )

    def line(
        self, points: Sequence[tuple[float, float]], color: int, told: str, *, dashed: bool = False
    ) -> None:
        """Through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = f"line c{color % NUM_COLORS}" + (" dashed" if dashed else "")
        self.marks.append(
            f'<polyline class="{kind}" style="fill:none" points="{path}">'
            f"<title>{escape(told)}</title></polyline>"
        )

    def dot(self, x: float, y: float, color: int, told: str) -> None:
        """A point."""
        self.marks.append(
            f'<circle class="c{color % NUM_COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(told)}</title></circle>"
        )

    def y_axis(self, axis: Axis, left: float, right: float, form: str, most: int = 5) -> None:
        """Rules and labels of a vertical axis."""
        for value in axis.ticks(most):
            y = axis.place(value)
            self.rule(left, y, right, y)
            self.text(left - 6, y + 4, form.format(value), anchor="end")

    def counts(self, axis: Axis, y: float, most: int = 10) -> None:
        """Whole numbers below a horizontal axis: blocks, positions, MB."""
        for value in axis.ticks(most, whole=True):
            self.text(axis.place(value), y, f"{value:.0f}", anchor="middle")

    def legend(self, names: Sequence[str], y: float, left: float) -> None:
        """Colours and names, in one row."""
        x = left
        for color, name in enumerate(names):
            self.bar(x, y - 9, 14, 10, color, name)
            self.text(x + 19, y, name, kind="ink")
            x += 19 + 7.2 * len(name) + 18

    def svg(self, *, alone: bool = False) -> str:
        """The chart; ``alone`` is for a file of its own."""
        space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        style = f"<style>{STYLE}</style>" if alone else ""
        return (
            f'<svg{space} class="chart" role="img" aria-label="{escape(self.label)}" '
            f'viewBox="0 0 {WIDTH} {self.height:.0f}">{style}{"".join(self.marks)}</svg>'
        )
