"""Results as text for people: plain lines and tables of at most 80 columns.

The only place that formats numbers. Sizes in MB and GB are 10^6 and 10^9 bytes.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.report.results import Estimate, JobReport, LayerResult

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
"""Columns."""

ROTATIONS = ("residual", "value", "attention", "down")
"""Keys of the recipe's section and of the report's."""

_SHOWN_LAYERS = 5


def job_table(report: JobReport, output: Path) -> str:
    """The end of a job: what it cost, what it gained, and where it went worst and slowest."""
    rows = [("checkpoint", str(output)), *report_rows(report)]
    return facts(rows) + layer_tables(report.layers) + _notes(report.notes)


def report_rows(report: JobReport) -> list[tuple[str, str]]:
    """The figures of a job, as label and text."""
    rows = [
        ("recipe", recipe_line(report.recipe)),
        (
            "bits per weight",
            f"{report.bits_per_weight_all_in:.2f} all in, "
            f"{report.bits_per_weight:.2f} in the quantized linears",
        ),
        (
            "size",
            f"{size(report.bytes)}, {report.bytes / report.original_bytes:.1%} of "
            f"{size(report.original_bytes)}",
        ),
    ]
    if report.evaluation is not None:
        rows += evaluation_rows(report.evaluation)
    shares = report.importance.values()
    if shares and min(shares) < 1:
        worth = f"{min(shares):.0%} to {max(shares):.0%} of the calibration tokens, by block"
        rows.append(("effective sample", worth))
    rows.append(("rotation", rotation_line(report.rotation)))
    if report.transform:
        rows.append(("transform", transform_line(report.transform)))
    if report.flatness:
        rows.append(("max/rms of inputs", flatness_line(report.flatness)))
    if report.tuning:
        before, after = report.tuning["kl_first_quarter"], report.tuning["kl_last_quarter"]
        trained = f"{report.tuning['steps']} steps, KL {before:.3g} to {after:.3g} in training"
        rows.append(("tuning", trained))
    rows.append(("time", f"{duration(report.seconds)}, peak memory {size(report.peak_rss)}"))
    return rows


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """An evaluation alone."""
    return facts(evaluation_rows(evaluation))


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Perplexity, and divergence where there was a reference."""
    perplexity = f"{evaluation['ppl']:.4g}"
    if evaluation["reference_ppl"] is not None:
        perplexity += f", the original's {evaluation['reference_ppl']:.4g}"
    rows = [("perplexity", perplexity)]
    if evaluation["kl"] is not None:
        rows.append(("KL to original", f"{evaluation['kl']:.4g} nats per token"))
        rows.append(("top-1 agreement", f"{evaluation['top1']:.1%}"))
    if "text" in evaluation:
        rows.append(("on", str(evaluation["text"])))
    return [*rows, ("protocol", f"{evaluation['protocol']}; {evaluation['tokens']} tokens scored")]


def estimate_table(estimate: Estimate) -> str:
    """A dry run: layers of one name pattern on one line, then what the job needs."""
    table = _table("layer", "shape", "bits", "group", "bits/weight")
    groups: dict[tuple[str, ...], int] = {}
    for site in estimate.sites:
        key = (
            _pattern(site.name),
            f"{site.shape[0]} x {site.shape[1]}",
            str(site.bits),
            "channel" if site.group_size == -1 else str(site.group_size),
            f"{site.bits_per_weight:.3f}",
        )
        groups[key] = groups.get(key, 0) + 1
    for (name, *cells), count in groups.items():
        table.add_row(f"{name} ({count})", *cells)
    rows = [
        ("bits per weight", f"{estimate.bits_per_weight:.3f} in the quantized linears"),
        ("output", size(estimate.output_bytes)),
        ("peak memory", f"{size(estimate.peak_memory_bytes)}, estimated"),
        ("scratch disk", size(estimate.scratch_disk_bytes)),
    ]
    return _text(table) + "\n" + facts(rows)


def inspection_table(found: dict[str, Any], report: JobReport | None, verified: int | None) -> str:
    """A checkpoint's account of itself.

    Args:
        found: The dictionary of an ``Inspection``.
        report: Its report, if it has one.
        verified: Files whose sha256 was compared; None if that was not asked for.
    """
    weights = sum(num for name, num in found["files"].items() if name.endswith(".safetensors"))
    rows = [
        ("checkpoint", found["path"]),
        ("weight files", size(weights)),
        ("quantization", quantization_line(found["quantization_config"])),
    ]
    runtime = runtime_line(found["quantization_config"] or {})
    if runtime:
        rows.append(("at run time", runtime))
    if report is not None:
        rows += report_rows(report)
        rows.append(("source", f"{report.model}, sha256 {report.model_hash[:12]}"))
        data = report.data
        tokens = f"{data['tokens']} tokens, sha256 {str(data['sha256'])[:12]}"
        rows.append(("calibration", f"{data['source']}, {tokens}"))
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in report.versions.items())))
    else:
        rows.append(("report", "none: rotq did not write this checkpoint"))
    if verified is not None:
        rows.append(("verified", f"{verified} files have the sha256 they were written with"))
    if report is None:
        return facts(rows)
    return facts(rows) + layer_tables(report.layers) + _notes(report.notes)


