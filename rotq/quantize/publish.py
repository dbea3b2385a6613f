"""The end of a job: assemble the parts, write what belongs to them, check a reload, publish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rotq.checkpoint.export import quantization_config, write_metadata
from rotq.checkpoint.files import write_json
from rotq.checkpoint.inspection import PROVENANCE, REPORT
from rotq.checkpoint.obstacle import loading_obstacle
from rotq.checkpoint.reload import check_reload
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import assemble
from rotq.checkpoint.source import read_tensor
from rotq.disk.files import make_folder, remove, sha256_of
from rotq.errors import RotqError
from rotq.job.context import Job
from rotq.job.folder import KEPT, OUTER, TRANSFORM, TUNING, block_part
from rotq.layers.online_heads import OnlineHeads
from rotq.quantize.invariance import InvarianceCheck
from rotq.quantize.setup import versions
from rotq.report import BlockResult, JobReport, LayerResult, peak_rss
from rotq.rotations.basis import Basis

FEW_TOKENS = 256
"""Routed to an expert, below which it is named in the report."""
_NAMED = 8
"""Experts that a note names, at most."""


def publish(
    job: Job, check: InvarianceCheck, *, seconds: float, trust_remote_code: bool
) -> JobReport:
    """Make the checkpoint, check it, give it its name.

    Args:
        job: All of its parts are on the disk.
        check: Behind the last block.
        seconds: That the job took.
        trust_remote_code: For the process that loads the checkpoint.

    Raises:
        CheckFailed: a fresh process does not reproduce the quantized model's logits.
        RotqError: the disk is full, the checkpoint does not load, a part is not as it was written,
            or the model's tokenizer or code was changed meanwhile.
    """
    folder = job.folder.checkpoint
    _check_unchanged(job)
    weights = _assemble(job, folder)
    quantization = _quantization(job, check.basis)
    obstacle = loading_obstacle(job.skeleton, quantization, job.plan.grids, job.source.stored_name)
    write_metadata(
        folder,
        job.source,
        quantization=quantization,
        recipe=job.recipe.to_dict(),
        provenance={},
        dtype=job.dtype,
        untied=_is_untied(job),
        obstacle=obstacle,
    )
    job.progress.message("checking the checkpoint in a fresh process")
    logits_BTV = check.logits(_outer(job))
    check_reload(folder, check.ids_BT, logits_BTV, trust_remote_code=trust_remote_code)
    experts = _experts(job)
    notes = (*job.plan.notes, *_new_notes(job, obstacle, experts))
    report = _report(job, check, weights, experts, notes, seconds)
    write_json(folder / REPORT, report.to_dict())
    write_json(folder / PROVENANCE, _provenance(job, folder))
    job.folder.publish()
    return report


def _check_unchanged(job: Job) -> None:
    """What travels with the weights, or decided them, is as the job's fingerprint has it."""
    before, now = job.folder.fingerprint, job.source.deciding_files()
    for name in sorted({*now, *(key for key in before if "." in key)}):
        if before.get(name) != now.get(name):
            raise RotqError(f"{job.source.path / name} was changed while the job ran; put it back")


def _assemble(job: Job, folder: Path) -> list[Path]:
    """The shards of the checkpoint, in a new folder, under the names of the source.

    Raises:
        CheckFailed: a part is not as it was written.
        RotqError: the disk is full.
    """
    job.folder.verify()
    remove(folder)
    make_folder(folder)
    names = [OUTER, *(block_part(index) for index in range(job.skeleton.num_blocks))]
    names += [KEPT] if job.folder.recorded(KEPT) else []
    limit = int(job.recipe.output.max_shard_gb * 1e9)
    parts = [job.folder.latest(name) for name in names]
    return assemble(parts, folder, limit, rename=job.source.stored_name)


def _outer(job: Job) -> dict[str, Tensor]:
    """Tensors outside the blocks, as they are in the checkpoint."""
    entries = read_entries(job.folder.latest(OUTER))
    return {entry.name: read_tensor(entry) for entry in entries}


