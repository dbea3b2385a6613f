"""The whole job: calibrate -> rotate -> quantize block by block -> tune -> pack -> check.

One block of the model is in memory at a time. For each block: load in fp64, rotate and check that
the function is preserved, quantize its layers on the two activation streams, write its part, and
pass the streams on. A job that was stopped continues after its last part; the streams are
recomputed, so that the result has the same bytes as an unbroken one.
"""

from __future__ import annotations

import copy
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import rotq
from rotq.blocks import BlockQuantizer
from rotq.calibration.data import Windows, load_windows
from rotq.calibration.streams import Stream, Streams, Track
from rotq.checkpoint.load import load_tokenizer
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import Source, describe_source, open_source, read_tensor
from rotq.errors import Stopped
from rotq.finish import Made, finish
from rotq.flatness import Change, FlatnessMeter
from rotq.job import OUTER, TUNING, Job, block_part, open_job
from rotq.memory import release_memory, settled_objects
from rotq.models.online_attention import use_online_attention
from rotq.models.registry import GenericAdapter, find_adapter
from rotq.models.skeleton import Skeleton
from rotq.models.task import is_masked
from rotq.parts import restored_block, save_block
from rotq.plan import Plan, make_estimate, make_plan
from rotq.probe import Probe
from rotq.recipe import Recipe
from rotq.report import Estimate, JobReport, Progress, peak_rss
from rotq.rotations.basis import Basis, build_basis
from rotq.rotations.fuse import fuse_outer
from rotq.transform.find import find_basis
from rotq.transform.setting import Setting as BasisSetting
from rotq.tuning import Setting, hollow, tune


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
            setup = _set_up(model, recipe, job, device, dtype, trust_remote_code, progress)
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
    _basis(recipe, skeleton)
    return make_estimate(skeleton, recipe, _dtype(dtype, source))


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What stays the same while the blocks go by."""

    source: Source
    skeleton: Skeleton
    recipe: Recipe
    job: Job
    plan: Plan
    basis: Basis
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    progress: Progress
    started: float


def _set_up(
    model: Path,
    recipe: Recipe,
    job: Job,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
) -> _Setup:
    """Everything that can be refused is refused here, before the first block."""
    started = time.monotonic()
    source = open_source(model, gguf_dir=job.folder / "source", trust_remote_code=trust_remote_code)
    # first, because tokenizing a text of some MB is what most memory is used for until then
    windows = load_windows(
        recipe.calibration,
        load_tokenizer(source.path, trust_remote_code=trust_remote_code),
        masked=is_masked(source.config),
    )
    release_memory()
    skeleton = Skeleton.open(source, trust_remote_code=trust_remote_code)
    source = source.renamed(skeleton.adapter.renames, skeleton.adapter.transposed)
    basis = _basis(recipe, skeleton)
    wanted = _dtype(dtype, source)
    plan = make_plan(skeleton, recipe, wanted)
    job.claim(
        {
            "recipe": recipe.to_dict(),
            "model": source.fingerprint(),
            "data": windows.sha256,
            "dtype": str(wanted),
            "device": device,
            "versions": versions(),
        }
    )
    for note in filter(None, (*plan.notes, windows.note)):
        progress.message(note)
    return _Setup(
        source=source,
        skeleton=skeleton,
        recipe=recipe,
        job=job,
        plan=plan,
        basis=basis,
        windows=windows,
        device=torch.device(device),
        dtype=wanted,
        trust_remote_code=trust_remote_code,
        progress=progress,
        started=started,
    )


def _basis(recipe: Recipe, skeleton: Skeleton) -> Basis:
    """The recipe's bases, and attention that can do what they and the KV cache need at run time.

    An unknown family that would need either is refused by naming the known ones.
    """
    rotation = recipe.rotation
    kinds = {rotation.residual, rotation.value, rotation.attention, rotation.down}
    rounded = recipe.kv_cache.bits != 16
    if (kinds != {"none"} or rounded) and isinstance(skeleton.adapter, GenericAdapter):
        find_adapter(skeleton.config)
    basis = build_basis(rotation, skeleton.adapter, skeleton.config)
    if basis.attention is not None or rounded:
        use_online_attention(skeleton.model)
    return basis


def _run(setup: _Setup) -> JobReport:
    setup = replace(setup, basis=_find_basis(setup))
    skeleton, job, progress = setup.skeleton, setup.job, setup.progress
    quantizer = BlockQuantizer(skeleton, setup.recipe, setup.plan, setup.device, progress)
    probe = Probe(skeleton, setup.basis, setup.windows.first_BT)
    meter = _meter(setup)
    streams = _start(setup, quantizer, probe, meter)
    release_memory()
    structure: list[nn.Module] = []
    for index in range(skeleton.num_blocks):
        started = time.monotonic()
        progress.block_started(index, skeleton.num_blocks)
        original, flatness = _rotated(setup, probe, meter, index)
        if job.finished(block_part(index)):
            part = job.part(block_part(index))
            finished = restored_block(part, skeleton, index, original, setup.plan, setup.device)
            if streams is not None and streams.original is not None:
                quantizer.advance(index, original, streams.original)
        else:
            outcome = quantizer.quantize(index, original, streams)
            finished = outcome.block
            seconds = time.monotonic() - started
            save_block(job, skeleton, index, outcome, flatness, seconds)
        structure.append(hollow(finished))
        probe.advance(index, finished)
        if streams is not None and index + 1 < skeleton.num_blocks:
            quantizer.advance(index, finished, streams.quantized)
        release_memory()
        progress.block_done(index, time.monotonic() - started, peak_rss())
    probe.check_head()
    if setup.recipe.tuning.steps:
        assert streams is not None, "a job that tunes needs data"
        _tune(setup, structure, streams, probe)
    return finish(_made(setup, probe))


def _find_basis(setup: _Setup) -> Basis:
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
    setup: _Setup, probe: Probe, meter: FlatnessMeter | None, index: int
) -> tuple[nn.Module, dict[str, Change]]:
    """The original block in the model's dtype, rotated; and what that did to its inputs."""
    exact = setup.skeleton.load_block(index, setup.source, device=setup.device, dtype=torch.float64)
    if meter is None:
        return probe.rotate_block(index, exact).to(setup.dtype), {}
    plain = copy.deepcopy(exact).to(setup.dtype)
    original = probe.rotate_block(index, exact).to(setup.dtype)
    return original, meter.measure(index, plain, original)


