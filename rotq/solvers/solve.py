"""One entry to all solvers: target, scales, codes, refinement, and what they cost.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from rotq.formats.exl3 import TiledWeight, TileGrid
from rotq.formats.integer import Grid, Quantized
from rotq.formats.trellis import Trellis
from rotq.numerics import side_by_side
from rotq.ranks import ALONE, Ranks
from rotq.recipe import Solver
from rotq.solvers.gptq import Elimination, damp, eliminate, round_columns
from rotq.solvers.paths import code_columns, path_scales, refine_all
from rotq.solvers.refine import refine
from rotq.solvers.scales import search_scales
from rotq.solvers.statistics import Moments, corrected_target
from rotq.solvers.tiles import (
    SIDE,
    Tiles,
    choose_scales,
    code_tiles,
    eliminate_tiles,
    fit_scales,
    join_tiles,
    packed_tiles,
)

ROWS_IN_CACHE, ROWS_ON_DEVICE = 512, 16384
"""Rows solved at a time: by a CPU's thread, in whose cache few stay; on a GPU, which wants many."""

TILED_ROWS = 64
"""The same where the search takes nearly all of the time: many parts keep all threads at work."""

Part = TypeVar("Part", Quantized, Tiles)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found for one weight."""

    quantized: Quantized | TiledWeight
    loss_N: Tensor
    """Per row (W^ - T) H (W^ - T)^T with undamped H: squared output error per token."""
    energy_N: Tensor
    """Per row T H T^T: squared output per token."""
    damping: float
    """Share of the mean diagonal that made H positive definite."""

    def divided(self, global_scale: Tensor) -> Solution:
        """The solution for the weight, from that for the weight times a global scale."""
        assert isinstance(self.quantized, Quantized), "tiles have none"
        return Solution(
            quantized=replace(self.quantized, global_scale=global_scale),
            loss_N=self.loss_N / global_scale.square(),
            energy_N=self.energy_N / global_scale.square(),
            damping=self.damping,
        )


def solve(
    weight_NK: Tensor,
    moments: Moments | None,
    grid: Grid,
    options: Solver,
    *,
    scale_dtype: torch.dtype,
    global_scale: Tensor | None = None,
    ranks: Ranks = ALONE,
    seed: int = 0,
) -> Solution:
    """Quantize one weight, or several stacked along N that read the same input.

    On a trellis, in tiles or not, one whole weight alone: where paths begin and end depends on its
    rows.

    Args:
        weight_NK: fp32, not modified.
        moments: Statistics of the inputs; None (round to nearest only) stands for H = I.
        grid: Bits, group size, symmetry; or a trellis.
        options: The recipe's; ``passes`` is not looked at.
        scale_dtype: Storage type of the scales.
        global_scale: (1) fp32, for grids that have one; local scales are those of the weight
            times it.
        ranks: Processes that call this with the same arguments and share the rows of GPTQ.
        seed: Of the random signs that a weight in tiles is turned with.

    Returns:
        Codes int8, scales in ``scale_dtype``, zeros int8 or None.

    Raises:
        ValueError: the group size does not divide K, an unknown choice, GPTQ without moments, a
            trellis without GPTQ, or one that is longer than the weight's columns.
        RotqError: the Hessian is not finite or cannot be made positive definite.
    """
    if global_scale is not None:
        scaled_NK = weight_NK * global_scale
        solution = solve(scaled_NK, moments, grid, options, scale_dtype=scale_dtype, ranks=ranks)
        return solution.divided(global_scale)
    K = weight_NK.shape[1]
    if moments is None:
        if options.method != "rtn":
            raise ValueError(f"{options.method} needs moments of the inputs")
        hessian_KK, cross_KK = torch.eye(K, device=weight_NK.device), None
    else:
        hessian_KK, cross_KK = moments.hessian_KK(), moments.cross_KK()
    if options.method == "rtn":
        if isinstance(grid, Trellis | TileGrid):
            raise ValueError("paths through a trellis are found by GPTQ")
        return _round_to_nearest(weight_NK, hessian_KK, grid, options, scale_dtype)
    damped_KK, damping = damp(hessian_KK, options.damping)
    target_NK = weight_NK
    if options.target_correction and cross_KK is not None:
        alpha = options.target_correction
        target_NK = corrected_target(weight_NK, hessian_KK, cross_KK, alpha=alpha, damping=damping)
    del cross_KK
    target_NK = target_NK.masked_fill(hessian_KK.diagonal() == 0, 0.0)
    if isinstance(grid, TileGrid):
        tiled = _find_tiles(target_NK, damped_KK, grid, options.order, seed, ranks)
        return _solution(tiled, target_NK, hessian_KK, damping)
    elimination = eliminate(damped_KK, options.order)

    rows = grid.ring_rows(len(weight_NK)) if isinstance(grid, Trellis) else 1

    def descend(part_NK: Tensor) -> Quantized:
        if isinstance(grid, Trellis):
            return _find_paths(part_NK, damped_KK, elimination, grid, rows, options, scale_dtype)
        return _descend(part_NK, damped_KK, elimination, grid, options, scale_dtype)

    at_once = ROWS_IN_CACHE if target_NK.device.type == "cpu" else ROWS_ON_DEVICE
    quantized = _joined(_each_part(descend, target_NK, rows, at_once, ranks))
    return _solution(quantized, target_NK, hessian_KK, damping)


def _each_part(
    descend: Callable[[Tensor], Part], target_NK: Tensor, rows: int, at_once: int, ranks: Ranks
) -> list[Part]:
    """Runs of ``rows`` do not know of each other: parts of equal size, on a CPU side by side.

    Each process does some, and is given all.

    Args:
        at_once: Rows of a part, at most.
    """
    on_cpu = target_NK.device.type == "cpu"
    count = ceil(target_NK.shape[0] / at_once)
    count = ranks.size * ceil(count / ranks.size)
    runs = target_NK.unflatten(0, (-1, rows)).tensor_split(min(count, len(target_NK) // rows))
    parts = ranks.own([part.flatten(0, 1) for part in runs])
    done = side_by_side(descend, parts) if on_cpu else [descend(part_NK) for part_NK in parts]
    if ranks.size == 1:
        return done
    sent = [part.to(torch.device("cpu")) for part in done]
    return [part.to(target_NK.device) for some in ranks.gathered(sent) for part in some]


def _descend(
    target_NK: Tensor,
    damped_KK: Tensor,
    elimination: Elimination,
    grid: Grid,
    options: Solver,
    scale_dtype: torch.dtype,
) -> Quantized:
    """Scales, codes by GPTQ, then both in turn."""
    scale_NG, zero_NG = search_scales(
        target_NK, damped_KK, grid, judge=options.scale_search, scale_dtype=scale_dtype
    )
    q_NK = round_columns(target_NK, elimination, scale_NG, zero_NG, grid)
    q_NK, scale_NG = refine(
        target_NK,
        damped_KK,
        (q_NK, scale_NG, zero_NG),
        grid,
        sweeps=options.refine_sweeps,
        scale_dtype=scale_dtype,
    )
    return _quantized((q_NK, scale_NG, zero_NG), grid, scale_dtype)


def _find_paths(
    target_NK: Tensor,
    damped_KK: Tensor,
    elimination: Elimination,
    grid: Trellis,
    rows: int,
    options: Solver,
    scale_dtype: torch.dtype,
) -> Quantized:
    """Scales, paths by GPTQ, then both in turn."""
    scale_NG = path_scales(target_NK, grid, scale_dtype)
    paths = code_columns(target_NK, elimination, scale_NG, grid, rows)
    paths, scale_NG = refine_all(
        target_NK,
        damped_KK,
        paths,
        scale_NG,
        grid,
        rows,
        sweeps=options.refine_sweeps,
        scale_dtype=scale_dtype,
    )
    return Quantized(
        q_NK=paths.symbol_NK, scale_NG=scale_NG.to(scale_dtype), zero_NG=None, grid=grid
    )


def _find_tiles(
    target_NK: Tensor, damped_KK: Tensor, grid: TileGrid, order: str, seed: int, ranks: Ranks
) -> TiledWeight:
    """Scales, tiles by block LDLQ, then scales again."""
    turn = choose_scales(target_NK, grid, seed)
    turned_nk = turn.weight(target_NK)
    elimination = eliminate_tiles(turn.hessian(damped_KK), order)

    def descend(part_nk: Tensor) -> Tiles:
        return code_tiles(part_nk, elimination, grid.bits)

    at_once = TILED_ROWS if target_NK.device.type == "cpu" else ROWS_ON_DEVICE
    tiles = join_tiles(_each_part(descend, turned_nk, SIDE, at_once, ranks))
    turn = fit_scales(target_NK, damped_KK, tiles.level_nk, turn)
    return packed_tiles((len(target_NK), target_NK.shape[1]), tiles, turn, grid.bits)


def _joined(parts: list[Quantized]) -> Quantized:
    """Weights of one grid, stacked along N."""
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return Quantized(
        q_NK=torch.cat([part.q_NK for part in parts]),
        scale_NG=torch.cat([part.scale_NG for part in parts]),
        zero_NG=torch.cat(zeros) if zeros else None,
        grid=parts[0].grid,
        global_scale=parts[0].global_scale,
    )


def join_rows(solutions: list[Solution]) -> Solution:
    """Stack along N what was solved apart, on one grid; the damping is the largest."""
    if len(solutions) == 1:
        return solutions[0]
    parts = [each.quantized for each in solutions if isinstance(each.quantized, Quantized)]
    assert len(parts) == len(solutions), "a weight in tiles is solved whole"
    return Solution(
        quantized=_joined(parts),
        loss_N=torch.cat([solution.loss_N for solution in solutions]),
        energy_N=torch.cat([solution.energy_N for solution in solutions]),
        damping=max(solution.damping for solution in solutions),
    )


def split_rows(solution: Solution, sizes: list[int]) -> list[Solution]:
    """Undo stacking along N: one solution per entry of ``sizes``."""
    quantized = solution.quantized
    if isinstance(quantized, TiledWeight):
        assert len(sizes) == 1, "a weight in tiles is solved alone"
        return [solution]
    parts = zip(
        quantized.q_NK.split(sizes),
        quantized.scale_NG.split(sizes),
        [None] * len(sizes) if quantized.zero_NG is None else quantized.zero_NG.split(sizes),
        solution.loss_N.split(sizes),
        solution.energy_N.split(sizes),
        strict=True,
    )
    return [
        Solution(
            quantized=replace(quantized, q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG),
            loss_N=loss_N,
            energy_N=energy_N,
            damping=solution.damping,
        )
        for q_NK, scale_NG, zero_NG, loss_N, energy_N in parts
    ]


def _round_to_nearest(
    weight_NK: Tensor, hessian_KK: Tensor, grid: Grid, options: Solver, scale_dtype: torch.dtype
) -> Solution:
    scale_NG, zero_NG = search_scales(
        weight_NK, hessian_KK, grid, judge=options.scale_search, scale_dtype=scale_dtype
    )
    step_NG1 = scale_NG[..., None]
    w_NGg = weight_NK.view(weight_NK.shape[0], scale_NG.shape[1], -1)
    q_NGg = grid.nearest_(w_NGg / step_NG1 + zero_NG[..., None])
    quantized = _quantized((q_NGg.view_as(weight_NK), scale_NG, zero_NG), grid, scale_dtype)
    return _solution(quantized, weight_NK, hessian_KK, 0.0)


def _quantized(
    codes: tuple[Tensor, Tensor, Tensor], grid: Grid, scale_dtype: torch.dtype
) -> Quantized:
    q_NK, scale_NG, zero_NG = codes
    return Quantized(
        q_NK=grid.codes(q_NK),
        scale_NG=scale_NG.to(scale_dtype),
        zero_NG=None if grid.symmetric else zero_NG.to(torch.int8),
        grid=grid,
    )


def _solution(
    quantized: Quantized | TiledWeight, target_NK: Tensor, hessian_KK: Tensor, damping: float
) -> Solution:
    error_NK = quantized.dequantize() - target_NK
    return Solution(
        quantized=quantized,
        loss_N=(error_NK @ hessian_KK).mul_(error_NK).sum(-1),
        energy_N=(target_NK @ hessian_KK).mul_(target_NK).sum(-1),
        damping=damping,
    )
