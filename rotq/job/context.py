"""What a job works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.batches import Batch
from rotq.calibration.data import Windows
from rotq.checkpoint.source import Source
from rotq.devices import exact_device
from rotq.job.folder import JobFolder
from rotq.job.plan import Plan
from rotq.job.rest import rest_in
from rotq.models.skeleton import Skeleton
from rotq.ranks import ALONE, Ranks
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
    """Of activations, and of what stays dense when it is computed with: the model's, or fp32 on a
    CPU that has no products in that."""
    progress: Progress
    ranks: Ranks = ALONE
    """The processes that share it."""

    @property
    def batches(self) -> Sequence[Batch]:
        """The calibration windows of this process."""
        return self.ranks.own(self.windows.batches)

    def finished(self, part: str) -> bool:
        """Whether a part is complete, as the leader of all processes has it."""
        return self.ranks.told(lambda: self.folder.finished(part))

    def results(self, part: str) -> dict[str, Any]:
        """What was recorded of a finished part, as the leader has it."""
        return self.ranks.told(lambda: self.folder.results(part))

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that stay dense, by name, in the dtypes that the checkpoint has them in."""
        return rest_in(tensors, self.plan.rest_dtype, {self.dtype: self.plan.dtype})

    def load_block(self, index: int, dtype: torch.dtype) -> nn.Module:
        """A block of the original model, on the job's device."""
        return self.skeleton.load_block(index, self.source, device=self.device, dtype=dtype)

    def load_exact(self, index: int) -> nn.Module:
        """The same in fp64, on the CPU where the job's device has none."""
        device = exact_device(self.device)
        return self.skeleton.load_block(index, self.source, device=device, dtype=torch.float64)
