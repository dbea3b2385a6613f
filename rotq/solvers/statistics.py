"""Weighted second moments of a layer's inputs.

    H = sum_t r_t x~_t^T x~_t / sum_t r_t              x~: inputs in the partly quantized model
    D = sum_t r_t (x_t - x~_t)^T x~_t / sum_t r_t      x:  inputs in the original model

r_t is the importance of token t (RSQ, arXiv 2503.01820, released form: linear in r).
D is what the asymmetric target correction needs (Qronos, arXiv 2505.11695; QEP, arXiv 2504.09629).
Shape suffixes: M tokens, K features.
"""

import torch
from torch import Tensor

from rotq.devices import double
from rotq.phases import phase
from rotq.ranks import Ranks
from rotq.solvers.factor import add_lower_, mirror_, solved_rows
from rotq.solvers.gptq import Elimination


class Moments:
    """Running sums of H, from the diagonal down, and of D in fp32 over batches of tokens."""

    def __init__(self, features: int, *, cross: bool, device: torch.device) -> None:
        self.hessian_sum_KK = torch.zeros(features, features, device=device)
        self.cross_sum_KK = torch.zeros_like(self.hessian_sum_KK) if cross else None
        self.weight_sum = 0.0
        self.tokens = 0

    @phase("moments")
    def add(self, x_MK: Tensor, original_MK: Tensor | None, weight_M: Tensor | None) -> None:
        """Add a batch of inputs.

        Args:
            x_MK: Inputs in the quantized stream, any float dtype.
            original_MK: The same tokens' inputs in the original stream; needed if ``cross``.
            weight_M: Importance, at least 0; None counts every token once.

        Raises:
            ValueError: ``original_MK`` is missing although cross moments were asked for.
        """
        x_MK = x_MK.float()
        weighted_MK = x_MK if weight_M is None else x_MK * weight_M.to(x_MK)[:, None]
        add_lower_(self.hessian_sum_KK, weighted_MK, x_MK)
        if self.cross_sum_KK is not None:
            if original_MK is None:
                raise ValueError("cross moments need the original stream's inputs")
            self.cross_sum_KK.addmm_((original_MK.float() - x_MK).T, weighted_MK)
        self.tokens += x_MK.shape[0]
        if weight_M is None:
            self.weight_sum += x_MK.shape[0]
        else:
            self.weight_sum += double(weight_M).sum().item()

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes have seen."""
        ranks.sum_(self.hessian_sum_KK)
        if self.cross_sum_KK is not None:
            ranks.sum_(self.cross_sum_KK)
        self.weight_sum, tokens = ranks.total(self.weight_sum, self.tokens)
        self.tokens = int(tokens)

    def settle(self) -> None:
        """Make H and D of their sums where they are: nothing can be added, and no copy is made.

        ``hessian_sum_KK`` and ``cross_sum_KK`` are H and D then; H is exactly symmetric.
        """
        for sum_KK in (self.hessian_sum_KK, self.cross_sum_KK):
            if sum_KK is not None:
                sum_KK.div_(max(self.weight_sum, 1e-30))
        self.weight_sum = 1.0
        mirror_(self.hessian_sum_KK)

    def hessian_KK(self) -> Tensor:
        """H, the weighted mean of x x^T over tokens, in fp32 and exactly symmetric."""
        mean_KK = self.hessian_sum_KK / max(self.weight_sum, 1e-30)
        mirror_(mean_KK)
        return mean_KK

    def cross_KK(self) -> Tensor | None:
        """D, fp32, or None if it was not asked for."""
        return (
            None if self.cross_sum_KK is None else self.cross_sum_KK / max(self.weight_sum, 1e-30)
        )


@phase("factor")
def corrected_target(
    weight_NK: Tensor, cross_KK: Tensor, elimination: Elimination, alpha: float
) -> Tensor:
    """Weights that make the quantized stream's inputs give the original outputs.

        W' = W + alpha W D (H + damping mean(diag H) I)^-1

    alpha = 1 is the least-squares optimum of || X W^T - X~ W'^T ||^2 (the W* of Qronos), smaller
    values are QEP's damped form.

    Args:
        weight_NK: Original weights, fp32, not modified.
        cross_KK: D.
        elimination: Of the damped H.
        alpha: 0 to 1.

    Returns:
        (N, K) fp32.
    """
    visit_K = elimination.visit_K
    product_NK = (weight_NK @ cross_KK)[:, visit_K]
    change_NK = solved_rows(elimination.factor_KK, product_NK).to(weight_NK)
    return weight_NK.index_add(1, visit_K, change_NK, alpha=alpha)
