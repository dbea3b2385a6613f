"""The loss of a basis layer by layer: the error that rounding is expected to make in it.

Per linear layer and token, as a share of its output's energy sum_t |W x_t|^2, in the basis:

    weights       sum_n s_n^2 / 12  c           c = sum_k 1 / U_kk^2 of the layer's inputs (damped)
    activations   mean_t s_t^2 / 12  sum_nk w'_nk^2

with s_n and s_t the steps that rows of the fused weight w' and tokens of the layer's input need: an
error that is uniform in a step is a twelfth of its square in the mean. The loss is differentiated
in the basis through both ranges and w'. c is taken once, in the original basis: it is at least
K det(H)^(1/K), which neither rotations nor scales of geometric mean one change. Nothing is rounded
and no gradient passes through the model, so that a step takes some blocks only, and a few hundred
of them cost what a few steps through the model do.

Shape suffixes: B windows, T positions, D hidden size, M tokens, N out features, K in features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rotq.calibration.capture import run_block
from rotq.fusion.maps import LinearMap, block_maps
from rotq.job.context import Job
from rotq.models.exact import normalized
from rotq.models.experts import calibrating
from rotq.rotations.basis import Basis
from rotq.solvers.gptq import eliminate
from rotq.solvers.statistics import Moments
from rotq.transform.parameters import Parameters
from rotq.transform.trainer import pass_on

BLOCKS_PER_STEP = 8

TOKENS = 512
"""Tokens of a block that a step looks at."""

ANGLE, SCALE_RATE = 0.04, 0.03
"""What a step turns a matrix by and changes a scale by, at most; see ``trainer.Pace``."""


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Linear layers that read one input, and what does not depend on the basis."""

    site: str
    """``Site.name``."""
    linears: tuple[str, ...]
    """Planned ones, by path inside the block."""
    spread: float
    """c of the module's docstring."""
    energy: dict[str, float]
    """Of each linear's output per token."""


