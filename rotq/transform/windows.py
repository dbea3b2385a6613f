"""The calibration windows, as the search for a basis uses them.

Shape suffixes: B windows, T positions, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from rotq.job.context import Job
from rotq.transform.model_loss import Lesson, teach
from rotq.transform.student import Student
from rotq.transform.teacher import next_tokens

MEASURED_TOKENS = 8192
"""Calibration tokens that closed forms and layer losses are taken from."""


class TrainingWindows:
    """Windows to train and measure on, and what the two models make of them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._windows = list(job.windows.each())

    @property
    def trained_on(self) -> Sequence[Tensor]:
        """(1, T) each, cut to the length for training."""
        length = self.job.recipe.transform.seq_len or None
        return [ids_BT[:, :length] for ids_BT in self._windows]

    @functools.cached_property
    def outer(self) -> dict[str, Tensor]:
        """The original model's tensors outside the blocks."""
        job = self.job
        return job.skeleton.load_outer(job.source, dtype=job.dtype, device=job.device)

    @functools.cached_property
    def student(self) -> Student:
        """The model that is trained; it rounds weights where nothing is rounded at run time."""
        return Student(job=self.job, rounds_weights=self.job.plan.inputs is None)

    def embedded(self) -> list[Tensor]:
        """What the original model's first block is given for the first training windows; fp32.

        Windows of at most ``MEASURED_TOKENS`` in all, one at least.
        """
        windows = self.trained_on
        count = max(1, MEASURED_TOKENS // windows[0].shape[1])
        return [
            self.job.skeleton.embed(self.outer, ids_BT.to(self.job.device)).float()
            for ids_BT in windows[:count]
        ]

    def lessons(self, windows: Sequence[Tensor]) -> list[Lesson]:
        """Windows (1, T) with what the recipe's objective aims at."""
        options = self.job.recipe.transform
        if options.objective == "cross_entropy":
            targets = [next_tokens(ids_BT[0]) for ids_BT in windows]
        else:
            targets = teach(self.student, self.outer, windows, options.top_k)
        return [
            Lesson(ids_BT=ids_BT, targets=target)
            for ids_BT, target in zip(windows, targets, strict=True)
        ]
