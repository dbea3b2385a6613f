"""The whole job: calibrate -> rotate -> weigh -> round -> pack, block by block -> tune -> check.

One block of the model is in memory at a time. For each block: load in fp64, rotate and check that
the function is preserved, quantize its layers on the two activation streams, write its part, and
pass the streams on. A job that was stopped continues after its last part; the streams are
recomputed, so that the result has the same bytes as an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotq.calibration.streams import Streams
from rotq.checkpoint.files import read_json
from rotq.checkpoint.inspection import REPORT
from rotq.checkpoint.location import Location, ModelName, locate
from rotq.disk.destination import Inputs
from rotq.errors import Stopped
from rotq.job.context import Job
from rotq.job.folder import JobFolder
from rotq.job.opening import find_place, job_inputs, open_folder
from rotq.job.part_names import TUNING, block_part
from rotq.job.parts import restored_block
from rotq.memory import release_memory, settled_objects
from rotq.quantize.block_quantizer import BlockQuantizer
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.gradients import GradientPass
from rotq.quantize.invariance import InvarianceCheck
from rotq.quantize.kept import copy_kept, find_kept
from rotq.quantize.own_text import with_own_text
from rotq.quantize.publish import publish
from rotq.quantize.quantized_block import save_block
from rotq.quantize.rotated_model import RotatedModel
from rotq.quantize.sensitivity import choose_grids
from rotq.quantize.setup import fingerprint, setup
from rotq.ranks import ALONE, Ranks
from rotq.recipe import Recipe
from rotq.report import JobReport, Progress, peak_rss
from rotq.rotations.basis import Basis
from rotq.transform.search import search_basis
from rotq.tuning.train import hollow, tune


def quantize_model(
    model: ModelName,
    recipe: Recipe,
    output: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resume: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    inputs: Inputs | None = None,
    ranks: Ranks | None = None,
    settled: Callable[[Path, bool], None] | None = None,
) -> JobReport:
    """Quantize a checkpoint folder, a GGUF file or a model of the hub into ``output``.

    Args:
        model: Dense Hugging Face checkpoint; only read. Of a hub id, ``ORG/NAME[@REVISION]``, the
            weights are fetched once nothing else is left to refuse.
        recipe: What to do.
        output: Created; while the job runs its files are in ``output`` + ".partial". A link is
            resolved first.
        device: Where blocks run and are solved, as ``choose_device`` takes it.
        dtype: Of activations and of what stays dense: "auto" is the checkpoint's.
        resume: "auto", "required" or "never", see ``find_place``.
        overwrite: Replace an existing ``output``, empty or written by rotq, once the new one is
            complete.
        trust_remote_code: Let transformers run code that comes with the model.
        progress: Listener.
        inputs: What the caller reads besides, see ``find_place``: it is never replaced.
        ranks: The processes that call this with the same arguments; alone where left out. Only
            the leader writes, tells and refuses before the work.
        settled: Called before the first block, once all that can be refused was; told the folder
            with the dense model, which a GGUF file was converted to, and whether the job is new.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        ValueError: the recipe does not fit the model (a group size that does not divide).
        RotqError: model, text, disk, device or an existing output are not as they must be.
        CheckFailed: the rotated model or the reloaded checkpoint is not the same function.
        Stopped: interrupted; the job can be resumed.
    """
    started, progress, ranks = time.monotonic(), progress or Progress(), ranks or ALONE
    found = locate(model)
    options = {
        "device": ranks.device(device),
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    if not ranks.leads:
        return _follow(found, recipe, ranks, **options)
    reads = job_inputs(found.path, recipe, inputs or {})
    place = find_place(output, resume=resume, overwrite=overwrite, inputs=reads)
    opened = open_folder(place, resume=resume, overwrite=overwrite, tell=progress.message)
    with opened as folder, torch.no_grad():
        try:
            job, drawn = setup(found, recipe, folder, ranks=ranks, progress=progress, **options)
            if settled is not None:
                settled(job.source.path, folder.is_new)
            folder.claim(fingerprint(job, trust_remote_code=trust_remote_code))
            if ranks.told(lambda: (folder.path, folder.output, folder.is_published))[-1]:
                return ranks.told(lambda: _finished_report(folder))
            job, check = _made(job, drawn, trust_remote_code)
            seconds = time.monotonic() - started
            return ranks.told(
                lambda: publish(job, check, seconds=seconds, trust_remote_code=trust_remote_code)
            )
        except KeyboardInterrupt:
            kept = f" finished blocks are kept in {folder.path}," if folder.claimed else ""
            there = " from there" if folder.claimed else ""
            raise Stopped(f"stopped;{kept} the same command continues{there}") from None


def _follow(model: Location, recipe: Recipe, ranks: Ranks, **options: Any) -> JobReport:
    """This process's share of a job that another one leads, whose report is returned."""
    path, output, is_published = ranks.told(_asked_of_the_leader)
    if not is_published:
        folder = JobFolder(path, output)
        job, drawn = setup(model, recipe, folder, ranks=ranks, progress=Progress(), **options)
        with torch.no_grad():
            _made(job, drawn, options["trust_remote_code"])
    return ranks.told(_asked_of_the_leader)


