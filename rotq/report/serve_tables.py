"""What ``rotq bench serve`` measured, as text for people: a column for each cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rotq.report.columns import facts
from rotq.report.lines import size


def bench_table(found: Sequence[dict[str, Any]]) -> str:
    """Caches side by side, then the load."""
    rows = [("", [values["kv"] for values in found])]
    rows += [
        (label, [pattern.format(values[key]) for values in found])
        for label, key, pattern in (
            ("output tokens/s", "output_tokens_per_second", "{:.1f}"),
            ("all tokens/s", "total_tokens_per_second", "{:.1f}"),
        )
    ]
    for label, key in (
        ("first token, ms", "first_token"),
        ("between tokens, ms", "inter_token"),
        ("whole request, ms", "request"),
    ):
        rows.append((label + ", p50 / p90 / p99", [_milliseconds(values[key]) for values in found]))
    rows += [
        ("sequences at once", [str(values["peak_running"]) for values in found]),
        ("tokens at once", [str(values["peak_tokens"]) for values in found]),
        ("cache used", [size(values["peak_cache_bytes"]) for values in found]),
        ("bits per element, all in", [f"{values['bits_per_element']:.3f}" for values in found]),
        ("cache allocated", [size(values["cache_bytes_total"]) for values in found]),
        ("tokens it holds", [str(values["capacity_tokens"]) for values in found]),
        ("rows of a step", [str(values["rows"]) for values in found]),
    ]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(found))]
    lines = [
        "  ".join(
            [name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]
        ).rstrip()
        for name, cells in rows
    ]
    load = found[0]["load"]
    shortest = max(1, load["prompt_tokens"] // 2)
    notes = facts(
        [
            ("load", f"{load['requests']} requests of {load['clients']} clients"),
            (
                "prompts",
                f"{shortest} to {load['prompt_tokens']} random tokens, seed {load['seed']}",
            ),
            ("answers", f"{load['output_tokens']} tokens, greedy; not over HTTP"),
        ]
    )
    return "\n".join(lines) + "\n\n" + notes


def _milliseconds(times: dict[str, float]) -> str:
    return " / ".join(f"{1000 * value:.1f}" for value in times.values())
