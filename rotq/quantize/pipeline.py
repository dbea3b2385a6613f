"""The whole job: calibrate -> rotate -> quantize block by block -> tune -> pack -> check.

One block of the model is in memory at a time. For each block: load in fp64, rotate and check that
the function is preserved, quantize its layers on the two activation streams, write its part, and
pass the streams on. A job that was stopped continues after its last part; the streams are
recomputed, so that the result has the same bytes as an unbroken one.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rotq.calibration.streams import Stream, Streams, Track
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import describe_source, read_tensor
from rotq.errors import Stopped
from rotq.evaluation.flatness import Change, FlatnessMeter
from rotq.fusion.fuse import fuse_outer
from rotq.job.folder import OUTER, TUNING, block_part, open_job
from rotq.job.parts import save_block
from rotq.job.plan import make_estimate
from rotq.memory import release_memory, settled_objects
from rotq.models.skeleton import Skeleton
from rotq.quantize.block_quantizer import BlockQuantizer
from rotq.quantize.invariance import Probe
from rotq.quantize.publish import Made, finish
from rotq.quantize.setup import Setup, set_up, starting_basis, versions, wanted_dtype
from rotq.recipe import Recipe
from rotq.report import Estimate, JobReport, Progress, peak_rss
from rotq.rotations.basis import Basis
from rotq.transform.search import find_basis
from rotq.transform.windows import Setting as BasisSetting
from rotq.tuning.train import Setting, hollow, tune


def quantize_model(
    model: Path,
    recipe: Recipe,
    output: Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    resume: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> JobReport:
    """Quantize a checkpoint folder (or one that holds a GGUF file) into ``output``.

    Args:
        model: Dense Hugging Face checkpoint; only read.
        recipe: What to do.
        output: Created; while the job runs its files are in ``output`` + ".partial".
        device: Where blocks run and are solved.
        dtype: Of activations and of what stays dense: "auto" is the checkpoint's.
        resume: "auto", "required" or "never", see ``open_job``.
        overwrite: Replace an existing ``output`` once the new one is complete.
        trust_remote_code: Let transformers run code that comes with the model.
        progress: Listener.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        ValueError: the recipe does not fit the model (a group size that does not divide).
        RotqError: model, text, disk or an existing output are not as they must be.
        CheckFailed: the rotated model or the reloaded checkpoint is not the same function.
        Stopped: interrupted; the job can be resumed.
    """
    progress = progress or Progress()
    with open_job(output, resume=resume, overwrite=overwrite) as job, torch.no_grad():
        try:
            setup = set_up(model, recipe, job, device, dtype, trust_remote_code, progress)
            with settled_objects():
                return _run(setup)
        except KeyboardInterrupt:
            raise Stopped(
                f"stopped; finished blocks are kept in {job.folder}, "
                "the same command continues from there"
            ) from None


def estimate(
    model: Path, recipe: Recipe, *, dtype: str = "auto", trust_remote_code: bool = False
) -> Estimate:
    """What ``quantize_model`` would make and need; reads the config and file headers only.

    Raises:
        ValueError, RotqError: as ``quantize_model``.
    """
    source = describe_source(model, trust_remote_code=trust_remote_code)
    skeleton = Skeleton.open(source, trust_remote_code=trust_remote_code)
    starting_basis(recipe, skeleton)
    return make_estimate(skeleton, recipe, wanted_dtype(dtype, source))


def _run(setup: Setup) -> JobReport:
    setup = replace(setup, basis=_find_basis(setup))
    skeleton, progress = setup.skeleton, setup.progress
    quantizer = BlockQuantizer(skeleton, setup.recipe, setup.plan, setup.device, progress)
    probe = Probe(skeleton, setup.basis, setup.windows.first_BT)
    meter = _meter(setup)
    streams = _start(setup, quantizer, probe, meter)
    walk = _Walk(setup=setup, quantizer=quantizer, probe=probe, meter=meter, streams=streams)
    release_memory()
    structure: list[nn.Module] = []
    for index in range(skeleton.num_blocks):
        started = time.monotonic()
        progress.block_started(index, skeleton.num_blocks)
        structure.append(hollow(walk.through(index)))
        release_memory()
        progress.block_done(index, time.monotonic() - started, peak_rss())
    probe.check_head()
    if setup.recipe.tuning.steps:
        assert streams is not None, "a job that tunes needs data"
        release_memory()
        _tune(setup, structure, streams, probe)
    return finish(_made(setup, probe))


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """What goes from block to block."""

    setup: Setup
    quantizer: BlockQuantizer
    probe: Probe
    meter: FlatnessMeter | None
    streams: Streams | None

    def through(self, index: int) -> nn.Module:
        """Quantize and save one block, or take it from the part a job before has saved.

        Streams and probe are behind it then.
        """
        setup, passes, streams = self.setup, self.quantizer.passes, self.streams
        started = time.monotonic()
        original, flatness = _rotated(setup, self.probe, self.meter, index)
        if setup.job.finished(block_part(index)):
            part = setup.job.part(block_part(index))
            finished = setup.restored(part, index, original)
            if streams is not None and streams.original is not None:
                passes.advance(index, original, streams.original)
        else:
            outcome = self.quantizer.quantize(index, original, streams)
            finished = outcome.block
            seconds = time.monotonic() - started
            save_block(setup.job, setup.skeleton, index, outcome, flatness, seconds)
        self.probe.advance(index, finished)
        if streams is not None and index + 1 < setup.skeleton.num_blocks:
            passes.advance(index, finished, streams.quantized)
        return finished


def _find_basis(setup: Setup) -> Basis:
    """What the recipe's ``transform`` makes of the bases it draws."""
    setting = BasisSetting(
        job=setup.job,
        skeleton=setup.skeleton,
        source=setup.source,
        plan=setup.plan,
        recipe=setup.recipe,
        windows=list(setup.windows.each()),
        device=setup.device,
        dtype=setup.dtype,
        progress=setup.progress,
    )
    return find_basis(setting, setup.basis)