def _asked_of_the_leader() -> Any:
    raise AssertionError("only the leader answers")


def _made(job: Job, drawn: Basis, trust_remote_code: bool) -> tuple[Job, InvarianceCheck]:
    """See ``_quantize``; what the model is to write itself is written first."""
    with settled_objects():
        return _quantize(with_own_text(job, trust_remote_code=trust_remote_code), drawn)


def _finished_report(folder: JobFolder) -> JobReport:
    """Of a job that was killed after its checkpoint had its name; what it left is removed."""
    report = JobReport.from_dict(read_json(folder.output / REPORT))
    folder.leave()
    return report


def _quantize(job: Job, drawn: Basis) -> tuple[Job, InvarianceCheck]:
    """Every part of the checkpoint, on the disk.

    Args:
        drawn: Where the search for the basis starts.

    Returns:
        The job with the grids that were chosen, and the check that went through all of its parts.
    """
    rotated = RotatedModel(job, search_basis(job, drawn))
    kept = find_kept(job.source, job.skeleton, rotated=drawn.turns_outer)
    if job.ranks.leads:
        copy_kept(kept, job.source, job.folder, rotated.basis)
    streams = BlockRunner(job).start(*rotated.outer())
    release_memory()
    if streams is not None and job.recipe.needs_gradients:
        GradientPass(job, rotated).run(streams.quantized)
        job = choose_grids(job)
    quantizer = BlockQuantizer(job)
    structure: list[nn.Module] = []
    for index in range(job.skeleton.num_blocks):
        started = time.monotonic()
        job.progress.block_started(index, job.skeleton.num_blocks)
        structure.append(hollow(_finished_block(index, rotated, quantizer, streams)))
        release_memory()
        job.progress.block_done(index, time.monotonic() - started, peak_rss())
    rotated.check.check_head()
    if job.recipe.tuning.steps:
        assert streams is not None, "a job that tunes needs data"
        _tune(job, structure, streams, rotated)
    return job, rotated.check


def _finished_block(
    index: int, rotated: RotatedModel, quantizer: BlockQuantizer, streams: Streams | None
) -> nn.Module:
    """A block rotated, quantized and saved, or as the part of an earlier run has it.

    Check and streams are behind it then.
    """
    started, job, part = time.monotonic(), quantizer.job, block_part(index)
    original, flatness = rotated.block(index)
    if job.finished(part):
        finished = restored_block(job, job.folder.part(part), index, original)
        if streams is not None and streams.original is not None:
            quantizer.runner.advance(index, original, streams.original)
    else:
        quantized = quantizer.quantize(index, original, streams)
        finished = quantized.block
        seconds = time.monotonic() - started
        job.ranks.once(lambda: save_block(job, index, quantized, flatness, seconds))
    rotated.check.advance(index, finished)
    if streams is not None and index + 1 < job.skeleton.num_blocks:
        quantizer.runner.advance(index, finished, streams.quantized)
    return finished


def _tune(job: Job, structure: list[nn.Module], streams: Streams, rotated: RotatedModel) -> None:
    """Train scales and gains of all blocks, and take the check through the result."""
    assert streams.original is not None, "a job that tunes keeps the original stream"
    check = rotated.check
    release_memory()
    if not job.finished(TUNING):
        # the original's answers are those of its own head, not of one that is packed
        head = rotated.original_outer() if job.plan.outer else None
        tune(job, structure, streams.original, head)
        release_memory()
    if not job.ranks.leads:
        return
    check.restart_quantized()
    for index, block in enumerate(structure):
        part = job.folder.latest(block_part(index))
        check.advance(index, restored_block(job, part, index, block))
