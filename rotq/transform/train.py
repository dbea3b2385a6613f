"""Train a basis through the model: R1, R2 and scales, on the loss against the original model.

    minimize over R1, R2, log S   mean_t KL-Top(p_t || p^_t),   p^: rounding faked in the basis

Adam on free parameters, one window a step, warm-up and cosine decay; blocks are streamed as in
``tuning``. Matrices are rebuilt once a step; their gradients are summed over blocks before they go
through the parametrization. OSTQuant (arXiv 2501.13987) with these differences: scales as their
logarithms, Adam on a parametrization in place of Riemannian Adam, step sizes as angles, the range
of rounded tensors is differentiated (``round_through``), factors are fused as they are applied.

Shape suffixes: B windows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.models.skeleton import Skeleton
from rotq.recipe import Transform
from rotq.rotations.basis import Basis
from rotq.streamed import run_backward, run_forward
from rotq.transform.parameters import Parameters
from rotq.transform.student import Student
from rotq.transform.teacher import Targets, head_loss

WARM_UP = 8
"""Steps of linear warm-up."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One window to train on."""

    ids_BT: Tensor
    """(1, T)."""
    targets: Targets


class Trainer:
    """Parameters, their optimizer, and how far they are."""

    def __init__(
        self,
        student: Student,
        parameters: Parameters,
        outer: dict[str, Tensor],
        lessons: Sequence[Lesson] | Callable[[int], Lesson],
        options: Transform,
    ) -> None:
        """
        Args:
            outer: The original model's tensors outside the blocks.
            lessons: Called with the step.
        """
        self.student, self.parameters, self.outer = student, parameters, outer
        self.lessons, self.options = lessons, options
        rotations = list(parameters.rotations().values())
        groups = [
            {"params": rotations, "rate": options.angle},
            {"params": list(parameters.logs.values()), "rate": options.scale_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-12)
        self.losses: list[float] = []

    def step(self) -> float:
        """One window; returns its loss before the step.

        Raises:
            RotqError: the loss or a gradient is not finite; names the step and where.
        """
        index = len(self.losses)
        lesson = self.lessons(index)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(index, self.options.steps)
        self.optimizer.zero_grad()
        loss = self.backward(lesson, index)
        self.optimizer.step()
        self.losses.append(loss)
        return loss

    def backward(self, lesson: Lesson, step: int = 0) -> float:
        """Gradients of one window's loss, added to the free parameters."""
        with torch.enable_grad():
            basis = self.parameters.basis()
        named = basis.tensors()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
        leaf_basis = basis.with_tensors(leaves)
        student = self.student
        embedded_BTD = student.skeleton.embed(self.outer, lesson.ids_BT.to(student.device))
        with torch.enable_grad():
            rotated_BTD = in_basis(embedded_BTD, leaf_basis)
        runs = student.runs(leaf_basis, embedded_BTD)
        *states, last_BTD = run_forward(runs, rotated_BTD.detach())
        loss, slope_BTD = head_loss(
            lambda hidden_BCD: student.skeleton.logits(
                self.outer, out_of_basis(hidden_BCD, leaf_basis)
            ),
            last_BTD,
            lesson.targets,
        )
        if not math.isfinite(loss):
            where = first_not_finite(student.skeleton, [*states, last_BTD])
            raise RotqError(f"transform: the loss is {loss} at step {step + 1}, first in {where}")
        slope_BTD = run_backward(runs, states, slope_BTD)
        if rotated_BTD.requires_grad:
            rotated_BTD.backward(slope_BTD)
        _pass_on(named, leaves, step)
        return loss


@torch.no_grad()
def divergence(
    student: Student, basis: Basis, outer: dict[str, Tensor], lessons: Sequence[Lesson]
) -> float:
    """Mean loss of a basis over windows, in nats per token."""
    total = 0.0
    for lesson in lessons:
        embedded_BTD = student.skeleton.embed(outer, lesson.ids_BT.to(student.device))
        hidden_BTD = in_basis(embedded_BTD, basis)
        for run in student.runs(basis, embedded_BTD):
            hidden_BTD = run(hidden_BTD)
        total += head_loss(
            lambda hidden_BCD: student.skeleton.logits(outer, out_of_basis(hidden_BCD, basis)),
            hidden_BTD,
            lesson.targets,
        )[0]
    return total / len(lessons)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 2 %."""
    return min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def in_basis(hidden_BTD: Tensor, basis: Basis) -> Tensor:
    """The residual stream of the original model in R1's basis."""
    R_DD = basis.residual_DD
    return hidden_BTD if R_DD is None else hidden_BTD @ R_DD.to(hidden_BTD)


def out_of_basis(hidden_BTD: Tensor, basis: Basis) -> Tensor:
    """The inverse of ``in_basis``."""
    R_DD = basis.residual_DD
    return hidden_BTD if R_DD is None else hidden_BTD @ R_DD.to(hidden_BTD).mT


def first_not_finite(skeleton: Skeleton, states: Sequence[Tensor]) -> str:
    """Name of the first block whose output has a NaN or an infinity; the head if none has."""
    for index, output_BTD in enumerate(states):
        if not torch.isfinite(output_BTD).all():
            return "the embedding" if index == 0 else skeleton.block_name(index - 1)
    return "the head"


def _pass_on(named: dict[str, Tensor], leaves: dict[str, Tensor], step: int) -> None:
    """Gradients of matrices and factors to the free parameters behind them."""
    for name, leaf in leaves.items():
        if leaf.grad is not None and not torch.isfinite(leaf.grad).all():
            raise RotqError(f"transform: the gradient of {name} is not finite at step {step + 1}")
    reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([named[n] for n in reached], [leaves[n].grad for n in reached])
