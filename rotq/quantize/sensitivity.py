"""What the loss feels of each layer's rounding, by its grid; and the grids that a budget buys.

    loss(W^) - loss(W) ~ 1/2 sum_n f_n (w^_n - w_n) H (w^_n - w_n)^T
    f_n = mean over tokens of g_tn^2       H = sum_t r_t x_t x_t^T / sum_t r_t,  r_t = sum_n g_tn^2

g is the slope of the model's own sampled loss at what the layer puts out (see ``gradients``), so
that this is the expected rise of the KL to the original in nats per token: the layer's Fisher
information with tokens and rows taken apart. r is GuidedQuant's weight (arXiv 2505.07004), the sum
over layers HAWQ-V2's (arXiv 1911.03852). w^ is what the recipe's solver makes of some of the rows
with that H, without refinement, so that the feedback of GPTQ is counted.

Shape suffixes: M tokens, N out features, K in features, R rows that are tried, C grids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rotq.devices import double
from rotq.errors import RotqError
from rotq.job.context import Job
from rotq.job.mixed import Unit
from rotq.job.part_names import SENSITIVITIES
from rotq.models.adapter import Site
from rotq.solvers.budget import spend
from rotq.solvers.trial import trial_losses

TRIED_ROWS, TRIED_ROWS_OF_UNIT = 64, 1024
"""Of a layer, and of all layers of a unit together, at most."""


@dataclass
class _SiteSums:
    """Of one input: sums of r x x^T and r."""

    hessian_KK: Tensor
    weight: float = 0.0
    tokens: int = 0
    window: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """x (M, K) and r (M) of the window that is being run."""


class Sensitivities:
    """Collects, block by block, what a backward pass shows of its layers' inputs and slopes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.found: dict[str, list[float]] = {}
        """Losses by name of the unit, one for each of its grids."""
        self._site_of: dict[str, str] = {}
        self._sites: dict[str, _SiteSums] = {}
        self._fisher: dict[str, Tensor] = {}

    def start(self, block: nn.Module) -> None:
        """Forget the block before."""
        sites: Sequence[Site] = self.job.skeleton.adapter.sites(block)
        self._site_of = {path: site.name for site in sites for path in site.linears}
        self._sites, self._fisher = {}, {}

    def see(self, path: str, x: Tensor, slope: Tensor) -> None:
        """Add what a layer was given in a window, and the slope at what it made of that.

        Args:
            path: Inside the block.
            x, slope: (..., K) and (..., N).
        """
        x_MK, square_MN = x.detach().flatten(0, -2), slope.flatten(0, -2).float().square()
        site = self._sites.get(self._site_of[path])
        if site is None:
            K = x_MK.shape[1]
            site = _SiteSums(torch.zeros(K, K, device=x_MK.device))
            self._sites[self._site_of[path]] = site
        site.window.append((x_MK, square_MN.sum(1)))
        fisher_N = square_MN.sum(0)
        self._fisher[path] = self._fisher[path] + fisher_N if path in self._fisher else fisher_N

    def end_window(self, num_tokens: int) -> None:
        """Take the window's inputs, each once, into the sums."""
        for site in self._sites.values():
            site.tokens += num_tokens
            joined: dict[int, tuple[Tensor, Tensor]] = {}
            for x_MK, r_M in site.window:
                before = joined.get(x_MK.data_ptr())
                joined[x_MK.data_ptr()] = (x_MK, r_M if before is None else before[1] + r_M)
            for x_MK, r_M in joined.values():
                x_MK = x_MK.float()
                site.hessian_KK.addmm_((x_MK * r_M[:, None]).T, x_MK)
                site.weight += double(r_M).sum().item()
            site.window.clear()

    def finish(self, index: int, block: nn.Module) -> None:
        """Try the grids on the block's layers.

        Raises:
            RotqError: the loss has no gradient at a unit's layers, or one that is not finite.
        """
        self._sum_over_processes()
        prefix = f"{self.job.skeleton.block_name(index)}."
        for unit in self.job.plan.units:
            if unit.name.startswith(prefix):
                self.found[unit.name] = self._losses(unit, prefix, block)
        self.start(block)

    def _sum_over_processes(self) -> None:
        ranks = self.job.ranks
        for site in self._sites.values():
            ranks.sum_(site.hessian_KK)
            site.weight, tokens = ranks.total(site.weight, site.tokens)
            site.tokens = int(tokens)
        ranks.sum_(*self._fisher.values())

    def _losses(self, unit: Unit, prefix: str, block: nn.Module) -> list[float]:
        by_site: dict[str, dict[str, Tensor]] = {}
        for name in unit.layers:
            path = name.removeprefix(prefix)
            fisher_N = self._fisher.get(path)
            if fisher_N is not None and fisher_N.any():
                by_site.setdefault(self._site_of[path], {})[path] = fisher_N
        if not by_site:
            raise RotqError(
                f"{unit.name}: the loss has no gradient there, so weights.average_bits cannot "
                "weigh it; an override can give it bits"
            )
        if not all(
            fisher_N.isfinite().all() for of in by_site.values() for fisher_N in of.values()
        ):
            raise RotqError(f"{unit.name}: the gradient of the loss is not finite")
        rows = max(1, min(TRIED_ROWS, TRIED_ROWS_OF_UNIT // len(unit.layers)))
        parts = [
            self._of_site(unit, self._sites[site], fisher, block, rows)
            for site, fisher in by_site.items()
        ]
        losses: list[float] = torch.stack(parts).sum(0).tolist()
        return losses

    def _of_site(
        self,
        unit: Unit,
        sums: _SiteSums,
        fisher: Mapping[str, Tensor],
        block: nn.Module,
        rows: int,
    ) -> Tensor:
        """(C) nats per token that layers of one input lose, from some rows of each.

        Args:
            fisher: Sum of squared slopes of each row, by path.
        """
        weights, shares = [], []
        for path, fisher_N in fisher.items():
            weight_NK = block.get_parameter(f"{path}.weight")
            N = len(weight_NK)
            picked_R = torch.linspace(0, N - 1, min(rows, N), device=fisher_N.device).long()
            tried_R = double(fisher_N[picked_R]).clamp(min=1e-30)
            weights.append(weight_NK[picked_R].float())
            # rows that are not tried lose like those that are
            shares.append(tried_R * double(fisher_N).sum() / tried_R.sum())
        loss_CR = trial_losses(
            torch.cat(weights),
            sums.hessian_KK / sums.weight,
            unit.grids,
            replace(self.job.recipe.solver, refine_sweeps=0),
            scale_dtype=self.job.plan.scale_dtype,
        )
        return (double(loss_CR) @ torch.cat(shares)).cpu() / (2 * sums.tokens)


def choose_grids(job: Job) -> Job:
    """The job with the grids that its budget buys, from what was recorded of a finished pass."""
    if not job.plan.units:
        return job
    losses = job.results(SENSITIVITIES)["losses"]
    # the least that there is, as an average, may be a rounding error below itself
    budget = job.recipe.weights.average_bits * job.plan.num_weights * (1 + 1e-12)
    chosen = spend(
        [unit.bits for unit in job.plan.units],
        [losses[unit.name] for unit in job.plan.units],
        budget,
    )
    return replace(job, plan=job.plan.choosing(chosen))


def predicted(job: Job) -> dict[str, float]:
    """For the report: what was asked for, and what the chosen grids were expected to lose."""
    if not job.plan.units:
        return {}
    losses = job.folder.results(SENSITIVITIES)["losses"]
    chosen = [unit.grids.index(job.plan.grids[unit.name]) for unit in job.plan.units]
    return {
        "average_bits": job.recipe.weights.average_bits,
        "predicted_kl": sum(
            losses[unit.name][index] for unit, index in zip(job.plan.units, chosen, strict=True)
        ),
    }
