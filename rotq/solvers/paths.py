"""GPTQ where a column is not rounded number by number, but to the best path through a trellis.

The path goes along the rows of one column, so that the whole column's error is known before the
next is looked at, and GPTQ's feedback stays exact. Each row's scale is divided out first:

    minimize over paths  sum_n (w_nk / s_ng - level_nk)^2

Afterwards, as for codes (``refine``): scales and paths in turn lower

    L = tr (W^ - T) H (W^ - T)^T

With the other columns fixed, L is H_kk sum_n (w^_nk - t_nk)^2 plus a constant, with
t = w^ - [(W^ - T) H]_k / H_kk: a ring's new path is taken where that falls.

Shape suffixes: N out features, K in features, G groups of K, S rings, R rows of a ring, B columns
of one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.formats.trellis import Trellis
from rotq.ops import search_paths
from rotq.phases import phase
from rotq.solvers.gptq import BLOCK, Elimination, feed_back, in_place_of
from rotq.solvers.refine import refine_scales
from rotq.solvers.scales import storable

GAINS = (1.2, 1.1, 1.08, 1.02, 1.0, 1.0, 0.95, 0.9)
"""Rms of weights over scales that has the least distortion, for 1 to 8 bits; flat around."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Symbols of rows that are whole rings, and what they stand for."""

    symbol_NK: Tensor
    """int8."""
    level_NK: Tensor
    """fp32."""


def path_scales(target_NK: Tensor, grid: Trellis, scale_dtype: torch.dtype) -> Tensor:
    """Scales (N, G) fp32, storable: what is rounded is as large as levels want it."""
    width = grid.columns_per_group(target_NK.shape[1])
    rms_NG = target_NK.unflatten(1, (-1, width)).square().mean(-1).sqrt_()
    return storable(rms_NG / GAINS[grid.bits - 1], scale_dtype)


@phase("columns")
def code_columns(
    target_NK: Tensor,
    elimination: Elimination,
    scale_NG: Tensor,
    grid: Trellis,
    rows: int,
    spreads: Sequence[Tensor] | None = None,
) -> Paths:
    """Run the column loop with fixed scales.

    Args:
        target_NK: fp32, not modified.
        elimination: Of the layer's damped Hessian.
        scale_NG: fp32.
        rows: R, which divides N.
        spreads: What an error of each ring's rows asks of the rows after it, as ``ring_spreads``
            has it; None: nothing.
    """
    N, K = target_NK.shape
    visit_K = elimination.visit_K
    scale_KN = scale_NG.T[visit_K // (K // scale_NG.shape[1])]
    symbol_KN = torch.empty(K, N, dtype=torch.int8, device=target_NK.device)
    level_KN = torch.empty(K, N, device=target_NK.device)

    def best_path(k: int, w_N: Tensor) -> Tensor:
        symbol_KN[k], level_KN[k] = _search(w_N / scale_KN[k], grid, rows)
        return level_KN[k] * scale_KN[k]

    def best_rings(k: int, w_N: Tensor) -> Tensor:
        wanted_N = w_N.clone()
        for start, spread_RN in zip(range(0, N, rows), spreads or (), strict=True):
            ring = slice(start, start + rows)
            found = _search(wanted_N[ring] / scale_KN[k, ring], grid, rows)
            symbol_KN[k, ring], level_KN[k, ring] = found
            error_R = wanted_N[ring] - level_KN[k, ring] * scale_KN[k, ring]
            wanted_N[ring.stop :] += error_R @ spread_RN
        return level_KN[k] * scale_KN[k]

    feed_back(target_NK, elimination, best_path if spreads is None else best_rings)
    return Paths(symbol_NK=in_place_of(symbol_KN, visit_K), level_NK=in_place_of(level_KN, visit_K))


@phase("sweeps")
def refine_all(
    target_NK: Tensor,
    hessian_KK: Tensor,
    paths: Paths,
    scale_NG: Tensor,
    grid: Trellis,
    rows: int,
    *,
    sweeps: int,
    scale_dtype: torch.dtype,
) -> tuple[Paths, Tensor]:
    """Fit scales, then alternate paths and scales ``sweeps`` times; L never rises.

    Args:
        target_NK, hessian_KK: fp32, damped; not modified.
        scale_NG: fp32, not modified.
        rows: R, which divides N.
        sweeps: Of paths; scales are fitted with 0, too.
        scale_dtype: As stored.
    """
    scale_NG = _fitted(target_NK, hessian_KK, paths, scale_NG, scale_dtype)
    for _ in range(sweeps):
        paths = refine_paths(target_NK, hessian_KK, paths, scale_NG, grid, rows)
        scale_NG = _fitted(target_NK, hessian_KK, paths, scale_NG, scale_dtype)
    return paths, scale_NG


def refine_paths(
    target_NK: Tensor,
    hessian_KK: Tensor,
    paths: Paths,
    scale_NG: Tensor,
    grid: Trellis,
    rows: int,
) -> Paths:
    """One sweep over the columns; each ring takes its new path where L falls."""
    (N, K), G = target_NK.shape, scale_NG.shape[1]
    scale_KN = scale_NG.repeat_interleave(K // G, dim=1).T
    symbol_KN, level_KN = paths.symbol_NK.T.contiguous(), paths.level_NK.T.contiguous()
    gradient_KN = hessian_KK @ (level_KN * scale_KN - target_NK.T)
    diagonal = hessian_KK.diagonal().tolist()
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        change_BN = torch.empty(end - start, N, device=target_NK.device)
        for k in range(start, end):
            wanted_N = level_KN[k] - gradient_KN[k] / (diagonal[k] * scale_KN[k])
            symbol_N, level_N = _search(wanted_N, grid, rows)
            change_N = (level_N - level_KN[k]) * scale_KN[k]
            rise_N = change_N * (2 * gradient_KN[k] + diagonal[k] * change_N)
            falls_S1 = rise_N.view(-1, rows).sum(1, keepdim=True) < 0
            falls_N = falls_S1.expand(-1, rows).flatten()
            symbol_KN[k] = torch.where(falls_N, symbol_N, symbol_KN[k])
            level_KN[k] = torch.where(falls_N, level_N, level_KN[k])
            change_BN[k - start] = change_N.mul_(falls_N)
            gradient_KN[k + 1 : end].addr_(hessian_KK[k, k + 1 : end], change_BN[k - start])
        gradient_KN[end:].addmm_(hessian_KK[end:, start:end], change_BN)
    return Paths(symbol_NK=symbol_KN.T.contiguous(), level_NK=level_KN.T.contiguous())


def _search(x_N: Tensor, grid: Trellis, rows: int) -> tuple[Tensor, Tensor]:
    symbol_SR, level_SR = search_paths(x_N.view(-1, rows), grid.bits, grid.state_bits)
    return symbol_SR.flatten(), level_SR.flatten()


def _fitted(
    target_NK: Tensor, hessian_KK: Tensor, paths: Paths, scale_NG: Tensor, dtype: torch.dtype
) -> Tensor:
    codes = (paths.level_NK, scale_NG, torch.zeros_like(scale_NG))
    return refine_scales(target_NK, hessian_KK, codes, scale_dtype=dtype)
