"""What the moments of a layer's inputs come to: a damped Hessian, factored once for all its rows.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.recipe import Solver
from rotq.solvers.gptq import Elimination, eliminate
from rotq.solvers.statistics import Moments, corrected_target


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """What a site's moments come to, once for all weights that read its input."""

    hessian_KK: Tensor | None
    """H, damped where columns were factored; None: the factor has its place, or it is I."""
    cross_KK: Tensor | None
    """D, where targets are corrected."""
    elimination: Elimination | None
    """None where rows are rounded to nearest."""
    dead_K: Tensor | None
    """bool, columns that no token reaches, where columns were factored."""

    @classmethod
    def of(cls, moments: Moments | None, options: Solver, *, spend: bool = False) -> Curvature:
        """Damp and factor.

        Args:
            moments: None (round to nearest only) stands for H = I.
            options: The recipe's.
            spend: Nothing else needs the moments: their memory is worked in, and H is given up
                where nothing but its factor is looked at.

        Raises:
            ValueError: an unknown order, or GPTQ without moments.
            RotqError: the Hessian is not finite or cannot be made positive definite.
        """
        if moments is None:
            if options.method != "rtn":
                raise ValueError(f"{options.method} needs moments of the inputs")
            return cls(hessian_KK=None, cross_KK=None, elimination=None, dead_K=None)
        if spend:
            moments.settle()
            hessian_KK, cross_KK = moments.hessian_sum_KK, moments.cross_sum_KK
        else:
            hessian_KK, cross_KK = moments.hessian_KK(), moments.cross_KK()
        if options.method == "rtn":
            return cls(hessian_KK=hessian_KK, cross_KK=None, elimination=None, dead_K=None)
        dead_K = hessian_KK.diagonal() == 0
        kept = not spend or options.looks_at_hessian
        elimination = eliminate(hessian_KK, options.order, options.damping, in_place=not kept)
        return cls(
            hessian_KK=elimination.damp_(hessian_KK) if kept else None,
            cross_KK=cross_KK if options.target_correction else None,
            elimination=elimination,
            dead_K=dead_K,
        )

    def to(self, device: torch.device) -> Curvature:
        """The same there."""
        moved = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return Curvature(**moved)

    def target(self, weight_NK: Tensor, alpha: float) -> Tensor:
        """What codes are to come near, (N, K) fp32: dead columns are 0.

        Args:
            weight_NK: fp32, not modified.
            alpha: Of the target correction.
        """
        assert self.elimination is not None
        assert self.dead_K is not None
        if self.cross_KK is not None:
            weight_NK = corrected_target(weight_NK, self.cross_KK, self.elimination, alpha)
        return weight_NK.masked_fill(self.dead_K, 0.0)

    def quadratic(self, x_NK: Tensor) -> Tensor:
        """x H x^T of each row, H not damped: (N) fp32."""
        if self.hessian_KK is None and self.elimination is None:
            return x_NK.square().sum(-1)
        if self.hessian_KK is None:
            assert self.elimination is not None
            return self.elimination.quadratic(x_NK).to(x_NK)
        sums_N = (x_NK @ self.hessian_KK).mul_(x_NK).sum(-1)
        if self.elimination is None:
            return sums_N
        return sums_N - x_NK.square() @ self.elimination.added_K
