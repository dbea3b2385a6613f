"""What is settled or refused before the first block: model, plan, bases, calibration windows."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

import rotq
from rotq.calibration.data import Windows, load_windows
from rotq.checkpoint.gguf import read_once
from rotq.checkpoint.load import load_tokenizer
from rotq.checkpoint.location import Location, ModelName, locate
from rotq.checkpoint.opening import describe_source, open_source
from rotq.checkpoint.source import Source
from rotq.devices import AUTO, choose_device, fast_dtype, slow_products
from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.job.context import Job
from rotq.job.folder import JobFolder
from rotq.job.plan import FOUR_BITS, Plan, make_plan
from rotq.memory import release_memory
from rotq.models.attention.online import use_online_attention
from rotq.models.generic import GenericAdapter
from rotq.models.limits import limits_of
from rotq.models.registry import find_adapter
from rotq.models.skeleton import Skeleton
from rotq.phases import phase
from rotq.quantize.kept import find_kept
from rotq.quantize.own_text import check_room
from rotq.ranks import Ranks
from rotq.recipe import Recipe
from rotq.report import Progress
from rotq.report.lines import ROTATIONS
from rotq.rotations.basis import Basis
from rotq.transform.search import check_transform


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a job will work with, once all that can be refused was."""

    source: Source
    """Under the adapter's names."""
    skeleton: Skeleton
    drawn: Basis
    """The bases that the recipe draws: what the search for the job's basis starts from."""
    plan: Plan
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    """That the job computes in."""


