"""The table of ``rotq eval tasks``: a row for each figure of each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotq.report.columns import facts, make_table, render


def task_table(found: Mapping[str, Any]) -> str:
    """Figures with their standard errors, then what they were measured with."""
    table = make_table("task", "metric", "value", "std. error", "rows", "shots")
    for score in found["tasks"]:
        for metric in score["metrics"]:
            stderr = "-" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
            table.add_row(
                score["task"],
                metric["name"],
                f"{metric['value']:.4f}",
                stderr,
                str(score["rows"] or "-"),
                str(score["shots"]),
            )
    notes = [("scored by", found["library"])]
    if "kv" in found:
        bits = f"{found['kv']['bits_per_packed_element']:.3f} bits per packed element"
        notes.append(("keys and values", f"{found['kv']['preset']}, {bits}"))
    return f"{render(table)}\n{facts(notes)}"
