"""Figures of a model card: SVG files beside it, those that ``rotq report`` draws."""

from __future__ import annotations

from pathlib import Path

from rotq.checkpoint.files import write_text
from rotq.report.figures import bits_figure, error_figure, flatness_figure
from rotq.report.results import JobReport
from rotq.report.svg import Chart

CARD = "README.md"


def add_figures(folder: Path, report: JobReport) -> None:
    """Write the figures of a job, and show them at the end of the card that is there.

    Args:
        folder: A checkpoint that is not yet published.
        report: Of the job.

    Raises:
        RotqError: a file cannot be written.
    """
    figures = card_figures(report)
    for name, chart in figures.items():
        write_text(folder / name, chart.svg(alone=True) + "\n")
    shown = "\n".join(f"\n![{chart.label}]({name})" for name, chart in figures.items())
    card = folder / CARD
    write_text(card, f"{card.read_text(encoding='utf-8')}\n## What was lost where\n{shown}\n")


def card_figures(report: JobReport) -> dict[str, Chart]:
    """Charts by file name; of flatness where it was measured."""
    figures = {"rotq_error.svg": error_figure(report), "rotq_bits.svg": bits_figure(report)}
    if report.flatness:
        figures["rotq_flatness.svg"] = flatness_figure(report)
    return figures
