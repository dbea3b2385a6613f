"""What is settled or refused before the first block: model, plan, bases, calibration windows."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

import rotq
from rotq.calibration.data import load_windows
from rotq.checkpoint.load import load_tokenizer
from rotq.checkpoint.source import Source, open_source
from rotq.fusion.draw import build_basis
from rotq.job.context import Job
from rotq.job.folder import JobFolder
from rotq.job.plan import make_plan
from rotq.memory import release_memory
from rotq.models.attention.online import use_online_attention
from rotq.models.registry import GenericAdapter, find_adapter
from rotq.models.skeleton import Skeleton
from rotq.models.task import is_masked
from rotq.recipe import Recipe
from rotq.report import Progress
from rotq.rotations.basis import Basis


def setup(
    model: Path,
    recipe: Recipe,
    folder: JobFolder,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Job, Basis]:
    """Everything that can be refused is refused here, before the first block.

    Args:
        model, recipe, device, dtype, trust_remote_code, progress: As for ``quantize_model``.
        folder: Claimed for the job, or refused if it holds another one.

    Returns:
        The job, and the bases that its recipe draws: what the search for its basis starts from.
    """
    gguf_dir = folder.path / "source"
    source = open_source(model, gguf_dir=gguf_dir, trust_remote_code=trust_remote_code)
    # first, because tokenizing a text of some MB is what most memory is used for until then
    windows = load_windows(
        recipe.calibration,
        load_tokenizer(source.path, trust_remote_code=trust_remote_code),
        masked=is_masked(source.config),
    )
    release_memory()
    skeleton = Skeleton.open(source, trust_remote_code=trust_remote_code)
    drawn = starting_basis(recipe, skeleton)
    source = source.read_for(skeleton)
    wanted = wanted_dtype(dtype, source)
    job = Job(
        recipe=recipe,
        source=source,
        skeleton=skeleton,
        plan=make_plan(skeleton, recipe, wanted),
        windows=windows,
        folder=folder,
        device=torch.device(device),
        dtype=wanted,
        progress=progress,
    )
    folder.claim(fingerprint(job))
    for note in filter(None, (*job.plan.notes, windows.note)):
        progress.message(note)
    return job, drawn


def starting_basis(recipe: Recipe, skeleton: Skeleton) -> Basis:
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


def fingerprint(job: Job) -> dict[str, object]:
    """What a job must have in common with the one it continues."""
    return {
        "recipe": job.recipe.to_dict(),
        "model": job.source.fingerprint(),
        "data": job.windows.sha256,
        "dtype": str(job.dtype),
        "device": str(job.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that decides the bytes of the result."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "rotq": rotq.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


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
