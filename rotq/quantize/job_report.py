"""What a job's report says: what was made, from what, and what its parts were recorded with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from rotq.job.context import Job
from rotq.job.part_names import OUTER, OWN_TEXT, TRANSFORM, TUNING, block_part
from rotq.quantize.invariance import InvarianceCheck
from rotq.quantize.sensitivity import predicted
from rotq.quantize.setup import versions
from rotq.report import BlockResult, JobReport, LayerResult, peak_rss

FEW_TOKENS = 256
"""Routed to an expert, below which it is named in the report."""
_NAMED = 8
"""Experts that a note names, at most."""


def make_report(
    job: Job,
    check: InvarianceCheck,
    weights: Sequence[Path],
    experts: dict[str, list[int]],
    notes: tuple[str, ...],
    seconds: float,
) -> JobReport:
    """What was made, from what, and the figures that the parts were recorded with."""
    names = [job.skeleton.block_name(index) for index in range(job.skeleton.num_blocks)]
    parts = [job.folder.results(block_part(index)) for index in range(job.skeleton.num_blocks)]
    layers = tuple(_layer(layer) for part in parts for layer in part["layers"])
    outer = tuple(_layer(layer) for layer in job.folder.results(OUTER)["layers"])
    parameters = sum(prod(entry.shape) for entry in job.source.entries.values())
    total_bytes = sum(file.stat().st_size for file in weights)
    return JobReport(
        recipe=job.recipe.to_dict(),
        model=job.source.title,
        commit="" if job.source.hub is None else job.source.hub.commit,
        model_hash=job.source.fingerprint(),
        data={**described_data(job), "tokens": job.windows.num_tokens},
        versions=versions(),
        layers=layers,
        outer=outer,
        blocks=_blocks(parts),
        bits_per_weight=_bits_per_weight(layers),
        bits_per_weight_all_in=8 * total_bytes / parameters,
        bytes=total_bytes,
        original_bytes=parameters * job.plan.dtype.itemsize,
        seconds=seconds,
        peak_rss=peak_rss(),
        mixed=predicted(job),
        rotation=_rotation(check),
        transform=_recorded(job, TRANSFORM),
        importance={name: part["effective_share"] for name, part in zip(names, parts, strict=True)},
        flatness={
            f"{name}.{site}": change
            for name, part in zip(names, parts, strict=True)
            for site, change in part["flatness"].items()
        },
        experts=experts,
        codes={
            name: part["training"]
            for name, part in zip(names, parts, strict=True)
            if part["training"]
        },
        tuning=_recorded(job, TUNING),
        notes=notes,
    )


def _recorded(job: Job, name: str) -> dict[str, Any]:
    """What a step has recorded; empty where the job had no such step."""
    return job.folder.results(name) if job.folder.recorded(name) else {}


def described_data(job: Job) -> dict[str, Any]:
    """Where the calibration windows come from."""
    described = {"source": job.windows.source, "sha256": job.windows.sha256}
    if job.folder.recorded(OWN_TEXT):
        return {**described, "written": job.folder.results(OWN_TEXT)}
    return described


def _rotation(check: InvarianceCheck) -> dict[str, Any]:
    """The bases in words, their checksum, and the worst figure of the check."""
    return {
        **check.basis.description,
        "checksum": check.basis.checksum(),
        "largest_relative_difference": check.worst,
    }


def _blocks(parts: Sequence[dict[str, Any]]) -> tuple[BlockResult, ...]:
    return tuple(
        BlockResult(index=index, seconds=part["seconds"], peak_rss=part["peak_rss"])
        for index, part in enumerate(parts)
    )


def _layer(recorded: dict[str, Any]) -> LayerResult:
    return LayerResult(**{**recorded, "shape": tuple(recorded["shape"])})


def _bits_per_weight(layers: Sequence[LayerResult]) -> float:
    """Of packed layers, their scales and zero points."""
    sizes = [prod(layer.shape) for layer in layers]
    packed_bits = sum(
        layer.bits_per_weight * size for layer, size in zip(layers, sizes, strict=True)
    )
    return packed_bits / max(sum(sizes), 1)


def few_tokens(experts: dict[str, list[int]]) -> Iterator[str]:
    """A line on the experts that were routed fewer than ``FEW_TOKENS`` calibration tokens."""
    few = [
        f"{name}.{expert} ({tokens})"
        for name, routed in experts.items()
        for expert, tokens in enumerate(routed)
        if tokens < FEW_TOKENS
    ]
    if few:
        number = sum(len(routed) for routed in experts.values())
        more = f" and {len(few) - _NAMED} more (report.json)" if len(few) > _NAMED else ""
        yield (
            f"{len(few)} of {number} experts were routed fewer than {FEW_TOKENS} calibration "
            f"tokens; they were calibrated on all tokens, as every expert: "
            f"{', '.join(few[:_NAMED])}{more}"
        )


def routed_tokens(job: Job) -> dict[str, list[int]]:
    """Calibration tokens routed to each expert, by full name of the mixture."""
    return {
        f"{job.skeleton.block_name(index)}.{path}": routed
        for index in range(job.skeleton.num_blocks)
        for path, routed in job.folder.results(block_part(index)).get("routed", {}).items()
    }
