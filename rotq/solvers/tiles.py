"""Block LDLQ: GPTQ where 16 columns are rounded at a time, to tiles on a trellis (EXL3).

The weight is turned first, W = S_n H R H S_k with S the scales svh, suh and H Hadamard matrices in
blocks of 128, and so is the Hessian: with x' = H S_k x,

    H' = H S_k E[x x^T] S_k H

Padding has a small diagonal there: its inputs are zeros, so errors may go to it. With U^T U = H'^-1
and E_b the error of columns b, those to come are lowered by E_b U_bb^-1 U_b,rest (QuIP#, arXiv
2402.04396, section 4.1, read backwards; exllamav3 has the same recursion from the last tile to the
first). Afterwards scales are fitted in turn to the tiles found:

    svh_n = <q_n, H t_n> / <q_n, H q_n>,       suh: (Q^T Q . H) r = diag(Q^T T H),   suh <- suh r

Shape suffixes: N out features, K in features, n and k the same padded, B columns of a block, I and
J tiles along k and n, T elements of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rotq.devices import double
from rotq.errors import RotqError
from rotq.formats.exl3 import TiledWeight, TileGrid, in_blocks, padded, unturned
from rotq.ops import from_rings, pack_tiles, search_tiles, to_rings
from rotq.phases import phase
from rotq.ranks import Ranks
from rotq.recipe import Solver
from rotq.solvers.curvature import Curvature
from rotq.solvers.factor import factor_
from rotq.solvers.gptq import Elimination, feed_back_blocks, in_place_of, inverted_corners
from rotq.solvers.parts import ROWS_ON_DEVICE, each_part
from rotq.solvers.solution import Solution

SIDE = 16
GAINS = (1.04, 0.97, 0.94, 0.89, 0.87, 0.87, 0.83, 0.79)
"""Rms of what is rounded over that of levels, for 1 to 8 bits."""

REACH = 64
"""Of the search to both sides of where a tile closes: distortion rises by 0.7 %, a quarter of the
time is saved."""

ROWS_AT_ONCE = 64
"""Solved by a thread of a CPU: the search takes most of the time; many parts keep threads busy."""

FREE = 1e-3
"""Of the mean diagonal: that of padding."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The scales between a weight and what is rounded."""

    suh_k: Tensor
    svh_n: Tensor
    """fp32; 0 for padding."""

    def weight(self, target_NK: Tensor) -> Tensor:
        """fp32 (n, k): R."""
        n, k = len(self.svh_n), len(self.suh_k)
        target_nk = F.pad(target_NK, (0, k - target_NK.shape[1], 0, n - len(target_NK)))
        divisor_n = torch.where(self.svh_n == 0, 1.0, self.svh_n)
        return in_blocks(in_blocks((target_nk / divisor_n[:, None]).T).T / self.suh_k)

    def hessian(self, damped_KK: Tensor) -> Tensor:
        """fp32 (k, k): H'."""
        K, k = len(damped_KK), len(self.suh_k)
        scaled_kk = F.pad(damped_KK, (0, k - K, 0, k - K)) * self.suh_k * self.suh_k[:, None]
        scaled_kk.diagonal()[K:] = FREE * scaled_kk.diagonal()[:K].mean()
        turned_kk = in_blocks(in_blocks(scaled_kk).T)
        return (turned_kk + turned_kk.T).div_(2)


def choose_scales(target_NK: Tensor, grid: TileGrid, seed: int) -> Turn:
    """Scales with random signs that give rows and columns one size.

    Args:
        target_NK: fp32, not modified.
        seed: Of the signs.
    """
    N, K = target_NK.shape
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (padded(K) + padded(N),), generator=generator) * 2.0 - 1.0
    sign_k, sign_n = signs.to(target_NK.device).split([padded(K), padded(N)])
    size_N = _sizes(target_NK.square().mean(1).sqrt())
    size_K = _sizes((target_NK / size_N[:, None]).square().mean(0).sqrt())
    svh_n = F.pad(size_N / size_N.mean(), (0, padded(N) - N)) * sign_n
    suh_k = F.pad(size_K, (0, padded(K) - K), value=1.0) * size_N.mean() * sign_k
    turn = Turn(suh_k=suh_k, svh_n=svh_n)
    rms = turn.weight(target_NK)[:, :K].square().mean().sqrt().clamp(min=1e-12)
    return replace(turn, suh_k=suh_k * rms / GAINS[grid.bits - 1])


def _sizes(rms: Tensor) -> Tensor:
    """Sizes to divide by: 1 for rows or columns of zeros."""
    return torch.where(rms == 0, 1.0, rms)


