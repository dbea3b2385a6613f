"""Figures of a report as PNG; needs matplotlib, which the extra ``plots`` installs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.disk.destination import file_to_write, without_mark
from rotq.disk.files import make_folder, whole_file
from rotq.errors import RotqError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Changes = dict[str, dict[str, dict[str, float | None]]]

FIGURES = {
    "max_over_rms": ("max / rms", "log"),
    "kurtosis": ("kurtosis", "log"),
    "spread": ("max variance / mean", "log"),
    "log_qsur": ("log QSUR$^{1/d}$", "linear"),
}
"""Field of ``Flatness`` to label and scale of its row."""

FLATNESS = "flatness.png"

_SOFTWARE = "rotq inspect --plots"
"""Stands in the files, which tells them from others of the name."""

_STYLES: dict[str, dict[str, Any]] = {
    "before": {"color": "#d1495b", "linestyle": "--"},
    "after": {"color": "#00798c", "linestyle": "-"},
}


def plot_flatness(flatness: Changes, folder: Path) -> Path:
    """Write ``flatness.png``: a row per figure, a column per kind of site, blocks from left.

    Args:
        flatness: Of a ``JobReport``, not empty.
        folder: Created if need be.

    Returns:
        The file.

    Raises:
        RotqError: matplotlib is not installed, the folder cannot be written to, or it has another
            file of the name.
    """
    check_matplotlib()
    file = file_to_write(folder / FLATNESS, {}, foreign, parents=True)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in flatness))
    figure = _figure(2.6 * len(kinds) + 0.6, 9)
    axes = figure.subplots(len(FIGURES), len(kinds), sharex=True, sharey="row", squeeze=False)
    for row, (field, (label, scale)) in enumerate(FIGURES.items()):
        axes[row, 0].set_ylabel(label)
        for column, kind in enumerate(kinds):
            _draw(axes[row, column], _series(flatness, kind, field), scale)
    for column, kind in enumerate(kinds):
        axes[0, column].set_title(kind)
        axes[-1, column].set_xlabel("block")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.align_ylabels()
    figure.suptitle("Inputs of linear layers, before and after the rotations")
    _save(figure, file)
    return folder / FLATNESS


def plot_variants(scores: Mapping[str, Sequence[float]], file: Path) -> None:
    """Write a scatter plot of an assay: a panel per score, against the reference or the assay.

    Args:
        scores: By column: ``measured``, each kind, and ``reference KIND`` where there is one.
        file: From ``check_plots``.
    """
    kinds = [name for name in scores if name != "measured" and not name.startswith("reference ")]
    figure = _figure(4 * len(kinds), 4)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        other = f"reference {kind}" if f"reference {kind}" in scores else "measured"
        axes.scatter(scores[other], scores[kind], s=4, alpha=0.4, color="#00798c", linewidths=0)
        axes.set_xlabel(other)
        axes.set_ylabel(kind)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(file.stem)
    _save(figure, file)


def check_plots(files: Iterable[Path]) -> None:
    """Refuse plots that cannot be written.

    Raises:
        RotqError: matplotlib is not installed, or another file has the name of one.
    """
    check_matplotlib()
    for file in files:
        file_to_write(file, {}, foreign, parents=True)


def check_matplotlib() -> None:
    """Raise RotqError where matplotlib cannot be imported."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401
        from matplotlib.figure import Figure  # noqa: F401
    except ImportError:
        raise RotqError(
            "plots need matplotlib; install the extra: pip install 'rotq[plots]'"
        ) from None


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> None:
    make_folder(file.parent)
    with whole_file(file) as opened:
        figure.savefig(opened, dpi=150, format="png", metadata={"Software": _SOFTWARE})


def foreign(path: Path) -> str | None:
    """What makes an existing path no plot of rotq's, in words; None if it is one."""
    return without_mark(path, b"tEXtSoftware\0" + _SOFTWARE.encode(), "plot")


def _series(flatness: Changes, kind: str, field: str) -> dict[str, list[float | None]]:
    changes = [change for name, change in flatness.items() if name.rpartition(".")[2] == kind]
    return {when: [change[when][field] for change in changes] for when in _STYLES}


def _draw(axes: Axes, series: dict[str, list[float | None]], scale: Any) -> None:
    axes.set_yscale(scale)
    if scale == "log":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for when, values in series.items():
        known = [(block, value) for block, value in enumerate(values) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=when, marker=".", **_STYLES[when])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
