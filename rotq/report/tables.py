"""Results of a job as text for people: what it cost, what it would cost, what a checkpoint is."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rotq.report.columns import facts, make_table, printable, render
from rotq.report.lines import (
    duration,
    flatness_line,
    outer_line,
    quantization_line,
    recipe_line,
    rotation_line,
    runtime_line,
    size,
    transform_line,
)
from rotq.report.results import Estimate, JobReport, LayerResult, SiteEstimate

_SHOWN_LAYERS = 5


def job_table(report: JobReport, output: Path) -> str:
    """The end of a job: what it cost, what it gained, and where it went worst and slowest."""
    rows = [("checkpoint", str(output)), *report_rows(report)]
    return facts(rows) + bits_table(report) + layer_tables(report.layers) + _notes(report.notes)


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
    if report.outer:
        rows.append(("outside the blocks", outer_line([asdict(layer) for layer in report.outer])))
    if report.mixed:
        predicted = f"{report.mixed['predicted_kl']:.3g} nats per token predicted"
        rows.append(("bits chosen", f"for {report.mixed['average_bits']:g}; {predicted}"))
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
    if report.codes:
        first, last = (
            sum(losses[key] for losses in report.codes.values()) / len(report.codes)
            for key in ("loss_first", "loss_last")
        )
        rows.append(("codes", f"trained; error of a block's output {first:.3g} to {last:.3g}"))
    if report.tuning:
        before, after = report.tuning["kl_first_quarter"], report.tuning["kl_last_quarter"]
        trained = f"{report.tuning['steps']} steps, KL {before:.3g} to {after:.3g} in training"
        rows.append(("tuning", trained))
    rows.append(("time", f"{duration(report.seconds)}, peak memory {size(report.peak_rss)}"))
    return rows


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """The figures of ``rotq eval ppl``, one below the other."""
    return facts(evaluation_rows(evaluation))


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Perplexity, and divergence where there was a reference."""
    perplexity = f"{evaluation['ppl']:.4g}"
    if evaluation["reference_ppl"] is not None:
        perplexity += f", the original's {evaluation['reference_ppl']:.4g}"
    rows = [("perplexity", perplexity)]
    if evaluation["kl"] is not None:
        rows.append(("KL to original", f"{evaluation['kl']:.4g} nats per token"))
        if evaluation.get("kl_p99") is not None:
            figures = ", ".join(f"{evaluation[key]:.4g}" for key in ("kl_p50", "kl_p99", "kl_p999"))
            rows.append(("50, 99, 99.9 % of KL", figures))
        rows.append(("top-1 agreement", f"{evaluation['top1']:.1%}"))
    if "kv" in evaluation:
        rows.append(("keys and values", _packed_line(evaluation["kv"])))
    if "text" in evaluation:
        rows.append(("on", str(evaluation["text"])))
    return [*rows, ("protocol", f"{evaluation['protocol']}; {evaluation['tokens']} tokens scored")]


def _packed_line(kv: dict[str, Any]) -> str:
    errors = kv["attention_error"]
    worst = max(range(len(errors)), key=errors.__getitem__)
    return (
        f"{kv['preset']}, {kv['bits_per_packed_element']:.3f} bits per packed element; "
        f"worst attention in layer {worst}, relative error {errors[worst]:.2g}"
    )


def estimate_table(estimate: Estimate) -> str:
    """A dry run: layers of one name pattern on one line, then what the job needs."""
    table = make_table("layer", "shape", "bits", "group", "bits/weight")
    groups: dict[tuple[str, ...], int] = {}
    for site in estimate.sites:
        key = (
            _pattern(site.name),
            f"{site.shape[0]} x {site.shape[1]}",
            *_grid_cells(site),
        )
        groups[key] = groups.get(key, 0) + 1
    for (name, *cells), count in groups.items():
        table.add_row(f"{name} ({count})", *cells)
    chosen = ""
    if estimate.limits is not None:
        least, most = estimate.limits
        chosen = f", of {least:.3f} to {most:.3f} that can be chosen"
    rows = [
        ("bits per weight", f"{estimate.bits_per_weight:.3f} in the quantized linears{chosen}"),
        ("output", size(estimate.output_bytes)),
        ("peak memory", _memory_line(estimate)),
        ("scratch disk", size(estimate.scratch_disk_bytes)),
        *([("time", _time_line(estimate))] if estimate.seconds else []),
    ]
    return render(table) + "\n" + facts(rows) + _notes(estimate.notes)


