"""Jobs on a tiny model in memory, for steps that are tested alone."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import MemorySource, random_ids, tiny_model

from rotq.calibration.batches import Batch
from rotq.calibration.data import Windows
from rotq.job.context import Job
from rotq.job.folder import JobFolder
from rotq.job.plan import make_plan
from rotq.models.attention.online import use_online_attention
from rotq.models.skeleton import Skeleton
from rotq.recipe import load_recipe
from rotq.report.progress import Progress


def make_job(
    folder: Path,
    choices: dict[str, Any],
    progress: Progress | None = None,
    num_windows: int = 3,
    name: str = "llama",
    source: MemorySource | None = None,
) -> Job:
    """Windows of 24 random tokens; the job's folder is kept if it is there.

    Args:
        name: Of a model of ``tiny_models``.
        source: In place of that model.
    """
    folder.mkdir(exist_ok=True)
    source = source or MemorySource(tiny_model(name, dtype=torch.float32))
    skeleton = Skeleton.open(source)
    use_online_attention(skeleton.model)
    recipe = load_recipe(None, choices)
    batch = Batch(ids_BT=random_ids(num_windows, 24))
    return Job(
        recipe=recipe,
        source=source,
        skeleton=skeleton,
        plan=make_plan(skeleton, recipe, torch.float32),
        windows=Windows(batches=(batch,), source="", sha256="", tokens=batch.num_tokens),
        folder=JobFolder(folder, folder / "out", overwrite=False),
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=progress or Progress(),
    )
