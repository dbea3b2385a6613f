"""GPTQ: round columns in order, each time spreading the error over the columns to come.

GPTQ (Frantar et al. 2023, arXiv 2210.17323), algorithm 1, with scales fixed beforehand so that
columns can be visited by falling Hessian diagonal while groups stay as stored (static act-order).
Work is done on the transposed weight, where a column is one contiguous row.
Shape suffixes: N out features, K in features, B columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotq.devices import double
from rotq.errors import RotqError
from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid
from rotq.ops import round_block, rounds_natively
from rotq.phases import phase
from rotq.solvers.factor import factor_, mirror_, permute_, upper_panels

DAMPING_LADDER = (1, 2, 5, 10, 20, 50, 100)
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Elimination:
    """The order of the columns, and how an error spreads over those to come."""

    visit_K: Tensor
    """Columns in the order they are rounded."""
    factor_KK: Tensor
    """V, upper, of the damped H = V V^T with rows and columns in that order, fp32; what is below
    its diagonal means nothing."""
    spread: tuple[Tensor, ...]
    """V^-1 of each block of columns, (B, B) fp32."""
    damping: float
    """Share of the mean diagonal that was added to H."""
    added_K: Tensor
    """What that is, in the stored order of columns; a dead column has the mean diagonal besides."""

    def to(self, device: torch.device) -> Elimination:
        """The same there."""
        return replace(
            self,
            visit_K=self.visit_K.to(device),
            factor_KK=self.factor_KK.to(device),
            spread=tuple(each.to(device) for each in self.spread),
            added_K=self.added_K.to(device),
        )

    def damp_(self, hessian_KK: Tensor) -> Tensor:
        """The damped H, where H is; returns it."""
        hessian_KK.diagonal().add_(self.added_K)
        return hessian_KK

    def quadratic(self, x_NK: Tensor) -> Tensor:
        """x H x^T of each row with the H that was not damped, (N) in fp64."""
        visited_NK, sums_N = x_NK[:, self.visit_K], double(x_NK.new_zeros(len(x_NK)))
        for panel, column_PB in upper_panels(self.factor_KK):
            product_NB = visited_NK[:, : panel.stop] @ column_PB
            sums_N += double(product_NB.square().sum(1))
        return (sums_N - double(x_NK.square() @ self.added_K)).clamp_(min=0)


@dataclass(frozen=True, kw_only=True)
class RowBounds:
    """Least and largest code of each row, (N) fp32."""

    q_min: Tensor
    q_max: Tensor

    def nearest_(self, x_N: Tensor) -> Tensor:
        """Round to codes, in place."""
        return x_N.round_().clamp_(self.q_min, self.q_max)


@phase("factor")
def eliminate(
    hessian_KK: Tensor, order: str, damping: float = 0.0, *, in_place: bool = False
) -> Elimination:
    """Order the columns and factor once for all rows, adding to the diagonal until H factors.

    Args:
        hessian_KK: fp32, symmetric; a zero on the diagonal marks a dead column.
        order: "natural" or "activation" (falling diagonal).
        damping: First share of the mean diagonal that is tried; then x2, x5, ... up to 1.
        in_place: The factor takes the place of ``hessian_KK``, which is not modified otherwise.

    Raises:
        ValueError: unknown order.
        RotqError: not positive definite even with the largest damping, or not finite.
    """
    if order not in ("natural", "activation"):
        raise ValueError(f"unknown order {order!r}; known: natural, activation")
    if not all(bool(end.isfinite()) for end in hessian_KK.aminmax()):
        raise RotqError("calibration gave a Hessian that is not finite")
    diagonal_K = hessian_KK.diagonal().clone()
    mean = diagonal_K.mean().clamp(min=1e-12)
    alive_K = torch.where(diagonal_K == 0, mean, diagonal_K)
    visit_K = torch.arange(len(hessian_KK), device=hessian_KK.device)
    factor_KK = hessian_KK if in_place else hessian_KK.clone()
    if order == "activation":
        visit_K = torch.argsort(alive_K, descending=True, stable=True)
        permute_(factor_KK, visit_K)
    for step in DAMPING_LADDER:
        share = min(damping * step, 1.0)
        factor_KK.diagonal().copy_((alive_K + share * mean)[visit_K])
        if factor_(factor_KK):
            return Elimination(
                visit_K=visit_K,
                factor_KK=factor_KK,
                spread=inverted_corners(factor_KK),
                damping=share,
                added_K=alive_K + share * mean - diagonal_K,
            )
        mirror_(factor_KK)
    raise RotqError(f"the Hessian is not positive definite with damping up to {share:g}")


def inverted_corners(factor_KK: Tensor) -> tuple[Tensor, ...]:
    """V^-1 of the blocks on the diagonal."""
    corners = (
        double(factor_KK[at : at + BLOCK, at : at + BLOCK]).triu()
        for at in range(0, len(factor_KK), BLOCK)
    )
    return tuple(
        torch.linalg.solve_triangular(corner, torch.eye(len(corner)).to(corner), upper=True)
        .float()
        .to(factor_KK.device)
        for corner in corners
    )


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

        def errors(block: slice, spread_BB: Tensor, w_BN: Tensor) -> Tensor:
            given = (spread_BB, scale_KN[block], zero_KN[block], bounds_2N)
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

    def errors(block: slice, spread_BB: Tensor, w_BN: Tensor) -> Tensor:
        error_BN = torch.empty_like(w_BN)
        for b, k in enumerate(range(block.start, block.stop)):
            error_BN[b] = (w_BN[b] - rounded(k, w_BN[b])).div_(spread_BB[b, b])
            w_BN[b + 1 :].addr_(spread_BB[b, b + 1 :], error_BN[b], alpha=-1)
        return error_BN

    feed_back_blocks(weight_NK, elimination, errors)


def feed_back_blocks(
    weight_NK: Tensor,
    elimination: Elimination,
    errors: Callable[[slice, Tensor, Tensor], Tensor],
) -> None:
    """Blocks of columns in the order of visits, each without the errors of those before it.

    With U = V^-1 and e the errors over U's diagonal, U^T e is what the columns so far lack of the
    target. A block b is due U_bb^T V_pb^T of what those before it, p, lack (no row of U is needed
    but those of its own block), and lacks U_bb^T (e_b - V_pb^T ...) itself.

    Args:
        errors: From the places of a block, U_bb, and its columns (B, N), which it may modify, to
            the errors over U's diagonal (B, N).
    """
    lacking_KN = weight_NK.T[elimination.visit_K].contiguous()
    for number, spread_BB in enumerate(elimination.spread):
        start = number * BLOCK
        block = slice(start, start + len(spread_BB))
        due_BN = elimination.factor_KK[:start, block].T @ lacking_KN[:start]
        given_BN = torch.addmm(lacking_KN[block], spread_BB.T, due_BN)
        error_BN = errors(block, spread_BB, given_BN)
        lacking_KN[block] = spread_BB.T @ error_BN.sub_(due_BN)


def _of_rows(bound: int | Tensor, like_KN: Tensor) -> Tensor:
    """A bound for each row, (N) fp32."""
    return torch.as_tensor(bound, dtype=torch.float32).expand(like_KN.shape[1])


def in_place_of(visited_KN: Tensor, visit_K: Tensor) -> Tensor:
    """(N, K) in the order of columns, from rows in the order of visits."""
    return torch.empty_like(visited_KN).index_copy_(0, visit_K, visited_KN).T.contiguous()