def settle(
    source: Source,
    recipe: Recipe,
    *,
    tokenizer: ModelName,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> Settled:
    """Everything that can be refused before the first block is refused here; nothing is written.

    Args:
        source: From ``open_source``, or from ``describe_source``, which has no tensors.
        tokenizer: What has it.
        recipe, device, dtype, trust_remote_code: As for ``quantize_model``.

    Raises:
        ValueError, RotqError: as ``quantize_model``.
    """
    usable = chosen_device(device, recipe)
    skeleton = Skeleton.open(source, trust_remote_code=trust_remote_code)
    # before any weight, because tokenizing a text of some MB takes the most memory until then
    windows = load_windows(
        recipe.calibration,
        load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
        limits_of(skeleton.model),
        masked=skeleton.masked,
    )
    release_memory()
    drawn = starting_basis(recipe, skeleton)
    source = source.read_for(skeleton)
    wanted = wanted_dtype(dtype, source)
    if dtype == AUTO and recipe.weights.format in FOUR_BITS and recipe.output.format != "rotq":
        wanted = torch.bfloat16  # whatever the model's, transformers makes such weights bfloat16
    rest = torch.bfloat16 if dtype == AUTO and wanted == torch.float32 else wanted
    computed = fast_dtype(wanted, usable) if dtype == AUTO else wanted
    plan = make_plan(skeleton, recipe, wanted, rest)
    check_room(skeleton, recipe.calibration, computed, usable)
    kept = find_kept(source, skeleton, rotated=drawn.turns_outer)
    notes = (*_dtype_notes(source, wanted, rest), *slow_products(wanted, computed, usable))
    return Settled(
        source=source,
        skeleton=skeleton,
        drawn=drawn,
        plan=replace(plan, notes=(*plan.notes, *kept.notes(), *notes)),
        windows=windows,
        device=usable,
        dtype=computed,
    )


def settle_described(model: ModelName, recipe: Recipe, **options: Any) -> Settled:
    """As ``settle``, for a model whose weights are not fetched or converted yet."""
    found = locate(model)
    source = describe_source(found, trust_remote_code=options["trust_remote_code"])
    return settle(source, recipe, tokenizer=found, **options)


@phase("setup")
def setup(
    model: Location,
    recipe: Recipe,
    folder: JobFolder,
    *,
    progress: Progress,
    ranks: Ranks,
    **options: Any,
) -> tuple[Job, Basis]:
    """The job, and the bases that the search for its basis starts from.

    Args:
        model, recipe, progress, ranks: As for ``quantize_model``.
        folder: Takes a GGUF file's dense tensors; not claimed yet.
        options: As for ``settle``.
    """
    if model.is_gguf or not model.is_complete:
        with read_once(model.path):
            settle_described(model, recipe, **options)  # converting and fetching take long
    source = open_source(
        model, gguf_dir=folder.source, trust_remote_code=options["trust_remote_code"]
    )
    settled = settle(source, recipe, tokenizer=source.path, **options)
    job = Job(
        recipe=recipe,
        source=settled.source,
        skeleton=settled.skeleton,
        plan=settled.plan,
        windows=settled.windows,
        folder=folder,
        device=settled.device,
        dtype=settled.dtype,
        progress=progress,
        ranks=ranks,
    )
    _check_shares(job)
    chosen = [f"device: {job.device}"] if options["device"] == AUTO else []
    for note in (*chosen, *job.plan.notes, *job.windows.notes):
        progress.message(note)
    return job, settled.drawn


def _check_shares(job: Job) -> None:
    """Every process has windows, where any are looked at.

    Raises:
        RotqError: there are fewer batches of them than processes.
    """
    batches = len(job.windows.batches)
    if job.recipe.needs_data and batches < job.ranks.size:
        raise RotqError(
            f"{job.ranks.size} processes share {batches} batches of calibration windows; use fewer "
            "processes, more windows or a smaller calibration.batch_size"
        )


def chosen_device(name: str, recipe: Recipe) -> torch.device:
    """Where a job computes; a device without fp64 leaves to the CPU what needs it.

    Raises:
        ValueError, RotqError: as ``choose_device``; a basis is searched for in fp64.
    """
    method = recipe.transform.method
    return choose_device(name, in_double="" if method == "fixed" else f"transform.method={method}")


def starting_basis(recipe: Recipe, skeleton: Skeleton) -> Basis:
    """The recipe's bases, and attention that can do what they and the KV cache need at run time.

    An unknown family that would need either is refused by naming the known ones.
    """
    rotation = recipe.rotation
    kinds = {getattr(rotation, name) for name in ROTATIONS}
    rounded = recipe.kv_cache.bits != 16
    if (kinds != {"none"} or rounded) and isinstance(skeleton.adapter, GenericAdapter):
        find_adapter(skeleton.model.config)
    if rounded and not skeleton.adapter.attention:
        raise RotqError(
            f"kv_cache.bits={recipe.kv_cache.bits} is not possible for {skeleton.adapter.family} "
            "models: their attention is not known; set kv_cache.bits=16"
        )
    check_transform(recipe.transform, skeleton)
    basis = build_basis(rotation, skeleton.adapter, skeleton.config)
    if basis.attention is not None or rounded:
        use_online_attention(skeleton.model)
    return basis


def fingerprint(job: Job, *, trust_remote_code: bool) -> dict[str, object]:
    """What a job must have in common with the one it continues: all that decides its bytes."""
    return {
        "recipe": job.recipe.to_dict(),
        "model": job.source.fingerprint(),
        "data": job.windows.sha256,
        "dtype": str(job.plan.dtype),
        "dtype of computation": str(job.dtype),
        "rest": str(job.plan.rest_dtype),
        "device": job.device.type,
        "trust_remote_code": trust_remote_code,
        "versions": versions(),
        **({} if job.source.hub is None else {"commit": str(job.source.hub)}),
        **job.source.deciding_files(),
    }


def versions() -> dict[str, str]:
    """Of everything that decides the bytes of the result."""
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    return {
        "rotq": rotq.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _dtype_notes(source: Source, dtype: torch.dtype, rest: torch.dtype) -> Iterator[str]:
    """A checkpoint in fp64 is quantized in another dtype, and one in fp32 is not stored so."""
    computed, stored = (str(each).removeprefix("torch.") for each in (dtype, rest))
    if source.dtype == torch.float64:
        yield f"the checkpoint is in float64; the job computes in {computed}"
    if stored != computed:
        yield (
            f"weights that stay dense are stored in {stored}; --dtype {computed} keeps them as "
            "they are"
        )


def wanted_dtype(name: str, source: Source) -> torch.dtype:
    """The dtype of that name; the checkpoint's for "auto", but fp32 for fp64.

    Raises:
        ValueError: the name is none of a dtype that jobs run in.
    """
    if name == "auto":
        return torch.float32 if source.dtype == torch.float64 else source.dtype
    dtypes = ("float32", "bfloat16", "float16")
    if name not in dtypes:
        raise ValueError(f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
