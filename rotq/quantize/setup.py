"""What is settled or refused before the first block: model, plan, bases, calibration windows."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import rotq
from rotq.calibration.data import Windows, load_windows
from rotq.checkpoint.load import load_tokenizer
from rotq.checkpoint.source import Source, open_source
from rotq.fusion.draw import build_basis
from rotq.job.folder import Job
from rotq.job.parts import restored_block
from rotq.job.plan import Plan, make_plan
from rotq.memory import release_memory
from rotq.models.attention.online import use_online_attention
from rotq.models.registry import GenericAdapter, find_adapter
from rotq.models.skeleton import Skeleton
from rotq.models.task import is_masked
from rotq.recipe import Recipe
from rotq.report import Progress
from rotq.rotations.basis import Basis


@dataclass(frozen=True, kw_only=True)
class Setup:
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

    def restored(self, part: Path, index: int, structure: nn.Module) -> nn.Module:
        """Block ``index`` as a saved part has it; ``structure`` gives it its modules."""
        return restored_block(part, self.skeleton, index, structure, self.plan, self.device)


def set_up(
    model: Path,
    recipe: Recipe,
    job: Job,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
) -> Setup:
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
    basis = starting_basis(recipe, skeleton)
    wanted = wanted_dtype(dtype, source)
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
    return Setup(
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


def versions() -> dict[str, str]:
    """Of everything that decides the bytes of the result."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "rotq": rotq.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def wanted_dtype(name: str, source: Source) -> torch.dtype:
    if name == "auto":
        return source.dtype
    dtypes = ("float32", "bfloat16", "float16")
    if name not in dtypes:
        raise ValueError(f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
