"""A large symmetric matrix factored where it lies: no second one is held, in no precision.

    H = V V^T,    V upper

which is what GPTQ's feedback needs: with H^-1 = U^T U, U = V^-1. V is found from the last columns
to the first, a panel of columns at a time. It is stored in fp32, as H is; products are summed in
fp64, so that what is lost is a rounding of V, which is as large as that of H. Only what is on and
above the diagonal is overwritten.

Shape suffixes: K rows and columns, P rows of a panel, B columns of it, N rows of what is multiplied
or solved for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rotq.devices import double

PANEL = 256
"""Columns that are held in fp64 at a time."""

SPLIT_FROM, PRODUCTS = 512, 4
"""A symmetric product is made in so many, where it has so many rows."""


def factor_(matrix_KK: Tensor) -> bool:
    """Put V over H, on and above the diagonal; False: H is not positive definite.

    Args:
        matrix_KK: H, fp32, symmetric. Below the diagonal it stays as it is.
    """
    for panel in reversed(_panels(len(matrix_KK))):
        panel_PB = double(matrix_KK[: panel.stop, panel])
        for later in _panels(len(matrix_KK), panel.stop):
            upper_PL, row_BL = matrix_KK[: panel.stop, later], matrix_KK[panel, later]
            panel_PB.addmm_(double(upper_PL), double(row_BL).T, alpha=-1)
        lower_BB, failed = torch.linalg.cholesky_ex(panel_PB[panel.start :].flip(0, 1))
        if failed:
            return False
        corner_BB = lower_BB.flip(0, 1)
        rest_PB = torch.linalg.solve_triangular(
            corner_BB.T, panel_PB[: panel.start], upper=False, left=False
        )
        matrix_KK[: panel.start, panel].copy_(rest_PB)
        below_BB = matrix_KK[panel, panel].tril(-1)
        matrix_KK[panel, panel].copy_(corner_BB).add_(below_BB)
    return True


def add_lower_(sum_KK: Tensor, left_MK: Tensor, right_MK: Tensor) -> None:
    """Add left^T right, (M, K) each, where that is symmetric; above the diagonal parts are missing.

    Of four panels of rows, each up to its end: 5 of 8 of the products.
    """
    K = len(sum_KK)
    width = -(-K // PRODUCTS) if K >= SPLIT_FROM else K
    for start in range(0, K, width):
        stop = min(start + width, K)
        panel_BL = sum_KK[start:stop, :stop]
        panel_BL.addmm_(left_MK[:, start:stop].T, right_MK[:, :stop])


def mirror_(matrix_KK: Tensor) -> None:
    """Put what is below the diagonal above it, too."""
    for panel in _panels(len(matrix_KK)):
        corner_BB = matrix_KK[panel, panel]
        corner_BB.copy_(corner_BB.tril() + corner_BB.tril(-1).T)
        matrix_KK[panel, panel.stop :] = matrix_KK[panel.stop :, panel].T


def permute_(matrix_KK: Tensor, order_K: Tensor) -> None:
    """Put rows and columns in another order, both the same."""
    for panel in _panels(len(matrix_KK)):
        matrix_KK[:, panel] = matrix_KK[:, panel][order_K]
    for panel in _panels(len(matrix_KK)):
        matrix_KK[panel] = matrix_KK[panel][:, order_K]


def upper_panels(factor_KK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of V, and V there with zeros below its diagonal: (P, B), P up to their last."""
    for panel in _panels(len(factor_KK)):
        column_PB = factor_KK[: panel.stop, panel].clone()
        column_PB[panel.start :].triu_()
        yield panel, column_PB


def solved_rows(factor_KK: Tensor, rows_NK: Tensor) -> Tensor:
    """X with X V V^T = Y, in fp64 where V's device has it; (N, K)."""
    x_NK = double(rows_NK).clone()
    panels = _panels(len(factor_KK))
    for panel in reversed(panels):
        for later in _panels(len(factor_KK), panel.stop):
            x_NK[:, panel].addmm_(x_NK[:, later], double(factor_KK[panel, later]).T, alpha=-1)
        corner_BB = double(factor_KK[panel, panel]).triu()
        x_NK[:, panel] = torch.linalg.solve_triangular(
            corner_BB.T, x_NK[:, panel], upper=False, left=False
        )
    for panel in panels:
        for before in panels[: panels.index(panel)]:
            x_NK[:, panel].addmm_(x_NK[:, before], double(factor_KK[before, panel]), alpha=-1)
        corner_BB = double(factor_KK[panel, panel]).triu()
        x_NK[:, panel] = torch.linalg.solve_triangular(
            corner_BB, x_NK[:, panel], upper=True, left=False
        )
    return x_NK


def _panels(size: int, start: int = 0) -> list[slice]:
    return [slice(at, min(at + PANEL, size)) for at in range(start, size, PANEL)]
