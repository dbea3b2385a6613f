"""The end of a job: assemble the parts, write what belongs to them, check a reload, publish."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rotq.checkpoint.card_figures import add_figures
from rotq.checkpoint.exl3_writing import exl3_config, write_storage
from rotq.checkpoint.export import quantization_config, write_metadata
from rotq.checkpoint.files import write_json
from rotq.checkpoint.inspection import PROVENANCE, REPORT
from rotq.checkpoint.obstacle import loading_obstacle
from rotq.checkpoint.reload import check_reload
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import assemble
from rotq.checkpoint.source import read_tensors
from rotq.disk.files import make_folder, remove, sha256_of
from rotq.errors import RotqError
from rotq.formats.floats import is_plain
from rotq.fusion.maps import online_layers
from rotq.job.context import Job
from rotq.job.part_names import KEPT, OUTER, block_part
from rotq.job.parts import packed_layers, restored_outer
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.quant_embedding import shared_product
from rotq.models.outer import Head
from rotq.phases import phase
from rotq.quantize.invariance import InvarianceCheck
from rotq.quantize.job_report import described_data, few_tokens, make_report, routed_tokens
from rotq.quantize.setup import versions
from rotq.report import JobReport
from rotq.report.lines import larger_line
from rotq.rotations.basis import Basis


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
        dtype=job.plan.dtype,
        untied=_is_untied(job),
        obstacle=obstacle,
    )
    if job.recipe.output.format == "exl3":
        write_storage(folder, weights, quantization)
    job.progress.message("checking the checkpoint in a fresh process")
    logits_BTV = check.logits(_head_tensors(job), _shared_head(job))
    check_reload(folder, check.ids_BT, logits_BTV, trust_remote_code=trust_remote_code)
    experts = routed_tokens(job)
    notes = (*job.plan.notes, *_new_notes(job, obstacle, experts, weights))
    report = make_report(job, check, weights, experts, notes, seconds)
    add_figures(folder, report)
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


@phase("packing")
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
    limit = int(job.recipe.output.max_shard_gb * 1e9)
    parts = [job.folder.latest(name) for name in names]
    parts += [job.folder.part(KEPT)] if job.folder.recorded(KEPT) else []
    return assemble(parts, folder, limit, rename=functools.partial(_stored_name, job))


def _stored_name(job: Job, name: str) -> str:
    """A part's tensor in the checkpoint."""
    layer, stored = name.removesuffix(".weight_packed"), job.source.stored_name(name)
    return stored.removesuffix("_packed") if is_plain(job.plan.grids.get(layer)) else stored


def _head_tensors(job: Job) -> dict[str, Tensor]:
    """What makes logits, outside the blocks: no embedding where the head is another tensor."""
    skeleton, part, dtype = job.skeleton, job.folder.latest(OUTER), job.plan.dtype
    if not skeleton.own_head or skeleton.adapter.is_generic:
        return restored_outer(job, part, dtype=dtype)
    embedding = f"{skeleton.adapter.embedding}.weight"
    return skeleton.head_alone(restored_outer(job, part, without=embedding, dtype=dtype))


def _shared_head(job: Job) -> Head | None:
    """The product of a head that shares a packed embedding, as the checkpoint's model has it."""
    name = job.skeleton.adapter.embedding
    if name not in job.plan.outer or not job.skeleton.tied or _is_untied(job):
        return None
    table = packed_layers(job.plan, read_tensors(job.folder.latest(OUTER)))[name]
    return functools.partial(shared_product, table)


def _is_untied(job: Job) -> bool:
    """Whether the rotation has given a head of its own to a model that shared its embedding."""
    stored = {entry.name for entry in read_entries(job.folder.part(OUTER))}
    head = f"{job.skeleton.adapter.head}.weight"
    return job.skeleton.tied and bool({head, f"{head}_packed"} & stored)


def _quantization(job: Job, basis: Basis) -> dict[str, Any]:
    """The config's section: grids, layers that are kept, what happens at run time."""
    if job.recipe.output.format == "exl3":
        return exl3_config(job.plan.grids, job.plan.shapes, job.recipe.calibration)
    adapter, outer = job.skeleton.adapter, job.plan.outer
    packed = {*job.plan.grids, *outer}
    if _shared_head(job) is not None:
        packed.add(adapter.head)
    linears = [
        name
        for name, module in job.skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and name not in packed
    ]
    rotated = [
        f"{job.skeleton.block_name(index)}.{path}"
        for index, block in enumerate(job.skeleton.blocks)
        for path in online_layers(block, adapter, basis)
    ]
    return quantization_config(
        job.plan.grids,
        linears,
        job.recipe.output.format,
        rotated,
        block_size=basis.down_block_size,
        turns_residual=basis.ends is not None,
        outer=outer,
        inputs=job.plan.inputs,
        heads=OnlineHeads(rotated=job.recipe.rotation.attention != "none", grid=job.plan.kv),
        prefix=str(job.skeleton.model.base_model_prefix),
        stored_name=job.source.stored_name,
    )


def _new_notes(
    job: Job, obstacle: str | None, experts: dict[str, list[int]], weights: Sequence[Path]
) -> Iterator[str]:
    """What other loaders cannot do with the result, and which experts saw little; told too.

    And that nothing was saved, where the source was quantized, too.
    """
    notes = list(few_tokens(experts))
    larger = larger_line(
        sum(file.stat().st_size for file in weights),
        job.source.quantized_bytes,
        is_packed=bool(job.plan.outer),
    )
    if larger is not None:
        notes.append(larger)
    if obstacle is not None:
        notes.append(f"transformers cannot load this checkpoint without rotq: {obstacle}")
    if job.recipe.output.format == "rotq":
        notes.append("transformers loads the rotq format where rotq is installed, and nowhere else")
    if job.recipe.output.format == "exl3":
        notes.append(
            "transformers loads EXL3 where rotq or exllamav3 is installed, and makes it dense"
        )
    for note in notes:
        job.progress.message(note)
        yield note


@phase("packing")
def _provenance(job: Job, folder: Path) -> dict[str, Any]:
    own = (folder / REPORT, folder / PROVENANCE)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in own)
    return {
        "model": job.source.title,
        **({} if job.source.hub is None else {"commit": job.source.hub.commit}),
        "model_hash": job.source.fingerprint(),
        "data": described_data(job),
        "versions": versions(),
        "files": {file.relative_to(folder).as_posix(): sha256_of(file) for file in files},
    }
