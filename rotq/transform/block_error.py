"""The loss of a basis block by block: what rounding changes in the outputs of single blocks.

    mean over blocks,   mean_t |y^_t - y_t R1|^2 / |y_t|^2

y is the original block's output, y^ that of the block in the basis with rounding faked, given the
original model's hidden states turned by R1. An error counts in proportion to its token's own size,
since that is what the next norm divides by. (Block-wise reconstruction is from BRECQ, arXiv
2102.05426; FlatQuant, arXiv 2410.09426, trains its transforms so, with absolute errors.)

Gradients end at the block's input, so that one block is in memory, once as it is and once in the
basis, and no graph is longer than a block.

Shape suffixes: B windows, T positions, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotq.calibration.capture import run_block
from rotq.errors import RotqError
from rotq.fusion.fuse import in_basis
from rotq.models.streaming import trim_now_and_then
from rotq.rotations.basis import Basis
from rotq.transform.parameters import Parameters
from rotq.transform.student import Student
from rotq.transform.trainer import pass_on


def backward(
    student: Student, parameters: Parameters, outer: dict[str, Tensor], ids_BT: Tensor, step: int
) -> float:
    """One window's loss; adds its gradients to the free parameters.

    Args:
        outer: The original model's tensors outside the blocks.
        ids_BT: (1, T).

    Raises:
        RotqError: the loss is not finite; names the step and the first layer where it is not.
    """
    named = parameters.basis().tensors()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    basis = parameters.start.with_tensors(leaves)
    num_blocks, total = student.job.skeleton.num_blocks, 0.0
    hidden_BTD = student.job.skeleton.embed(outer, ids_BT.to(student.job.device))
    for index in range(num_blocks):
        output_BTD = _original(student, index, hidden_BTD)
        loss = block_loss(student, index, basis, hidden_BTD, output_BTD) / num_blocks
        if not math.isfinite(loss.item()):
            where = _first_not_finite(student, index, basis, hidden_BTD)
            raise RotqError(
                f"transform: the loss is {loss.item()} at step {step + 1}, first in {where}"
            )
        loss.backward()
        total += loss.item()
        hidden_BTD = output_BTD
        trim_now_and_then(index)
    pass_on(named, leaves)
    return total


def block_loss(
    student: Student, index: int, basis: Basis, hidden_BTD: Tensor, output_BTD: Tensor
) -> Tensor:
    """Of one block, differentiable in the basis.

    Args:
        hidden_BTD: What the original block is given.
        output_BTD: What it makes of it.
    """
    kwargs = student.job.skeleton.block_kwargs(index, hidden_BTD)
    found_BTD = student.run_block(index, basis, kwargs, in_basis(hidden_BTD, basis))
    error_BT = (found_BTD - in_basis(output_BTD, basis)).float().square().sum(-1)
    energy_BT = output_BTD.float().square().sum(-1)
    return (error_BT / energy_BT.clamp(min=torch.finfo(torch.float32).tiny)).mean()


@torch.no_grad()
def _original(student: Student, index: int, hidden_BTD: Tensor) -> Tensor:
    job = student.job
    block = job.load_block(index, job.dtype)
    return run_block(block, hidden_BTD, job.skeleton.block_kwargs(index, hidden_BTD))


@torch.no_grad()
def _first_not_finite(student: Student, index: int, basis: Basis, hidden_BTD: Tensor) -> str:
    kwargs = student.job.skeleton.block_kwargs(index, hidden_BTD)
    return student.first_not_finite(index, basis, kwargs, in_basis(hidden_BTD, basis))
