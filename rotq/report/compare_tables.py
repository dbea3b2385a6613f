"""The table of ``rotq compare``: a row for each figure, a column for each checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rotq.report.columns import facts, make_table, render
from rotq.report.lines import duration, size


def compare_table(report: Mapping[str, Any]) -> str:
    """Sizes and figures, then what they were measured on."""
    found: Sequence[Mapping[str, Any]] = report["checkpoints"]
    table = make_table("", *(one["name"] for one in found))
    for label, cells in compare_rows(found):
        if any(cells):
            table.add_row(label, *(cell or "-" for cell in cells))
    return f"{render(table)}\n{facts(comparison_notes(report))}"


def comparison_notes(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the figures were measured on, as label and text."""
    first = report["checkpoints"][0]["evaluation"]
    return [
        ("reference", f"{report['reference']}, perplexity {first['reference_ppl']:.4f}"),
        ("intervals", "95 %, windows drawn again in pairs"),
        ("protocol", f"{first['protocol']}; {first['tokens']} tokens scored"),
        ("text", str(report["text"])),
    ]


def compare_rows(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each figure's label, and a cell for each checkpoint; empty where it has none."""
    figures = (
        ("perplexity", "ppl", "{:.4f}"),
        ("KL", "kl", "{:.5f}"),
        ("KL, 50 %", "kl_p50", "{:.4f}"),
        ("KL, 99 %", "kl_p99", "{:.4f}"),
        ("KL, 99.9 %", "kl_p999", "{:.4f}"),
        ("top-1", "top1", "{:.2%}"),
    )
    return [
        ("bits all in", [_shown(one["bits_all_in"], "{:.3f}") for one in found]),
        ("bits of linears", [_shown(one["bits"], "{:.3f}") for one in found]),
        ("size", [size(one["bytes"]) for one in found]),
        ("job", ["" if one["seconds"] is None else duration(one["seconds"]) for one in found]),
        *(
            (label, [form.format(one["evaluation"][key]) for one in found])
            for label, key, form in figures
        ),
        ("ln ratio", [_interval(one["ln_ratio"]) for one in found]),
        ("ln ratio to first", [_interval(one["against_first"]) for one in found]),
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.4f} ({found['low']:.4f} to {found['high']:.4f})"
