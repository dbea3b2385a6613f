"""Tables of ``rotq eval pll``, ``dms``, ``contacts`` and ``decode``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rotq.report.columns import facts, make_table, render

_COLUMNS = (
    ("pseudo-ppl", "masked", "{:.4f}"),
    ("reference", "reference_masked", "{:.4f}"),
    ("one pass", "one_pass", "{:.4f}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("reference", "reference_accuracy", "{:.2%}"),
    ("KL", "kl", "{:.5f}"),
    ("top-1", "top1", "{:.2%}"),
    ("embedding cosine", "embedding_cosine", "{:.5f}"),
    ("contacts", "contact_overlap", "{:.2%}"),
)
"""Header, key, format; a column without a figure in any row is left out."""


def pll_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each group of sequences, and the protocol."""
    rows = list(groups.values())
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    table = make_table("group", "residues", *(header for header, _, _ in columns))
    for name, row in groups.items():
        cells = ["-" if row.get(key) is None else form.format(row[key]) for _, key, form in columns]
        table.add_row(name, str(row["residues"]), *cells)
    protocols = ((name, row["protocol"]) for name, row in groups.items())
    return f"{render(table)}\n{facts(protocols)}"


def dms_table(report: Mapping[str, Any]) -> str:
    """One row for each assay and score, the means, and the assay that changed most."""
    compared = any("worst_assay" in row for row in report["mean"].values())
    added = ["reference, assay", "with reference"] if compared else []
    table = make_table("assay", "variants", "score", "with assay", *added)
    fields = ["assay", *(["reference_assay", "reference"] if compared else [])]
    for name, figures in report["assays"].items():
        for kind in report["mean"]:
            cells = [_rho(figures[kind].get(field)) for field in fields]
            table.add_row(name, str(figures["variants"]), kind, *cells)
    for kind, row in report["mean"].items():
        table.add_row("mean", "", kind, *(_rho(row.get(field)) for field in fields))
    changes = (
        (
            kind,
            f"changed by {row['change']:.4f} in the mean, by {row['worst_change']:.4f} at worst: "
            f"{row['worst_assay']}",
        )
        for kind, row in report["mean"].items()
        if "worst_assay" in row
    )
    return f"{render(table)}\n{facts([('figures', 'Spearman rho'), *changes])}"


def _rho(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def contacts_table(report: Mapping[str, Any]) -> str:
    """One row for each protein and model, and the means; agreement with the reference below."""
    rows = [*report["proteins"].items(), ("mean", report["mean"])]
    ranges = list(report["mean"].get("model", {}))
    table = make_table("protein", "length", "model", *(f"{name} P@L, P@L/5" for name in ranges))
    for name, row in rows:
        for model in ("model", "reference"):
            if model in row:
                cells = [_pair(row[model][each]) for each in ranges]
                table.add_row(name, str(row.get("length", "")), model, *cells)
    agreements = (
        (
            name,
            f"{row['agreement']['overlap']:.2%} of the reference's top L, correlation "
            f"{row['agreement']['correlation']:.5f}",
        )
        for name, row in rows
        if row.get("agreement")
    )
    facts_shown = facts([("readout", report["readout"]), *agreements])
    return f"{render(table)}\n{facts_shown}" if ranges else facts_shown


def decoding_table(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], paper: Mapping[str, float]
) -> str:
    """One row for each group and cache.

    Args:
        groups: Rows of ``DecodingEvaluation``, by group.
        paper: TurboESM's own cosines, by group.
    """
    columns = ("cosine", "ppl ratio", "bytes", "bits", "paper")
    table = make_table("group", "cache", *columns)
    for name, rows in groups.items():
        for row in rows:
            known = row["cache"] == "turboesm" and name in paper
            table.add_row(
                name,
                row["cache"],
                f"{row['cosine']:.5f}",
                f"{row['ratio']:.4f}",
                f"{row['bytes']:,}",
                f"{row['bits_per_element']:.3f}",
                f"{paper[name]:.4f}" if known else "-",
            )
    notes = [
        ("bits", "per key and value element, tokens that stay whole included"),
        ("paper", "TurboESM's own cosine: ESM-2 650M, 4.5 bits, one protein of the kind"),
    ]
    return f"{render(table)}\n{facts(notes)}"


def _pair(row: Mapping[str, float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in row.values())
