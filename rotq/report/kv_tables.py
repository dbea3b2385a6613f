"""Calibration and evaluation of a packed KV cache as text for people."""

from __future__ import annotations

from typing import Any

from rotq.report.columns import facts
from rotq.report.lines import size

_COLUMNS = (
    ("scheme", "preset", "{}"),
    ("bits", "bits_per_element", "{:.3f}"),
    ("bytes/token", "bytes_per_token", "{:.0f}"),
    ("ppl", "ppl", "{:.3f}"),
    ("ratio", "ppl_ratio", "{:.4f}"),
    ("KL", "kl", "{:.4f}"),
    ("99.9 %", "kl_p999", "{:.3f}"),
    ("top-1", "top1", "{:.1%}"),
    ("cosine", "cosine", "{:.4f}"),
    ("worst layer", "worst", "{}"),
)


def calibration_table(found: dict[str, Any]) -> str:
    """What was written and from what."""
    windows, length = found["windows"]
    rows = [
        ("calibration", f"{found['output']}, {size(found['bytes'])}"),
        ("scheme", found["preset"]),
        ("text", f"{found['text']}, {windows} windows of {length} tokens"),
        ("model", found["model_hash"][:12]),
    ]
    if "bits" in found:
        rows.append(("bits chosen", _chosen(found["bits"])))
    if found["static_mean_layers"]:
        rows.append(("static mean", f"layers {found['static_mean_layers']}: RoPE is not known"))
    rows.extend(("note", note) for note in found["notes"])
    return facts(rows)


def _chosen(bits: list[list[int]]) -> str:
    """How many layers' keys and values have how many."""
    counts = []
    for side, of_side in zip(("keys", "values"), zip(*bits, strict=True), strict=True):
        parts = [f"{n} in {of_side.count(n)}" for n in sorted(set(of_side))]
        counts.append(f"{side} {', '.join(parts)}")
    return "; ".join(counts) + " layers"


def task_table(found: list[dict[str, Any]]) -> str:
    """A line for each cache, then what it was asked."""
    first = found[0]
    if first["task"] == "drift":
        rows = [["scheme", "median", "mean", "unchanged"]]
        for values in found:
            counts = [f"{values[name]:.1f}" for name in ("median", "mean")]
            rows.append([values["preset"], *counts, f"{values['unchanged']:.1%}"])
        asked = (
            f"{first['prompts']} prompts of {first['prompt_tokens']} tokens; tokens before the "
            f"first that differs, of {first['new_tokens']}"
        )
    else:
        rows = [["scheme", "found", *(f"at {depth:.0%}" for depth in first["depths"])]]
        for values in found:
            shares = [values["found"], *values["by_depth"]]
            rows.append([values["preset"], *(f"{share:.0%}" for share in shares)])
        asked = f"{first['prompts']} prompts of {first['seq_len']} tokens, by depth of the answer"
    return _columns(rows) + "\n" + facts([(first["task"], asked)])


def _columns(rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def evaluation_table(found: list[dict[str, Any]]) -> str:
    """A line for each scheme, then what was measured."""
    rows = [[label for label, _, _ in _COLUMNS]]
    for values in found:
        errors = values["attention_error"]
        worst = max(range(len(errors)), key=errors.__getitem__)
        shown = {**values, "worst": f"{worst} ({errors[worst]:.2g})"}
        rows.append([pattern.format(shown[key]) for _, key, pattern in _COLUMNS])
    first = found[0]
    kept = f"{first['sinks']} first and {first['recent']} last tokens kept whole"
    notes = facts(
        [
            ("unquantized ppl", f"{first['reference_ppl']:.3f}"),
            ("kept", kept),
            ("protocol", f"{first['protocol']}; {first['tokens']} tokens scored"),
        ]
    )
    return _columns(rows) + "\n" + notes