def _tune(setup: _Setup, structure: list[nn.Module], streams: Streams, probe: Probe) -> None:
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
        part = job.latest(block_part(index))
        probe.advance(index, restored_block(part, skeleton, index, block, setup.plan, setup.device))


def _meter(setup: _Setup) -> FlatnessMeter | None:
    """None where flatness does not matter, or is not wanted."""
    calibration = setup.recipe.calibration
    rounded = setup.plan.inputs is not None or setup.plan.kv is not None
    if (setup.basis.is_identity and not rounded) or not calibration.flatness_tokens:
        return None
    return FlatnessMeter(
        setup.skeleton,
        setup.windows.each(),
        num_tokens=calibration.flatness_tokens,
        device=setup.device,
        precision=calibration.precision,
    )


def _start(
    setup: _Setup, quantizer: BlockQuantizer, probe: Probe, meter: FlatnessMeter | None
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


def _track(setup: _Setup, name: str) -> Track:
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


def _made(setup: _Setup, probe: Probe) -> Made:
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


def versions() -> dict[str, str]:
    """Of everything that decides the bytes of the result."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "rotq": rotq.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _dtype(name: str, source: Source) -> torch.dtype:
    if name == "auto":
        return source.dtype
    dtypes = ("float32", "bfloat16", "float16")
    if name not in dtypes:
        raise ValueError(f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
