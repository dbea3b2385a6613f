"""The loss of a basis: the model in it, with rounding faked, against the original model.

    mean_t KL-Top(p_t || p^_t)

Blocks are streamed, see ``models.streaming``; R1's and R2's gradients are summed over blocks before
they go through the parametrization. OSTQuant (arXiv 2501.13987) with these differences: factors are
fused by the function that fuses them into the result, and the range of what is rounded is
differentiated (``fake_quantize``).

Shape suffixes: B windows, T positions, D hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.calibration.capture import run_block
from rotq.errors import RotqError
from rotq.fusion.fuse import in_basis
from rotq.models.skeleton import Skeleton
from rotq.models.streaming import run_backward, run_forward
from rotq.rotations.basis import Basis
from rotq.transform.parameters import Parameters
from rotq.transform.student import Student
from rotq.transform.teacher import Targets, head_loss, likely_from
from rotq.transform.trainer import pass_on


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One window to train on."""

    ids_BT: Tensor
    """(1, T)."""
    targets: Targets


def backward(
    student: Student, parameters: Parameters, outer: dict[str, Tensor], lesson: Lesson, step: int
) -> float:
    """One window's loss in nats per token; adds its gradients to the free parameters.

    Args:
        outer: The original model's tensors outside the blocks.

    Raises:
        RotqError: the loss is not finite; names the step and the first block where it is not.
    """
    named = parameters.basis().tensors()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    basis = parameters.start.with_tensors(leaves)
    embedded_BTD = student.job.skeleton.embed(outer, lesson.ids_BT.to(student.job.device))
    rotated_BTD = in_basis(embedded_BTD, basis)
    runs = student.runs(basis, embedded_BTD)
    states = run_forward(runs, rotated_BTD.detach())
    last_BTD = states.pop()
    logits = _logits(student.job.skeleton, outer, basis)
    loss, slope_BTD = head_loss(logits, last_BTD, lesson.targets)
    if not math.isfinite(loss):
        where = _first_not_finite(student, basis, [*states, last_BTD])
        raise RotqError(f"transform: the loss is {loss} at step {step + 1}, first in {where}")
    slope_BTD = run_backward(runs, states, slope_BTD)
    if rotated_BTD.requires_grad:
        rotated_BTD.backward(slope_BTD)
    pass_on(named, leaves)
    return loss


@torch.no_grad()
def teach(
    student: Student, outer: dict[str, Tensor], windows: Sequence[Tensor], top_k: int
) -> list[Targets]:
    """What the original model makes likely in each window (1, T); one block in memory at a time."""
    job, skeleton = student.job, student.job.skeleton
    states = [skeleton.embed(outer, ids_BT.to(job.device)) for ids_BT in windows]
    for index in range(skeleton.num_blocks):
        block = job.load_block(index, job.dtype)
        for window, hidden_BTD in enumerate(states):
            kwargs = skeleton.block_kwargs(index, hidden_BTD)
            states[window] = run_block(block, hidden_BTD, kwargs)
    logits = functools.partial(skeleton.logits, outer)
    return [likely_from(logits, hidden_BTD, top_k) for hidden_BTD in states]


def _logits(
    skeleton: Skeleton, outer: dict[str, Tensor], basis: Basis
) -> Callable[[Tensor], Tensor]:
    R_DD = basis.residual_DD
    if R_DD is None:
        return lambda hidden_BCD: skeleton.logits(outer, hidden_BCD)
    return lambda hidden_BCD: skeleton.logits(outer, hidden_BCD @ R_DD.to(hidden_BCD).mT)


@torch.no_grad()
def _first_not_finite(student: Student, basis: Basis, states: Sequence[Tensor]) -> str:
    """Where a NaN or an infinity comes up first, in words."""
    for index, output_BTD in enumerate(states):
        if torch.isfinite(output_BTD).all():
            continue
        if index == 0:
            return "the embedding"
        given_BTD = states[index - 1]
        kwargs = student.job.skeleton.block_kwargs(index - 1, given_BTD)
        return student.first_not_finite(index - 1, basis, kwargs, given_BTD)
    return "the head"
