"""The search for a basis on a tiny model in memory."""

import math
from pathlib import Path
from typing import Any

import torch
from tiny_models import MemorySource, random_ids, tiny_model

from rotq.job.folder import Job
from rotq.job.plan import make_plan
from rotq.models.attention.online import use_online_attention
from rotq.models.skeleton import Skeleton
from rotq.recipe import load_recipe
from rotq.report.progress import Progress
from rotq.transform.student import Student
from rotq.transform.windows import Setting

SCALED = ["qkv", "gate_up", "value", "query_key", "up"]
W4A4KV4 = {
    "weights.bits": 4,
    "weights.group_size": -1,
    "activations.bits": 4,
    "kv_cache.bits": 4,
    "rotation.residual": "hadamard",
    "rotation.value": "hadamard",
    "rotation.attention": "hadamard",
    "rotation.down": "hadamard",
    "output.format": "rotq",
    "calibration.precision": "highest",
}
LEARNED = {
    **W4A4KV4,
    "transform.method": "learned",
    "transform.scalings": SCALED,
    "transform.balance": ["value", "query_key", "up"],
    "transform.layer_steps": 3,
    "transform.steps": 6,
    "transform.top_k": 32,
}


def make_setting(
    folder: Path,
    choices: dict[str, Any],
    progress: Progress | None = None,
    num_windows: int = 3,
    name: str = "llama",
) -> Setting:
    """Windows of 24 random tokens; the job's folder is kept if it is there."""
    folder.mkdir(exist_ok=True)
    source = MemorySource(tiny_model(name, dtype=torch.float32))
    skeleton = Skeleton.open(source)
    use_online_attention(skeleton.model)
    recipe = load_recipe(None, choices)
    return Setting(
        job=Job(folder, folder / "out", overwrite=False),
        skeleton=skeleton,
        source=source,
        plan=make_plan(skeleton, recipe, torch.float32),
        recipe=recipe,
        windows=random_ids(num_windows, 24).split(1),
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=progress or Progress(),
    )


def spoil_block(monkeypatch, number: int = 1) -> None:
    """Let one block's up projection be not finite once it is fused."""
    fused = Student.fused_block

    def broken(self, index, basis):
        block, tensors = fused(self, index, basis)
        if index == number:
            tensors["mlp.up_proj.weight"] = tensors["mlp.up_proj.weight"] * math.nan
        return block, tensors

    monkeypatch.setattr(Student, "fused_block", broken)
