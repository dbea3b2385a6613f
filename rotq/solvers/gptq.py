"""GPTQ: round columns in order, each time spreading the error over the columns to come.

GPTQ (Frantar et al. 2023, arXiv 2210.17323), algorithm 1, with scales fixed beforehand so that
columns can be visited by falling Hessian diagonal while groups stay as stored (static act-order).
Work is done on the transposed weight, where a column is one contiguous row.
Shape suffixes: N out features, K in features, B columns of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.devices import double
from rotq.errors import RotqError
from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid
from rotq.ops import round_block, rounds_natively
from rotq.phases import phase

DAMPING_LADDER = (1, 2, 5, 10, 20, 50, 100)
BLOCK = 128


@phase("factor")
def damp(hessian_KK: Tensor, damping: float) -> tuple[Tensor, float]:
    """Add to the diagonal until the matrix factors.

    Args:
        hessian_KK: fp32 symmetric; a zero on the diagonal marks a dead column. Not modified.
        damping: First share of the mean diagonal that is tried; then x2, x5, ... up to 1.

    Returns:
        damped_KK: fp32; dead columns have the mean diagonal.
        damping: The share that was used.

    Raises:
        RotqError: not positive definite even with the largest damping, or not finite.
    """
    if not torch.isfinite(hessian_KK).all():
        raise RotqError("calibration gave a Hessian that is not finite")
    mean = hessian_KK.diagonal().mean().clamp(min=1e-12)
    alive_K = torch.where(hessian_KK.diagonal() == 0, mean, hessian_KK.diagonal())
    damped_KK = hessian_KK.clone()
    for factor in DAMPING_LADDER:
        share = min(damping * factor, 1.0)
        damped_KK.diagonal().copy_(alive_K + share * mean)
        if not torch.linalg.cholesky_ex(double(damped_KK)).info:
            return damped_KK, share
    raise RotqError(f"the Hessian is not positive definite with damping up to {share:g}")


@dataclass(frozen=True, kw_only=True)
class Elimination:
    """The order of the columns, and how an error spreads over those to come."""

    visit_K: Tensor
    """Columns in the order they are rounded."""
    factor_KK: Tensor
    """U of ``inverse_factor`` with rows and columns in that order, fp32."""


@dataclass(frozen=True, kw_only=True)
class RowBounds:
    """Least and largest code of each row, (N) fp32."""

    q_min: Tensor
    q_max: Tensor

    def nearest_(self, x_N: Tensor) -> Tensor:
        """Round to codes, in place."""
        return x_N.round_().clamp_(self.q_min, self.q_max)


@phase("factor")
def eliminate(hessian_KK: Tensor, order: str) -> Elimination:
    """Order the columns and factor once for all rows.

    Args:
        hessian_KK: Damped Hessian, fp32, positive definite.
        order: "natural" or "activation" (falling diagonal).

    Raises:
        ValueError: unknown order.
    """
    if order not in ("natural", "activation"):
        raise ValueError(f"unknown order {order!r}; known: natural, activation")
    visit_K = torch.arange(hessian_KK.shape[0], device=hessian_KK.device)
    if order == "activation":
        visit_K = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True)
    factor_KK = inverse_factor(hessian_KK[visit_K[:, None], visit_K])
    return Elimination(visit_K=visit_K, factor_KK=factor_KK)


@phase("columns")
def round_columns(
    weight_NK: Tensor,
    elimination: Elimination,
    scale_NG: Tensor,
    zero_NG: Tensor,
    grid: Grid | RowBounds,
) -> Tensor:
    """Run the column loop with fixed scales.

    Args:
        weight_NK: Target weights, fp32, not modified.
        elimination: Of the layer's damped Hessian.
        scale_NG: fp32.
        zero_NG: fp32 integers.
        grid: Bits and symmetry; or bounds for rows that are on several grids.

    Returns:
        q_NK: fp32 levels of the grid.
    """
    K, visit_K = weight_NK.shape[1], elimination.visit_K
    group_K = visit_K // (K // scale_NG.shape[1])
    scale_KN, zero_KN = scale_NG.T[group_K], zero_NG.T[group_K]
    q_KN = torch.empty(K, len(weight_NK), device=weight_NK.device)
    if not isinstance(grid, FloatGrid) and rounds_natively(weight_NK):
        bounds_2N = torch.stack([_of_rows(grid.q_min, q_KN), _of_rows(grid.q_max, q_KN)])

        def errors(block: slice, w_BN: Tensor) -> Tensor:
            factor_BB = elimination.factor_KK[block, block]
            given = (factor_BB, scale_KN[block], zero_KN[block], bounds_2N)
            return round_block(w_BN, *given, q_KN[block])

        feed_back_blocks(weight_NK, elimination, errors)
        return in_place_of(q_KN, visit_K)

    def nearest(k: int, w_N: Tensor) -> Tensor:
        q_N = grid.nearest_(torch.div(w_N, scale_KN[k]).add_(zero_KN[k]))
        q_KN[k] = q_N
        return q_N.sub_(zero_KN[k]).mul_(scale_KN[k])

    feed_back(weight_NK, elimination, nearest)
    return in_place_of(q_KN, visit_K)


def feed_back(
    weight_NK: Tensor, elimination: Elimination, rounded: Callable[[int, Tensor], Tensor]
) -> None:
    """The column loop itself, whatever a column is rounded to.

    Args:
        weight_NK: Target weights, fp32, not modified.
        elimination: Of the layer's damped Hessian.
        rounded: From a place in the order of visits, and the column as it is then (N), to what it
            is rounded to (N); called once for each place, in this order.
    """
    factor_KK = elimination.factor_KK

    def errors(block: slice, w_BN: Tensor) -> Tensor:
        error_BN = torch.empty_like(w_BN)
        for b, k in enumerate(range(block.start, block.stop)):
            error_BN[b] = (w_BN[b] - rounded(k, w_BN[b])).div_(factor_KK[k, k])
            row_B = factor_KK[k, k + 1 : block.stop]
            w_BN[b + 1 :].addr_(row_B, error_BN[b], alpha=-1)
        return error_BN

    feed_back_blocks(weight_NK, elimination, errors)


def feed_back_blocks(
    weight_NK: Tensor, elimination: Elimination, errors: Callable[[slice, Tensor], Tensor]
) -> None:
    """Blocks of columns in the order of visits, each without the errors of those before it.

    Args:
        errors: From the places of a block, and its columns (B, N), which it may modify, to the
            errors over the factor's diagonal (B, N).
    """
    K, factor_KK = weight_NK.shape[1], elimination.factor_KK
    w_KN = weight_NK.T[elimination.visit_K].contiguous()
    for start in range(0, K, BLOCK):
        block, rest = slice(start, min(start + BLOCK, K)), slice(start + BLOCK, K)
        error_BN = errors(block, w_KN[block])
        w_KN[rest].addmm_(factor_KK[block, rest].T, error_BN, alpha=-1)


def _of_rows(bound: int | Tensor, like_KN: Tensor) -> Tensor:
    """A bound for each row, (N) fp32."""
    return torch.as_tensor(bound, dtype=torch.float32).expand(like_KN.shape[1])


def in_place_of(visited_KN: Tensor, visit_K: Tensor) -> Tensor:
    """(N, K) in the order of columns, from rows in the order of visits."""
    return torch.empty_like(visited_KN).index_copy_(0, visit_K, visited_KN).T.contiguous()


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """U, upper, with H^-1 = U^T U; computed in fp64, returned in fp32."""
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(double(hessian_KK)))
    return torch.linalg.cholesky(inverse_KK, upper=True).float().to(hessian_KK.device)
