"""The error that rounding is expected to make in a basis, from moments, without rounding anything.

Per linear layer and token, as a share of its output's energy tr(W H W^T):

    weights       sum_n s_n^2 / 12  sum_k 1 / U_kk^2,   H^-1 = U^T U (damped)
    activations   mean_t s_t^2 / 12  sum_nk w_nk^2

s_n is the step of a weight row's grid, s_t that of a token; an error that is uniform in a step is a
twelfth of its square in the mean (research note weights.md, 3.1 and 3.10). Scores are summed.

Shape suffixes: B windows, T positions, D hidden size, M tokens, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.capture import capture_inputs, run_block
from rotq.formats.integer import Grid
from rotq.fusion.fuse import fuse_block, in_basis
from rotq.job.context import Job
from rotq.layers.online_linear import OnlineLinear
from rotq.models.experts import calibrating
from rotq.rotations.basis import Basis
from rotq.solvers.gptq import damp, inverse_factor
from rotq.solvers.statistics import Moments


@dataclass(frozen=True)
class Judge:
    """Scores bases of one model, with the job's grids and damping."""

    job: Job

    @torch.no_grad()
    def scores(self, bases: Mapping[str, Basis], embedded: Sequence[Tensor]) -> dict[str, float]:
        """The sum over planned layers for each basis; lower is better.

        Args:
            bases: By name.
            embedded: (B, T, D) calibration tokens as the original model embeds them, by batch.
        """
        job, skeleton, hidden = self.job, self.job.skeleton, list(embedded)
        scores = dict.fromkeys(bases, 0.0)
        for index in range(skeleton.num_blocks):
            kwargs = [skeleton.block_kwargs(index, hidden_BTD) for hidden_BTD in hidden]
            batches = list(zip(hidden, kwargs, strict=True))
            for name, basis in bases.items():
                block = job.load_block(index, torch.float32)
                fuse_block(block, skeleton.adapter, basis, index)
                turned = [(in_basis(hidden_BTD, basis), given) for hidden_BTD, given in batches]
                scores[name] += self._block_score(index, block, turned)
            block = job.load_block(index, torch.float32)
            hidden = [run_block(block, hidden_BTD, given) for hidden_BTD, given in batches]
        return scores

    def _block_score(
        self, index: int, block: nn.Module, batches: Sequence[tuple[Tensor, dict[str, Any]]]
    ) -> float:
        job, total = self.job, 0.0
        prefix, grids = job.skeleton.block_name(index), job.plan.grids
        sites = [
            (site.linears[0], [p for p in site.linears if f"{prefix}.{p}" in grids])
            for site in job.skeleton.adapter.sites(block)
        ]
        moments: dict[str, Moments] = {}
        steps: dict[str, float] = {}
        with calibrating(block):
            for hidden_BTD, given in batches:
                seen, _ = capture_inputs(block, [first for first, _ in sites], hidden_BTD, given)
                for first, x_MK in seen.items():
                    linear = block.get_submodule(first)
                    if isinstance(linear, OnlineLinear):
                        x_MK = linear.prepare_input(x_MK)
                    if first not in moments:
                        moments[first] = Moments(x_MK.shape[1], cross=False, device=job.device)
                    moments[first].add(x_MK, None, None)
                    steps[first] = steps.get(first, 0.0) + self._squared_steps(x_MK)
        for first, planned in sites:
            hessian_KK = moments[first].hessian_KK()
            step = steps[first] / max(moments[first].tokens, 1)
            for path in planned:
                weight_NK = block.get_parameter(f"{path}.weight")
                grid, damping = grids[f"{prefix}.{path}"], job.recipe.solver.damping
                total += layer_score(weight_NK, hessian_KK, grid, step, damping)
        return total

    def _squared_steps(self, x_MK: Tensor) -> float:
        """Sum over tokens of the square of the grid's step; 0 where inputs are not rounded."""
        inputs = self.job.plan.inputs
        if inputs is None:
            return 0.0
        return squared_steps(x_MK, inputs.bits, inputs.symmetric).sum().item()


def layer_score(
    weight_NK: Tensor, hessian_KK: Tensor, grid: Grid, squared_step: float, damping: float
) -> float:
    """Expected squared error of one layer's output per token, as a share of its energy.

    Args:
        weight_NK: In the basis.
        hessian_KK: Mean of x x^T in the basis, fp32.
        squared_step: Mean over tokens of the square of the activation grid's step; 0 for none.
        damping: Share of the mean diagonal.
    """
    damped_KK, _ = damp(hessian_KK, damping)
    spread_K = 1 / inverse_factor(damped_KK).diagonal().double().square()
    weight_NGg = weight_NK.float().view(len(weight_NK), -1, grid.columns_per_group(len(spread_K)))
    step_NG = squared_steps(weight_NGg, grid.bits, grid.symmetric).double()
    spread_G = spread_K.view(step_NG.shape[1], -1).sum(-1)
    error = (step_NG @ spread_G).sum() + squared_step * weight_NK.double().square().sum()
    energy = ((weight_NK.float() @ hessian_KK) * weight_NK).double().sum()
    return (error / 12 / energy.clamp(min=1e-30)).item()


def squared_steps(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """s^2 of the grid that covers the range over the last axis."""
    high, low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
    reach = 2 * torch.maximum(high, -low) if symmetric else high - low
    return (reach / (2**bits - 1)).square()