@dataclass(kw_only=True)
class LayerLoss:
    """The loss of one model; ``measure`` first."""

    job: Job
    folds_gains: bool
    """R1 moves the gains of norms into the weights."""
    hidden: list[list[Tensor]] = field(default_factory=list)
    """(B, T, D) inputs of every block in the original model, by block and batch; on the CPU."""
    sites: list[list[Readers]] = field(default_factory=list)
    """Of every block."""

    @torch.no_grad()
    def measure(self, embedded: Sequence[Tensor]) -> None:
        """Run the original model over (B, T, D) batches of embedded calibration tokens."""
        batches = list(embedded)
        for index in range(self.job.skeleton.num_blocks):
            block = self.job.load_block(index, torch.float32)
            self.hidden.append([hidden_BTD.cpu() for hidden_BTD in batches])
            seen = [self._features(index, block, hidden_BTD) for hidden_BTD in batches]
            self.sites.append(self._sites(index, block, [features for features, _ in seen]))
            batches = [output_BTD for _, output_BTD in seen]

    def backward(self, parameters: Parameters, step: int) -> float:
        """Mean over layers of a step's blocks; adds its gradients to the free parameters."""
        named = parameters.basis().tensors()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
        basis = parameters.start.with_tensors(leaves)
        total = 0.0
        chosen = spaced(step, self.job.skeleton.num_blocks, BLOCKS_PER_STEP)
        for index in chosen:
            batches = self.hidden[index]
            hidden_BTD = batches[step % len(batches)]
            hidden_BTD = hidden_BTD[:, : max(1, TOKENS // len(hidden_BTD))].to(self.job.device)
            loss = self._block_loss(index, hidden_BTD, basis) / len(chosen)
            loss.backward()
            total += loss.item()
        pass_on(named, leaves)
        return total

    def _block_loss(self, index: int, hidden_BTD: Tensor, basis: Basis) -> Tensor:
        job, skeleton = self.job, self.job.skeleton
        block = job.load_block(index, torch.float32)
        with torch.no_grad():
            features, _ = self._features(index, block, hidden_BTD)
        stored = dict(block.named_parameters())
        reads, writes = block_maps(block, stored, skeleton.adapter, basis, index)
        # what o and down write is turned by R1, which changes the steps of their rows and no more
        written = (skeleton.adapter.attention_output, *skeleton.adapter.mlp_writers(block))
        losses = []
        for site in self.sites[index]:
            read = reads[site.linears[0]]
            squared_step = torch.zeros((), device=job.device)
            inputs = job.plan.inputs
            if inputs is not None:
                x_MK = _in_basis(features[site.site], read, site.site)
                squared_step = squared_steps(x_MK, inputs.bits, inputs.symmetric).mean()
            spread = site.spread / _mean_scale(read, site.site).square()
            for path in site.linears:
                weight_NK = reads[path](stored[f"{path}.weight"])
                error = squared_step * weight_NK.square().sum()
                if path in written:
                    weight_NK = writes[path].on_rows(weight_NK)
                grid = job.plan.grids[f"{skeleton.block_name(index)}.{path}"]
                rows = weight_NK.unflatten(-1, (-1, grid.columns_per_group(weight_NK.shape[1])))
                steps_NG = squared_steps(rows, grid.bits, grid.symmetric)
                error = error + steps_NG.mean(-1).sum() * spread
                losses.append(error / 12 / site.energy[path])
        return torch.stack(losses).mean()

    def _features(
        self, index: int, block: nn.Module, hidden_BTD: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the linears of each site read, (M, K), in the original basis; the block's output.

        Behind norms it is taken without their gain where that is moved into the weights.
        """
        adapter, features = self.job.skeleton.adapter, dict[str, Tensor]()

        def see(name: str, norm: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = normalized(module, args[0]) if norm else args[0]
            if norm and not self.folds_gains:
                x = x * self._gain(block, norm)
            features[name] = x.flatten(0, -2)

        norms = {"qkv": adapter.attention_norm, "gate_up": adapter.mlp_norm}
        handles = []
        for site in adapter.sites(block):
            norm = norms.get(site.name, "")
            module = block.get_submodule(norm or site.linears[0])
            hook = functools.partial(see, site.name, norm)
            handles.append(module.register_forward_pre_hook(hook))
        kwargs = self.job.skeleton.block_kwargs(index, hidden_BTD)
        with calibrating(block):
            output_BTD = run_block(block, hidden_BTD, kwargs)
        for handle in handles:
            handle.remove()
        return features, output_BTD

    def _sites(
        self, index: int, block: nn.Module, seen: Sequence[dict[str, Tensor]]
    ) -> list[Readers]:
        job, adapter = self.job, self.job.skeleton.adapter
        prefix = job.skeleton.block_name(index)
        norms = {"qkv": adapter.attention_norm, "gate_up": adapter.mlp_norm}
        folded = norms if self.folds_gains else {}
        gains = {name: self._gain(block, norm) for name, norm in folded.items()}
        found = []
        for site in adapter.sites(block):
            planned = tuple(p for p in site.linears if f"{prefix}.{p}" in job.plan.grids)
            if not planned:
                continue
            moments = Moments(seen[0][site.name].shape[1], cross=False, device=job.device)
            for features in seen:
                moments.add(features[site.name], None, None)
            hessian_KK = moments.hessian_KK()
            energy = {}
            for path in planned:
                weight_NK = block.get_parameter(f"{path}.weight") * gains.get(site.name, 1.0)
                products_NK = (weight_NK @ hessian_KK) * weight_NK
                energy[path] = max(products_NK.double().sum().item(), 1e-30)
            damping = job.recipe.solver.damping
            factor_KK = eliminate(hessian_KK, "natural", damping, in_place=True).factor_KK
            spread = factor_KK.diagonal().double().square().sum().item()
            found.append(Readers(site=site.name, linears=planned, spread=spread, energy=energy))
        return found

    def _gain(self, block: nn.Module, norm: str) -> Tensor:
        return self.job.skeleton.adapter.norm_offset + block.get_parameter(f"{norm}.weight")


def spaced(step: int, total: int, count: int) -> list[int]:
    """Blocks of a step: evenly spaced, each step the ones behind those of the step before."""
    count = min(count, total)
    return [(step + turn * (total // count)) % total for turn in range(count)]


def _in_basis(x_MK: Tensor, read: LinearMap, site: str) -> Tensor:
    """Features as the fused layers read them; gains that weights take are not in ``x_MK``."""
    return (
        LinearMap(None, read.matrix, read.after).features(x_MK)
        if _behind_norm(site)
        else read.features(x_MK)
    )


def _mean_scale(read: LinearMap, site: str) -> Tensor:
    """Geometric mean of the factors that a basis adds to a site's weights."""
    factors = read.after if _behind_norm(site) else read.before
    return torch.ones(()) if factors is None else factors.abs().log().mean().exp()


def _behind_norm(site: str) -> bool:
    return site in ("qkv", "gate_up")


def squared_steps(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """s^2 of the grid that covers the range over the last axis."""
    high, low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
    reach = 2 * torch.maximum(high, -low) if symmetric else high - low
    return (reach / (2**bits - 1)).square()