def _rotated(
    setup: Setup, probe: Probe, meter: FlatnessMeter | None, index: int
) -> tuple[nn.Module, dict[str, Change]]:
    """The original block in the model's dtype, rotated; and what that did to its inputs."""
    exact = setup.skeleton.load_block(index, setup.source, device=setup.device, dtype=torch.float64)
    if meter is None:
        return probe.rotate_block(index, exact).to(setup.dtype), {}
    plain = copy.deepcopy(exact).to(setup.dtype)
    original = probe.rotate_block(index, exact).to(setup.dtype)
    return original, meter.measure(index, plain, original)


def _tune(setup: Setup, structure: list[nn.Module], streams: Streams, probe: Probe) -> None:
    """Train scales and gains of all blocks, and take the probe through the result."""
    job, skeleton = setup.job, setup.skeleton
    assert streams.original is not None, "a job that tunes keeps the original stream"
    if not job.recorded(TUNING):
        setting = Setting(
            job=job,
            skeleton=skeleton,
            plan=setup.plan,
            recipe=setup.recipe,
            device=setup.device,
            progress=setup.progress,
        )
        tune(setting, structure, streams.batches, streams.original.hidden)
    probe.restart_quantized()
    for index, block in enumerate(structure):
        probe.advance(index, setup.restored(job.latest(block_part(index)), index, block))


def _meter(setup: Setup) -> FlatnessMeter | None:
    """None where flatness does not matter: nothing is rotated or rounded at run time."""
    rounded = setup.plan.inputs is not None or setup.plan.kv is not None
    if setup.basis.is_identity and not rounded:
        return None
    return FlatnessMeter(
        setup.skeleton,
        setup.windows.each(),
        device=setup.device,
        precision=setup.recipe.calibration.precision,
    )


def _start(
    setup: Setup, quantizer: BlockQuantizer, probe: Probe, meter: FlatnessMeter | None
) -> Streams | None:
    """Rotate what lies outside the blocks, save it, and embed the calibration windows."""
    skeleton, job = setup.skeleton, setup.job
    original = skeleton.load_outer(setup.source, dtype=setup.dtype)
    probe.start(original)
    if meter is not None:
        meter.start(original)
    fused = fuse_outer(original, skeleton.adapter, setup.basis, in_place=True)
    del original
    probe.start_quantized(fused)
    if meter is not None:
        meter.start_transformed(fused)
    if not job.finished(OUTER):
        save_tensors(job.part(OUTER), fused)
        job.record(OUTER, {"rotation": setup.basis.checksum()})
    fused.pop(f"{skeleton.adapter.head}.weight", None)
    if not quantizer.needs_data:
        return None
    tracks = [_track(setup, "quantized")]
    if setup.recipe.needs_original:
        tracks.append(_track(setup, "original"))
    for number, batch in enumerate(setup.windows.batches):
        hidden_BTD = skeleton.embed(fused, batch.ids_BT, batch.mask_BT)
        for track in tracks:
            track.hidden[number] = hidden_BTD
    return Streams(quantized=tracks[0], original=tracks[1] if tracks[1:] else None)


def _track(setup: Setup, name: str) -> Track:
    batches = setup.windows.batches
    files: list[Path | None] = [None, None]
    if setup.recipe.calibration.offload:
        files = [setup.job.folder / f"{kind}-{name}" for kind in ("hidden", "attention")]
    hidden, attended = (
        Stream.empty(
            [torch.Size((*batch.ids_BT.shape, width)) for batch in batches], setup.dtype, file
        )
        for width, file in zip(
            (setup.skeleton.config.hidden_size, _attended(setup.skeleton)), files, strict=True
        )
    )
    return Track(hidden, attended, batches)


def _attended(skeleton: Skeleton) -> int:
    """Features that the attention's output projection reads; 0 where it is not known."""
    if not skeleton.adapter.attention:
        return 0
    path = skeleton.adapter.attention_output
    linear = skeleton.blocks[0].get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is a linear layer"
    return linear.in_features


def _made(setup: Setup, probe: Probe) -> Made:
    """What the finishing touches need; the logits come from the saved outer tensors."""
    outer = {entry.name: read_tensor(entry) for entry in read_entries(setup.job.latest(OUTER))}
    return Made(
        source=setup.source,
        skeleton=setup.skeleton,
        recipe=setup.recipe,
        job=setup.job,
        plan=setup.plan,
        windows=setup.windows,
        down=setup.basis.down_kind,
        rotation={
            **setup.basis.description,
            "checksum": setup.basis.checksum(),
            "largest_relative_difference": probe.worst,
        },
        dtype=setup.dtype,
        probe_ids_BT=probe.ids_BT,
        probe_logits_BTV=probe.logits(outer),
        versions=versions(),
        seconds=time.monotonic() - setup.started,
        trust_remote_code=setup.trust_remote_code,
        progress=setup.progress,
    )
