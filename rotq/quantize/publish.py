"""The end of a job: assemble the parts, write what belongs to them, check a reload, publish."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.data import Windows
from rotq.checkpoint.export import quantization_config, write_metadata
from rotq.checkpoint.files import write_json
from rotq.checkpoint.inspection import PROVENANCE, REPORT
from rotq.checkpoint.reload import check_reload
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.scheme_writing import transformers_obstacle
from rotq.checkpoint.shards import assemble
from rotq.checkpoint.source import Source
from rotq.job.folder import OUTER, TRANSFORM, TUNING, Job, block_part
from rotq.job.plan import Plan, has_experts
from rotq.layers.online_heads import OnlineHeads
from rotq.models.skeleton import Skeleton
from rotq.recipe import Recipe
from rotq.report import BlockResult, JobReport, LayerResult, Progress, peak_rss


@dataclass(frozen=True, kw_only=True)
class Made:
    """A job whose parts are all on the disk."""

    source: Source
    skeleton: Skeleton
    recipe: Recipe
    job: Job
    plan: Plan
    windows: Windows
    dtype: torch.dtype
    down: str | None
    """Kind of R4, the online rotation before the MLP's last linear."""
    rotation: dict[str, Any]
    """Names of the rotations, checksum, and the figure of the function-preservation check."""
    probe_ids_BT: Tensor
    probe_logits_BTV: Tensor
    versions: dict[str, str]
    seconds: float
    trust_remote_code: bool
    progress: Progress


def finish(made: Made) -> JobReport:
    """Make the checkpoint, check it, give it its name.

    Raises:
        CheckFailed: a fresh process does not reproduce the quantized model's logits.
        RotqError: the disk is full, or the checkpoint does not load.
    """
    folder = made.job.checkpoint
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    names = [OUTER, *(block_part(index) for index in range(made.skeleton.num_blocks))]
    parts = [made.job.latest(name) for name in names]
    limit = int(made.recipe.output.max_shard_gb * 1e9)
    weights = assemble(parts, folder, limit, rename=made.source.stored_name)
    quantization = _quantization(made)
    stored = {entry.name for entry in read_entries(made.job.part(OUTER))}
    untied = made.skeleton.tied and f"{made.skeleton.adapter.head}.weight" in stored
    write_metadata(
        folder,
        made.source,
        quantization=quantization,
        recipe=made.recipe.to_dict(),
        provenance={},
        dtype=made.dtype,
        untied=untied,
    )
    made.progress.message("checking the checkpoint in a fresh process")
    check_reload(
        folder,
        made.probe_ids_BT,
        made.probe_logits_BTV,
        trust_remote_code=made.trust_remote_code,
    )
    report = _report(made, weights, _notes(made, quantization))
    write_json(folder / REPORT, report.to_dict())
    write_json(folder / PROVENANCE, _provenance(made, folder))
    made.job.publish()
    return report


def _quantization(made: Made) -> dict[str, Any]:
    linears = [
        name
        for name, module in made.skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and name not in made.plan.grids
    ]
    online: dict[str, str] = {}
    if made.down is not None:
        for index, block in enumerate(made.skeleton.blocks):
            prefix = made.skeleton.block_name(index)
            writers = made.skeleton.adapter.mlp_writers(block)
            online |= {f"{prefix}.{path}": made.down for path in writers}
    return quantization_config(
        made.plan.grids,
        linears,
        made.recipe.output.format,
        online,
        inputs=made.plan.inputs,
        heads=OnlineHeads(rotated=made.recipe.rotation.attention != "none", grid=made.plan.kv),
    )


def _notes(made: Made, quantization: dict[str, Any]) -> tuple[str, ...]:
    """Warnings of the plan, and what other loaders cannot do with the result."""
    obstacle = transformers_obstacle(quantization, has_experts=has_experts(made.skeleton))
    if obstacle is None:
        return made.plan.notes
    note = f"transformers cannot load this checkpoint without rotq: {obstacle}"
    made.progress.message(note)
    return (*made.plan.notes, note)


def _report(made: Made, weights: Sequence[Path], notes: tuple[str, ...]) -> JobReport:
    recorded = [made.job.results(block_part(i)) for i in range(made.skeleton.num_blocks)]
    layers = tuple(
        LayerResult(**{**layer, "shape": tuple(layer["shape"])})
        for block in recorded
        for layer in block["layers"]
    )
    sizes = [prod(layer.shape) for layer in layers]
    packed_bits = sum(
        layer.bits_per_weight * size for layer, size in zip(layers, sizes, strict=True)
    )
    parameters = sum(prod(entry.shape) for entry in made.source.entries.values())
    total_bytes = sum(file.stat().st_size for file in weights)
    return JobReport(
        recipe=made.recipe.to_dict(),
        model=str(made.source.path.name),
        model_hash=made.source.fingerprint(),
        data={
            "source": made.windows.source,
            "sha256": made.windows.sha256,
            "tokens": made.windows.num_tokens,
        },
        versions=made.versions,
        layers=layers,
        blocks=tuple(
            BlockResult(index=index, seconds=block["seconds"], peak_rss=block["peak_rss"])
            for index, block in enumerate(recorded)
        ),
        bits_per_weight=packed_bits / max(sum(sizes), 1),
        bits_per_weight_all_in=8 * total_bytes / parameters,
        bytes=total_bytes,
        original_bytes=parameters * made.dtype.itemsize,
        seconds=made.seconds,
        peak_rss=peak_rss(),
        rotation=made.rotation,
        transform=made.job.results(TRANSFORM) if made.job.recorded(TRANSFORM) else {},
        importance={
            made.skeleton.block_name(index): block["effective_share"]
            for index, block in enumerate(recorded)
        },
        flatness={
            f"{made.skeleton.block_name(index)}.{site}": change
            for index, block in enumerate(recorded)
            for site, change in block["flatness"].items()
        },
        tuning=made.job.results(TUNING) if made.job.recorded(TUNING) else {},
        notes=notes,
    )


def _provenance(made: Made, folder: Path) -> dict[str, Any]:
    files = sorted(file for file in folder.iterdir() if file.name not in (REPORT, PROVENANCE))
    return {
        "model": made.source.path.name,
        "model_hash": made.source.fingerprint(),
        "data": {"source": made.windows.source, "sha256": made.windows.sha256},
        "versions": made.versions,
        "files": {file.name: _sha256(file) for file in files},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