def quantization_line(config: dict[str, Any] | None) -> str:
    """The quantization_config of a checkpoint in a few words."""
    if config is None:
        return "none"
    parts = [str(config.get("quant_method")), str(config.get("format", ""))]
    groups = config.get("config_groups") or {}
    kinds = sorted({f"{group['weights']['num_bits']} bits" for group in groups.values()})
    ignored = config.get("ignore") or []
    kept = f"{len(ignored)} modules kept" if ignored else ""
    return ", ".join(part for part in (*parts, *kinds, kept) if part)


def flatness_line(flatness: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """max/rms of each kind of site, median over blocks, before and after the rotations."""
    kinds: dict[str, list[dict[str, dict[str, float | None]]]] = {}
    for name, change in flatness.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(change)
    parts = []
    for kind, changes in kinds.items():
        before, after = (
            statistics.median(change[when]["max_over_rms"] or 0.0 for change in changes)
            for when in ("before", "after")
        )
        parts.append(f"{kind} {before:.1f} to {after:.1f}")
    return ", ".join(parts)


def runtime_line(config: dict[str, Any]) -> str:
    """What a quantization_config asks of the runtime besides packed weights; empty for nothing."""
    groups = (config.get("config_groups") or {}).values()
    inputs = {_rounding(group.get("input_activations"), "token") for group in groups} - {""}
    attention = config.get("attention") or {}
    heads = _rounding(attention.get("kv_cache"), "head and token")
    turned = [f"{kind} before {len(t)} targets" for kind, t in (config.get("online") or {}).items()]
    parts = [
        *(f"inputs {rounding}" for rounding in sorted(inputs)),
        *([f"keys and values {heads}"] if heads else []),
        *([f"{attention['rotation']} on queries and keys"] if attention.get("rotation") else []),
        *turned,
    ]
    return "; ".join(parts)


def _rounding(args: dict[str, Any] | None, per: str) -> str:
    if not args:
        return ""
    kind = "symmetric" if args["symmetric"] else "asymmetric"
    return f"{args['num_bits']} bits {kind} per {per}"


def rotation_line(rotation: dict[str, Any]) -> str:
    """What was rotated, and how well the function was preserved."""
    built = [f"{name} {rotation[name]}" for name in ROTATIONS if name in rotation]
    difference = rotation.get("largest_relative_difference")
    if not built:
        return "none"
    kept = "" if difference is None else f"; logits kept to {difference:.1e}"
    return ", ".join(built) + kept


def transform_line(transform: dict[str, Any]) -> str:
    """How the rotations were found: losses and angles, or candidates and their scores."""
    if "scores" in transform:
        scores = ", ".join(f"{name} {score:.4g}" for name, score in transform["scores"].items())
        return f"{transform['chosen']}, by {transform['judge']} of {scores}"
    parts = [str(transform["method"])]
    for name in ("layers", "model", "optrot"):
        if name in transform:
            phase = transform[name]
            before, after = phase["loss_first_quarter"], phase["loss_last_quarter"]
            parts.append(f"{phase['steps']} steps, loss {before:.3g} to {after:.3g}")
    if "residual_angle" in transform:
        parts.append(f"R1 turned by {transform['residual_angle']:.3f} rad")
    return ", ".join(parts)


def recipe_line(recipe: dict[str, Any]) -> str:
    """A recipe in a few words."""
    weights, rotation = recipe["weights"], recipe["rotation"]
    group = weights["group_size"]
    turned = [name for name in ROTATIONS if rotation.get(name, "none") != "none"]
    parts = [
        f"{weights['bits']} bits",
        "per channel" if group == -1 else f"group {group}",
        "symmetric" if weights["symmetric"] else "asymmetric",
        *(
            f"{label}{recipe[key]['bits']}"
            for label, key in (("A", "activations"), ("KV", "kv_cache"))
            if recipe.get(key, {}).get("bits", 16) != 16
        ),
        recipe["solver"]["method"],
        *(["rotated " + "+".join(turned)] if turned else []),
    ]
    return f"{recipe['name']}: {', '.join(parts)}"


def size(num_bytes: float) -> str:
    """Bytes in MB or GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and texts in two columns; long texts wrap under their own column."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, text)
    return _text(table)


def layer_tables(layers: Sequence[LayerResult]) -> str:
    """The layers with the largest relative error, and the slowest ones."""
    if not layers:
        return ""
    worst = _table("worst layers", "relative error", "loss", "bits")
    for layer in sorted(layers, key=lambda layer: -layer.relative_error)[:_SHOWN_LAYERS]:
        error = f"{layer.relative_error:.3%}"
        worst.add_row(layer.name, error, f"{layer.loss:.3g}", f"{layer.bits_per_weight:.2f}")
    slowest = _table("slowest layers", "seconds", "shape")
    for layer in sorted(layers, key=lambda layer: -layer.seconds)[:_SHOWN_LAYERS]:
        slowest.add_row(layer.name, f"{layer.seconds:.2f}", "{} x {}".format(*layer.shape))
    return f"\n{_text(worst)}\n{_text(slowest)}"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f"note: {note}\n" for note in notes)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _table(*headers: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    return table


def _text(table: Table) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH, color_system=None, highlight=False)
    console.print(table)
    lines = buffer.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)
