"""A basis from the weights alone: the one in which their fourth powers are smallest.

    minimize over R1, R2   sum over blocks and linear layers, sum_nk w'_nk^4 / sum_nk w'_nk^2 * NK

w' are the fused weights. A rotation keeps sum w^2 of a layer, so fourth powers measure how far
single entries stick out, which is what the step of a grid has to cover. OptRot (arXiv 2512.24124);
here every layer counts alike (its mean square is divided out), and a step takes some blocks.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.fusion.fuse import fold_norms, fused_tensors
from rotq.job.context import Job
from rotq.transform.layer_loss import BLOCKS_PER_STEP, spaced
from rotq.transform.parameters import Parameters
from rotq.transform.trainer import pass_on


def backward(job: Job, parameters: Parameters, step: int) -> float:
    """Kurtosis-like mean of w^4 / (mean w^2)^2 over layers: 3 for normal weights, 1 at least.

    Adds its gradients to the free parameters. The blocks of a step follow those of the step before.
    """
    named = parameters.basis().tensors()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    basis = parameters.start.with_tensors(leaves)
    total = 0.0
    chosen = spaced(step, job.skeleton.num_blocks, BLOCKS_PER_STEP)
    for index in chosen:
        block = job.load_block(index, torch.float32)
        fold_norms(block, job.skeleton.adapter, basis)
        stored = dict(block.named_parameters())
        fused = dict(fused_tensors(block, stored, job.skeleton.adapter, basis, index))
        flatness = [
            _flatness(fused[f"{path}.weight"])
            for site in job.skeleton.adapter.sites(block)
            for path in site.linears
            if f"{path}.weight" in fused
        ]
        loss = torch.stack(flatness).mean() / len(chosen)
        loss.backward()
        total += loss.item()
    pass_on(named, leaves)
    return total


def _flatness(weight_NK: Tensor) -> Tensor:
    square_NK = weight_NK.square()
    return square_NK.square().mean() / square_NK.mean().square()