@phase("factor")
def eliminate_tiles(hessian_kk: Tensor, order: str) -> Elimination:
    """As ``eliminate``, with runs of 16 columns that stay together."""
    tiles_I = torch.arange(len(hessian_kk) // SIDE, device=hessian_kk.device)
    if order == "activation":
        weight_I = hessian_kk.diagonal().unflatten(0, (-1, SIDE)).sum(1)
        tiles_I = weight_I.argsort(descending=True, stable=True)
    visit_k = (tiles_I[:, None] * SIDE + torch.arange(SIDE, device=tiles_I.device)).flatten()
    factor_kk = hessian_kk[visit_k[:, None], visit_k]
    if not factor_(factor_kk):
        raise RotqError("the Hessian of the turned inputs is not positive definite")
    return Elimination(
        visit_K=visit_k,
        factor_KK=factor_kk,
        spread=inverted_corners(factor_kk),
        damping=0.0,
        added_K=torch.zeros_like(hessian_kk.diagonal()),
    )


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Paths of rows that are whole tiles, and what they stand for."""

    symbol_IJT: Tensor
    """uint8."""
    level_nk: Tensor
    """fp32."""

    def to(self, device: torch.device) -> Tiles:
        """The same there."""
        return Tiles(symbol_IJT=self.symbol_IJT.to(device), level_nk=self.level_nk.to(device))


def join_tiles(parts: list[Tiles]) -> Tiles:
    """Stacked along n."""
    return Tiles(
        symbol_IJT=torch.cat([part.symbol_IJT for part in parts], dim=1),
        level_nk=torch.cat([part.level_nk for part in parts]),
    )


@phase("columns")
def code_tiles(turned_nk: Tensor, elimination: Elimination, bits: int) -> Tiles:
    """Run the loop over blocks of columns.

    Args:
        turned_nk: R, fp32, not modified; n a multiple of 16.
        elimination: Of the turned Hessian.
    """
    n, k = turned_nk.shape
    visit_k = elimination.visit_K
    level_kn = torch.empty(k, n, device=turned_nk.device)
    symbol_IJT = torch.empty(
        k // SIDE, n // SIDE, SIDE**2, dtype=torch.uint8, device=level_kn.device
    )

    def errors(block: slice, spread_BB: Tensor, w_Bn: Tensor) -> Tensor:
        error_Bn = torch.empty_like(w_Bn)
        for start in range(block.start, block.stop, SIDE):
            tile = slice(start, start + SIDE)
            b = slice(start - block.start, start - block.start + SIDE)
            ring_1JT = to_rings(w_Bn[b])
            symbol_JT, level_JT = search_tiles(ring_1JT[0], bits, reach=REACH)
            symbol_IJT[visit_k[start] // SIDE] = symbol_JT
            level_kn[tile] = from_rings(level_JT[None])
            missed_Bn = w_Bn[b] - level_kn[tile]
            error_Bn[b] = torch.linalg.solve_triangular(spread_BB[b, b].T, missed_Bn, upper=False)
            w_Bn[b.stop :].addmm_(spread_BB[b, b.stop :].T, error_Bn[b], alpha=-1)
        return error_Bn

    feed_back_blocks(turned_nk, elimination, errors)
    return Tiles(symbol_IJT=symbol_IJT, level_nk=in_place_of(level_kn, visit_k))


@phase("sweeps")
def fit_scales(
    target_NK: Tensor, damped_KK: Tensor, level_nk: Tensor, turn: Turn, *, rounds: int = 2
) -> Turn:
    """Scales in turn that lower tr (W^ - T) H (W^ - T)^T with the tiles as they are."""
    N, K = target_NK.shape
    suh_k, svh_n = turn.suh_k.clone(), turn.svh_n.clone()
    wanted_NK = target_NK @ damped_KK
    for _ in range(rounds):
        q_NK = unturned(level_nk, suh_k, svh_n)[:N, :K]
        least_N = ((q_NK @ damped_KK) * q_NK).sum(1)
        ratio_N = (wanted_NK * q_NK).sum(1) / torch.where(least_N == 0, 1.0, least_N)
        svh_n[:N] *= ratio_N
        q_NK = q_NK * ratio_N[:, None]
        normal_KK = double((q_NK.T @ q_NK) * damped_KK)
        normal_KK.diagonal().add_(1e-6 * normal_KK.diagonal().mean())
        right_K1 = double((wanted_NK * q_NK).sum(0))[:, None]
        ratio_K = torch.cholesky_solve(right_K1, torch.linalg.cholesky(normal_KK))[:, 0]
        suh_k[:K] *= ratio_K.float().to(suh_k.device)
    return Turn(suh_k=suh_k, svh_n=svh_n)


def packed_tiles(shape: tuple[int, int], tiles: Tiles, turn: Turn, bits: int) -> TiledWeight:
    """As they are stored."""
    return TiledWeight(
        shape=shape,
        trellis_IJW=pack_tiles(tiles.symbol_IJT, bits),
        suh_k=turn.suh_k.half(),
        svh_n=turn.svh_n.half(),
    )


def solve_tiles(
    weight_NK: Tensor,
    curvature: Curvature,
    grid: TileGrid,
    options: Solver,
    seed: int,
    ranks: Ranks,
) -> Solution:
    """Scales, tiles by block LDLQ, then scales again."""
    assert curvature.elimination is not None
    assert curvature.hessian_KK is not None, "scales of tiles are fitted to the Hessian"
    target_NK = curvature.target(weight_NK.float(), options.target_correction)
    turn = choose_scales(target_NK, grid, seed)
    turned_nk = turn.weight(target_NK)
    elimination = eliminate_tiles(turn.hessian(curvature.hessian_KK), options.order)

    def solved(part_nk: Tensor) -> Tiles:
        return code_tiles(part_nk, elimination, grid.bits)

    at_once = ROWS_AT_ONCE if target_NK.device.type == "cpu" else ROWS_ON_DEVICE
    tiles = join_tiles(each_part(solved, turned_nk, SIDE, at_once, ranks))
    turn = fit_scales(target_NK, curvature.hessian_KK, tiles.level_nk, turn)
    quantized = packed_tiles((len(target_NK), target_NK.shape[1]), tiles, turn, grid.bits)
    return Solution(
        quantized=quantized,
        loss_N=curvature.quadratic(quantized.dequantize().sub_(target_NK)),
        energy_N=curvature.quadratic(target_NK),
        damping=curvature.elimination.damping,
    )
