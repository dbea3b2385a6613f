"""The model that is trained: original weights, a basis fused differentiably, and faked rounding.

A block is loaded, fused and rounded each time it is run, so that one block is in memory at a time.
What is rounded follows the plan: what the linear layers read (per token), keys and values (per
head and token), and the weights if ``rounds_weights``. Where activations are rounded in training
the weights are better left alone: GPTQ makes up for most of their error afterwards (SpinQuant,
arXiv 2405.16406, section 4.3).

Shape suffixes: B windows, T positions, D hidden size, N out features, K in features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.fusion.fuse import fold_norms, fused_tensors, rotate_online
from rotq.job.context import Job
from rotq.rotations.basis import Basis


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in a basis, block by block."""

    job: Job
    rounds_weights: bool

    def runs(self, basis: Basis, like_BTD: Tensor) -> list[functools.partial[Tensor]]:
        """Functions of hidden states, one per block, for inputs of this shape."""
        return [
            functools.partial(
                self.run_block, index, basis, self.job.skeleton.block_kwargs(index, like_BTD)
            )
            for index in range(self.job.skeleton.num_blocks)
        ]

    def run_block(
        self, index: int, basis: Basis, kwargs: dict[str, Any], hidden_BTD: Tensor
    ) -> Tensor:
        """The block's output, differentiable in the input and in the basis."""
        block, tensors = self.fused_block(index, basis)
        output = functional_call(block, tensors, (hidden_BTD,), kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def fused_block(self, index: int, basis: Basis) -> tuple[nn.Module, dict[str, Tensor]]:
        """A block that rounds as the finished model will, and the parameters to run it with."""
        job, skeleton = self.job, self.job.skeleton
        prefix, block = skeleton.block_name(index), job.load_block(index, job.dtype)
        fold_norms(block, skeleton.adapter, basis)
        stored = dict(block.named_parameters())
        tensors = {
            name: tensor.to(job.dtype)
            for name, tensor in fused_tensors(block, stored, skeleton.adapter, basis, index)
        }
        rotate_online(block, skeleton.adapter, basis)
        job.plan.round_online(block, prefix, skeleton.adapter)
        if self.rounds_weights:
            for name, weight_NK in {**stored, **tensors}.items():
                grid = job.plan.grids.get(f"{prefix}.{name.removesuffix('.weight')}")
                if grid is not None and name.endswith(".weight"):
                    like = ActivationGrid(bits=grid.bits, symmetric=grid.symmetric)
                    rounded_NK = fake_quantize(weight_NK, like, group_size=grid.group_size)
                    tensors[name] = rounded_NK
        return block, tensors

    def first_not_finite(
        self, index: int, basis: Basis, kwargs: dict[str, Any], hidden_BTD: Tensor
    ) -> str:
        """Full name of the first linear layer of a block that gives a NaN or an infinity."""
        block, tensors = self.fused_block(index, basis)
        found: list[str] = []

        def look(name: str, _: nn.Module, __: object, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                found.append(name)

        for site in self.job.skeleton.adapter.sites(block):
            for path in site.linears:
                hook = functools.partial(look, path)
                block.get_submodule(path).register_forward_hook(hook)
        functional_call(block, tensors, (hidden_BTD,), kwargs)
        return ".".join([self.job.skeleton.block_name(index), *found[:1]])