def _memory_line(estimate: Estimate) -> str:
    steps = list(estimate.memory_steps.items())[2:]
    largest = f", in {max(steps, key=lambda step: step[1])[0]}" if steps else ""
    return f"{size(estimate.peak_memory_bytes)}, estimated{largest}"


def _time_line(estimate: Estimate) -> str:
    """Processor time, what passes where nothing else runs, and the dearest phases."""
    total = sum(estimate.seconds.values())
    dearest = sorted(estimate.seconds.items(), key=lambda phase: -phase[1])[:3]
    shares = ", ".join(f"{phase} {spent / total:.0%}" for phase, spent in dearest)
    return (
        f"{duration(total)} of processors, {duration(estimate.wall_seconds or total)} if nothing "
        f"else runs: {shares}"
    )


def _grid_cells(site: SiteEstimate) -> tuple[str, str, str]:
    """Bits, group and bits per weight of a planned layer, or what it chooses from."""
    if not site.choices:
        return str(site.bits), _group(site.group_size), f"{site.bits_per_weight:.3f}"
    bits = sorted({bits for bits, _ in site.choices})
    sizes = sorted({size for _, size in site.choices}, key=lambda size: (size > 0, -size))
    return (
        ", ".join(map(str, bits)),
        ", ".join(map(_group, sizes)),
        f"{site.bits_per_weight:.3f} and more",
    )


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
        commit = f" at commit {report.commit}" if report.commit else ""
        rows.append(("source", f"{report.model}{commit}, sha256 {report.model_hash[:12]}"))
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
    return facts(rows) + bits_table(report) + layer_tables(report.layers) + _notes(report.notes)


def bits_table(report: JobReport) -> str:
    """The bits that each kind of layer was given, block by block; empty where all have the same."""
    if not report.mixed:
        return ""
    kinds: dict[str, list[LayerResult]] = {}
    for layer in report.layers:
        kinds.setdefault(_pattern(layer.name), []).append(layer)
    table = make_table("layer", "bits, block by block", "columns per scale")
    for name, layers in kinds.items():
        bits = "".join(str(layer.bits) for layer in layers)
        sizes = collections.Counter(layer.group_size for layer in layers)
        table.add_row(
            name,
            " ".join(bits[start : start + 10] for start in range(0, len(bits), 10)),
            ", ".join(f"{num} x {_group(group)}" for group, num in sorted(sizes.items())),
        )
    return "\n" + render(table)


def _group(group_size: int) -> str:
    return "channel" if group_size == -1 else str(group_size)


def layer_tables(layers: Sequence[LayerResult]) -> str:
    """The layers with the largest relative error, and the slowest ones."""
    if not layers:
        return ""
    worst = make_table("worst layers", "relative error", "loss", "bits")
    for layer in sorted(layers, key=lambda layer: -layer.relative_error)[:_SHOWN_LAYERS]:
        error = f"{layer.relative_error:.3%}"
        worst.add_row(layer.name, error, f"{layer.loss:.3g}", f"{layer.bits_per_weight:.2f}")
    slowest = make_table("slowest layers", "seconds", "shape")
    for layer in sorted(layers, key=lambda layer: -layer.seconds)[:_SHOWN_LAYERS]:
        slowest.add_row(layer.name, f"{layer.seconds:.2f}", "{} x {}".format(*layer.shape))
    return f"\n{render(worst)}\n{render(slowest)}"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f"note: {printable(str(note))}\n" for note in notes)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
