"""What a job works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rotq.calibration.data import Windows
from rotq.checkpoint.source import Source
from rotq.devices import exact_device
from rotq.job.folder import JobFolder
from rotq.job.plan import Plan
from rotq.models.skeleton import Skeleton
from rotq.recipe import Recipe
from rotq.report import Progress


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every step is given, the same from the first block to the last."""

    recipe: Recipe
    source: Source
    """Tensors of the original model, under the adapter's names."""
    skeleton: Skeleton
    plan: Plan
    windows: Windows
    """Calibration tokens."""
    folder: JobFolder
    device: torch.device
    """Where blocks are run and solved."""
    dtype: torch.dtype
    """Of activations, and of what stays dense when it is computed with."""
    progress: Progress

    def load_block(self, index: int, dtype: torch.dtype) -> nn.Module:
        """A block of the original model, on the job's device."""
        return self.skeleton.load_block(index, self.source, device=self.device, dtype=dtype)

    def load_exact(self, index: int) -> nn.Module:
        """The same in fp64, on the CPU where the job's device has none."""
        device = exact_device(self.device)
        return self.skeleton.load_block(index, self.source, device=device, dtype=torch.float64)
