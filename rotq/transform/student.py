"""The model that is trained: original weights, a basis fused differentiably, and faked rounding.

A block is loaded, fused and rounded each time it is run, so that one block is in memory at a time.
What is rounded follows the recipe: what the linear layers read (per token), keys and values (per
head and token), and the weights if ``rounds_weights``. Where activations are rounded in training
the weights are better left alone: GPTQ makes up for most of their error afterwards (SpinQuant,
arXiv 2405.16406, section 4.3).

Shape suffixes: B windows, T positions, D hidden size, N out features, K in features.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rotq.formats.activations import ActivationGrid
from rotq.formats.straight_through import round_through
from rotq.layers import RotatedLinear
from rotq.models.changed_attention import changed_attention
from rotq.models.skeleton import Skeleton
from rotq.models.tensors import TensorSource
from rotq.plan import Plan
from rotq.recipe import Recipe
from rotq.rotations.basis import Basis
from rotq.rotations.fuse import fused_tensors, rotate_online
from rotq.rotations.hadamard import fast_hadamard


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in a basis, block by block."""

    skeleton: Skeleton
    source: TensorSource
    recipe: Recipe
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    rounds_weights: bool

    def runs(self, basis: Basis, like_BTD: Tensor) -> list[functools.partial[Tensor]]:
        """Functions of hidden states, one per block, for inputs of this shape."""
        return [
            functools.partial(
                self.run_block, index, basis, self.skeleton.block_kwargs(index, like_BTD)
            )
            for index in range(self.skeleton.num_blocks)
        ]

    def run_block(
        self, index: int, basis: Basis, kwargs: dict[str, Any], hidden_BTD: Tensor
    ) -> Tensor:
        """The block's output, differentiable in the input and in the basis."""
        block, tensors = self.fused_block(index, basis)
        with self._attention(block):
            output = functional_call(block, tensors, (hidden_BTD,), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def fused_block(self, index: int, basis: Basis) -> tuple[nn.Module, dict[str, Tensor]]:
        """A block that rounds what its linears read, and the parameters it is to be run with."""
        block = self.skeleton.load_block(index, self.source, device=self.device, dtype=self.dtype)
        adapter = self.skeleton.adapter
        stored = dict(block.named_parameters())
        tensors = {
            name: tensor.to(self.dtype)
            for name, tensor in fused_tensors(block, stored, adapter, basis, index)
        }
        rotate_online(block, adapter, basis)
        prefix = self.skeleton.block_name(index)
        for site in adapter.sites(block):
            for path in site.linears:
                grid = self.plan.grids.get(f"{prefix}.{path}")
                if grid is None:
                    continue
                name = f"{path}.weight"
                if self.rounds_weights:
                    like = ActivationGrid(bits=grid.bits, symmetric=grid.symmetric)
                    weight_NK = tensors.get(name, stored[name])
                    tensors[name] = round_through(weight_NK, like, group_size=grid.group_size)
                _round_reads(block.get_submodule(path), self.activation_grid)
        return block, tensors

    @property
    def activation_grid(self) -> ActivationGrid | None:
        """Of what linears read; None where that is not rounded."""
        chosen = self.recipe.activations
        if chosen.bits == 16:
            return None
        return ActivationGrid(bits=chosen.bits, symmetric=chosen.symmetric)

    def first_not_finite(
        self, index: int, basis: Basis, kwargs: dict[str, Any], hidden_BTD: Tensor
    ) -> str:
        """Full name of the first linear layer of a block that gives a NaN or an infinity."""
        block, tensors = self.fused_block(index, basis)
        found: list[str] = []

        def look(name: str, _: nn.Module, __: object, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                found.append(name)

        for site in self.skeleton.adapter.sites(block):
            for path in site.linears:
                hook = functools.partial(look, path)
                block.get_submodule(path).register_forward_hook(hook)
        with self._attention(block):
            functional_call(block, tensors, (hidden_BTD,), kwargs)
        return ".".join([self.skeleton.block_name(index), *found[:1]])

    def _attention(self, block: nn.Module) -> AbstractContextManager[None]:
        chosen = self.recipe.kv_cache
        if chosen.bits == 16:
            return nullcontext()
        grid = ActivationGrid(bits=chosen.bits, symmetric=chosen.symmetric)
        turned = self.recipe.rotation.attention != "none"

        def change(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if turned:
                q, k = fast_hadamard(q), fast_hadamard(k)
            return q, round_through(k, grid), round_through(v, grid)

        return changed_attention(block, change)


def _round_reads(linear: nn.Module, grid: ActivationGrid | None) -> None:
    """Let a linear layer, on this instance, round what it reads behind its online rotation."""
    if grid is None:
        return

    def forward(x: Tensor) -> Tensor:
        if isinstance(linear, RotatedLinear):
            x = linear.rotate_input(x)
        return F.linear(round_through(x, grid), linear.weight, linear.bias)  # type: ignore[arg-type]

    linear.forward = forward  # type: ignore[method-assign]