def _is_untied(job: Job) -> bool:
    """Whether the rotation has given a head of its own to a model that shared its embedding."""
    stored = {entry.name for entry in read_entries(job.folder.part(OUTER))}
    return job.skeleton.tied and f"{job.skeleton.adapter.head}.weight" in stored


def _quantization(job: Job, basis: Basis) -> dict[str, Any]:
    """The config's section: grids, layers that are kept, what happens at run time."""
    linears = [
        name
        for name, module in job.skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and name not in job.plan.grids
    ]
    rotated: list[str] = []
    if basis.down is not None:
        for index, block in enumerate(job.skeleton.blocks):
            prefix = job.skeleton.block_name(index)
            writers = job.skeleton.adapter.mlp_writers(block)
            rotated += [f"{prefix}.{path}" for path in writers]
    return quantization_config(
        job.plan.grids,
        linears,
        job.recipe.output.format,
        rotated,
        inputs=job.plan.inputs,
        heads=OnlineHeads(rotated=job.recipe.rotation.attention != "none", grid=job.plan.kv),
        prefix=str(job.skeleton.model.base_model_prefix),
    )


def _new_notes(job: Job, obstacle: str | None, experts: dict[str, list[int]]) -> Iterator[str]:
    """What other loaders cannot do with the result, and which experts saw little; told too."""
    notes = list(few_tokens(experts))
    if obstacle is not None:
        notes.append(f"transformers cannot load this checkpoint without rotq: {obstacle}")
    if job.recipe.output.format == "rotq":
        notes.append("transformers loads the rotq format where rotq is installed, and nowhere else")
    for note in notes:
        job.progress.message(note)
        yield note


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


def _experts(job: Job) -> dict[str, list[int]]:
    """Calibration tokens routed to each expert, by full name of the mixture."""
    return {
        f"{job.skeleton.block_name(index)}.{path}": routed
        for index in range(job.skeleton.num_blocks)
        for path, routed in job.folder.results(block_part(index)).get("routed", {}).items()
    }


def _report(
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
    parameters = sum(prod(entry.shape) for entry in job.source.entries.values())
    total_bytes = sum(file.stat().st_size for file in weights)
    return JobReport(
        recipe=job.recipe.to_dict(),
        model=job.source.title,
        commit="" if job.source.hub is None else job.source.hub.commit,
        model_hash=job.source.fingerprint(),
        data={**_data(job), "tokens": job.windows.num_tokens},
        versions=versions(),
        layers=layers,
        blocks=_blocks(parts),
        bits_per_weight=_bits_per_weight(layers),
        bits_per_weight_all_in=8 * total_bytes / parameters,
        bytes=total_bytes,
        original_bytes=parameters * job.dtype.itemsize,
        seconds=seconds,
        peak_rss=peak_rss(),
        rotation=_rotation(check),
        transform=_recorded(job, TRANSFORM),
        importance={name: part["effective_share"] for name, part in zip(names, parts, strict=True)},
        flatness={
            f"{name}.{site}": change
            for name, part in zip(names, parts, strict=True)
            for site, change in part["flatness"].items()
        },
        experts=experts,
        tuning=_recorded(job, TUNING),
        notes=notes,
    )


def _recorded(job: Job, name: str) -> dict[str, Any]:
    """What a step has recorded; empty where the job had no such step."""
    return job.folder.results(name) if job.folder.recorded(name) else {}


def _data(job: Job) -> dict[str, Any]:
    """Where the calibration windows come from."""
    return {"source": job.windows.source, "sha256": job.windows.sha256}


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


def _provenance(job: Job, folder: Path) -> dict[str, Any]:
    own = (folder / REPORT, folder / PROVENANCE)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in own)
    return {
        "model": job.source.title,
        **({} if job.source.hub is None else {"commit": job.source.hub.commit}),
        "model_hash": job.source.fingerprint(),
        "data": _data(job),
        "versions": versions(),
        "files": {file.relative_to(folder).as_posix(): sha256_of(file) for file in files},
    }
