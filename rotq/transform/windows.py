"""What the search for a basis works on.

Shape suffixes: B windows, T positions, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.job.folder import JobFolder
from rotq.job.plan import Plan
from rotq.models.loading import TensorSource
from rotq.models.skeleton import Skeleton
from rotq.recipe import Recipe, Transform
from rotq.report import Progress
from rotq.transform.model_loss import Lesson, teach
from rotq.transform.student import Student
from rotq.transform.teacher import next_tokens

MEASURED_TOKENS = 8192
"""Calibration tokens that closed forms, layer errors and proxies are taken from."""

JUDGED_WINDOWS = 4
"""Windows of the calibration text that ``judge: kl`` scores on; they are not trained on."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the search works on."""

    job: JobFolder
    skeleton: Skeleton
    source: TensorSource
    plan: Plan
    recipe: Recipe
    windows: Sequence[Tensor]
    """(1, T) calibration tokens each."""
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    @property
    def options(self) -> Transform:
        return self.recipe.transform

    @functools.cached_property
    def outer(self) -> dict[str, Tensor]:
        """The original model's tensors outside the blocks."""
        return self.skeleton.load_outer(self.source, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def student(self) -> Student:
        return Student(
            skeleton=self.skeleton,
            source=self.source,
            plan=self.plan,
            device=self.device,
            dtype=self.dtype,
            rounds_weights=self.plan.inputs is None,
        )

    @property
    def training_windows(self) -> Sequence[Tensor]:
        """All but those that ``judge: kl`` needs, cut to the length that is trained on."""
        options = self.options
        held_out = JUDGED_WINDOWS if (options.method, options.judge) == ("auto", "kl") else 0
        windows = self.windows[: len(self.windows) - held_out]
        return [ids_BT[:, : options.seq_len or None] for ids_BT in windows]

    def embedded(self) -> list[Tensor]:
        """What the original model's first block is given for the first training windows; fp32.

        Windows of at most ``MEASURED_TOKENS`` in all, one at least.
        """
        windows = self.training_windows
        count = max(1, MEASURED_TOKENS // windows[0].shape[1])
        return [
            self.skeleton.embed(self.outer, ids_BT.to(self.device)).float()
            for ids_BT in windows[:count]
        ]

    def lessons(self, windows: Sequence[Tensor]) -> list[Lesson]:
        """Windows (1, T) with what the recipe's objective aims at."""
        if self.options.objective == "cross_entropy":
            targets = [next_tokens(ids_BT[0]) for ids_BT in windows]
        else:
            targets = teach(self.student, self.outer, windows, self.options.top_k)
        return [
            Lesson(ids_BT=ids_BT, targets=target)
            for ids_BT, target in zip(windows, targets, strict=True)
        ]
