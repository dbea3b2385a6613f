"""A recording of a job's phases as a table, and as a trace for ``chrome://tracing`` or Perfetto."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rotq.disk.destination import Inputs, file_to_write
from rotq.disk.files import whole_file
from rotq.phases import Recording, Span, costs
from rotq.report.columns import make_table, render

WRITER = "rotq quantize --profile"
"""Stands in a trace, which rotq then replaces."""


def trace_file(file: Path, inputs: Inputs) -> Path:
    """Where the trace goes.

    Raises:
        RotqError: it cannot be written, or would replace what is no trace of rotq's.
    """
    return file_to_write(file, inputs, _foreign)


def write_trace(recording: Recording, file: Path) -> None:
    """The spans, in the trace event format of Chrome: complete events, microseconds.

    Args:
        file: From ``trace_file``.
    """
    events = [_event(span) for span in sorted(recording.spans, key=lambda span: span.number)]
    document = {"otherData": {"writer": WRITER}, "displayTimeUnit": "ms", "traceEvents": events}
    with whole_file(file) as handle:
        handle.write(json.dumps(document).encode())


def profile_table(recording: Recording) -> str:
    """Phase by phase what is spent in it and in none inside it, the longest first."""
    table = make_table("phase", "calls", "wall s", "share", "CPU s", "peak +MB")
    found = costs(recording.spans)
    total = sum(cost.wall for cost in found.values())
    for name, cost in found.items():
        table.add_row(
            name,
            str(cost.calls),
            f"{cost.wall:.2f}",
            f"{cost.wall / max(total, 1e-9):.1%}",
            f"{cost.cpu:.2f}",
            f"{cost.raised / 1e6:.0f}",
        )
    cpu, raised = (sum(getattr(cost, key) for cost in found.values()) for key in ("cpu", "raised"))
    table.add_section()
    table.add_row("all", "", f"{total:.2f}", "", f"{cpu:.2f}", f"{raised / 1e6:.0f}")
    return render(table)


def _event(span: Span) -> dict[str, Any]:
    return {
        "name": span.name,
        "ph": "X",
        "ts": round(1e6 * span.start),
        "dur": round(1e6 * (span.end - span.start)),
        "pid": os.getpid(),
        "tid": span.thread,
        "args": {"cpu_s": round(span.cpu, 6), "peak_raised_bytes": span.raised},
    }


def _foreign(path: Path) -> str | None:
    """What keeps a file from being replaced."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return "is no trace of rotq's"
    other = document.get("otherData") if isinstance(document, dict) else None
    is_own = isinstance(other, dict) and other.get("writer") == WRITER
    return None if is_own else "is no trace of rotq's"
