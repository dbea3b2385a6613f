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
from rotq.solvers.gptq import Elimination, eliminate, round_columns
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
from rotq.solvers.two_sided import (
    eliminate_rows,
    refine_both,
    refine_scales_both,
    ring_spreads,
    round_both,
)

ROWS_IN_CACHE, ROWS_ON_DEVICE = 512, 16384
"""Rows solved at a time: by a CPU's thread, in whose cache few stay; on a GPU, which wants many."""

NUMBERS_AT_ONCE = 1 << 22
"""Of a CPU's rows, at most: wide layers are solved fewer rows at a time."""

TILED_ROWS = 64
"""The same where the search takes nearly all of the time: many parts keep all threads at work."""


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

    def to(self, device: torch.device) -> Solution:
        """The same there."""
        assert isinstance(self.quantized, Quantized), "tiles stay where they were found"
        return replace(
            self,
            quantized=self.quantized.to(device),
            loss_N=self.loss_N.to(device),
            energy_N=self.energy_N.to(device),
        )

    def divided(self, global_scale: Tensor) -> Solution:
        """The solution for the weight, from that for the weight times a global scale."""
        assert isinstance(self.quantized, Quantized), "tiles have none"
        return Solution(
            quantized=replace(self.quantized, global_scale=global_scale),
            loss_N=self.loss_N / global_scale.square(),
            energy_N=self.energy_N / global_scale.square(),
            damping=self.damping,
        )


Part = TypeVar("Part", Solution, Tiles)


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


def solve(
    weight_NK: Tensor,
    moments: Moments | Curvature | None,
    grid: Grid,
    options: Solver,
    *,
    scale_dtype: torch.dtype,
    global_scale: Tensor | None = None,
    ranks: Ranks = ALONE,
    seed: int = 0,
    output_NN: Tensor | None = None,
) -> Solution:
    """Quantize one weight, or several stacked along N that read the same input.

    On a trellis, in tiles or not, one whole weight alone: where paths begin and end depends on its
    rows. Elsewhere some rows are in fp32 at a time, and what is found for them.

    Args:
        weight_NK: Any float dtype, not modified.
        moments: Statistics of the inputs, or what they come to; None (round to nearest only)
            stands for H = I.
        grid: Bits, group size, symmetry; or a trellis.
        options: The recipe's; ``passes`` is not looked at.
        scale_dtype: Storage type of the scales.
        global_scale: (1) fp32, for grids that have one; local scales are those of the weight
            times it.
        ranks: Processes that call this with the same arguments and share the rows of GPTQ.
        seed: Of the random signs that a weight in tiles is turned with.
        output_NN: Of one whole weight: the moments of the loss's slopes at its outputs, if errors
            of its rows are to feed back on each other. On the CPU, wherever the weight is.

    Returns:
        Codes int8, scales in ``scale_dtype``, zeros int8 or None.

    Raises:
        ValueError: the group size does not divide K, an unknown choice, GPTQ without moments, a
            trellis without GPTQ, or one that is longer than the weight's columns.
        RotqError: the Hessian is not finite or cannot be made positive definite.
    """
    if options.method == "rtn" and isinstance(grid, Trellis | TileGrid):
        raise ValueError("paths through a trellis are found by GPTQ")
    curvature = moments if isinstance(moments, Curvature) else Curvature.of(moments, options)
    if isinstance(grid, TileGrid):
        return _solve_tiles(weight_NK, curvature, grid, options, seed, ranks)
    if output_NN is not None:
        return _solve_both(weight_NK, curvature, output_NN, grid, options, scale_dtype)
    elimination = curvature.elimination
    rows = grid.ring_rows(len(weight_NK)) if isinstance(grid, Trellis) else 1

    def solved(part_NK: Tensor) -> Solution:
        target_NK = part_NK.float()
        if global_scale is not None:
            target_NK = target_NK * global_scale
        if elimination is None:
            quantized = _nearest(target_NK, curvature.hessian_KK, grid, options, scale_dtype)
        else:
            target_NK = _target(target_NK, curvature, options)
            find = _find_paths if isinstance(grid, Trellis) else _descend
            quantized = find(target_NK, curvature, grid, rows, options, scale_dtype)
        error_NK = quantized.dequantize().sub_(target_NK)
        solution = Solution(
            quantized=quantized,
            loss_N=curvature.quadratic(error_NK),
            energy_N=curvature.quadratic(target_NK),
            damping=0.0 if elimination is None else elimination.damping,
        )
        return solution if global_scale is None else solution.divided(global_scale)

    shared = ALONE if elimination is None else ranks
    on_cpu = weight_NK.device.type == "cpu"
    at_once = rows_at_once(weight_NK.shape[1]) if on_cpu else ROWS_ON_DEVICE
    return join_rows(_each_part(solved, weight_NK, rows, at_once, shared))


def rows_at_once(features: int) -> int:
    """Rows of a layer that one thread of a CPU solves together."""
    return min(ROWS_IN_CACHE, max(1, NUMBERS_AT_ONCE // features))


def _target(weight_NK: Tensor, curvature: Curvature, options: Solver) -> Tensor:
    """What codes are to come near, (N, K) fp32: dead columns are 0."""
    assert curvature.elimination is not None
    assert curvature.dead_K is not None
    if curvature.cross_KK is not None:
        alpha = options.target_correction
        weight_NK = corrected_target(weight_NK, curvature.cross_KK, curvature.elimination, alpha)
    return weight_NK.masked_fill(curvature.dead_K, 0.0)


def _each_part(
    solved: Callable[[Tensor], Part], weight_NK: Tensor, rows: int, at_once: int, ranks: Ranks
) -> list[Part]:
    """Runs of ``rows`` do not know of each other: parts of equal size, on a CPU side by side.

    Each process does some, and is given all.

    Args:
        at_once: Rows of a part, at most.
    """
    on_cpu = weight_NK.device.type == "cpu"
    count = ceil(weight_NK.shape[0] / at_once)
    count = ranks.size * ceil(count / ranks.size)
    runs = weight_NK.unflatten(0, (-1, rows)).tensor_split(min(count, len(weight_NK) // rows))
    parts = ranks.own([part.flatten(0, 1) for part in runs])
    done = side_by_side(solved, parts) if on_cpu else [solved(part_NK) for part_NK in parts]
    if ranks.size == 1:
        return done
    sent = [part.to(torch.device("cpu")) for part in done]
    return [part.to(weight_NK.device) for some in ranks.gathered(sent) for part in some]


def _descend(
    target_NK: Tensor,
    curvature: Curvature,
    grid: Grid,
    rows: int,
    options: Solver,
    scale_dtype: torch.dtype,
) -> Quantized:
    """Scales, codes by GPTQ, then both in turn."""
    assert curvature.elimination is not None
    scale_NG, zero_NG = search_scales(
        target_NK,
        curvature.hessian_KK,
        grid,
        judge=options.scale_search,
        scale_dtype=scale_dtype,
    )
    q_NK = round_columns(target_NK, curvature.elimination, scale_NG, zero_NG, grid)
    if options.refine_sweeps:
        assert curvature.hessian_KK is not None, "sweeps look at the Hessian"
        q_NK, scale_NG = refine(
            target_NK,
            curvature.hessian_KK,
            (q_NK, scale_NG, zero_NG),
            grid,
            sweeps=options.refine_sweeps,
            scale_dtype=scale_dtype,
        )
    return _quantized((q_NK, scale_NG, zero_NG), grid, scale_dtype)


def _find_paths(
    target_NK: Tensor,
    curvature: Curvature,
    grid: Grid,
    rows: int,
    options: Solver,
    scale_dtype: torch.dtype,
) -> Quantized:
    """Scales, paths by GPTQ, then both in turn."""
    assert isinstance(grid, Trellis)
    assert curvature.elimination is not None
    assert curvature.hessian_KK is not None, "scales of paths are fitted to the Hessian"
    scale_NG = path_scales(target_NK, grid, scale_dtype)
    paths = code_columns(target_NK, curvature.elimination, scale_NG, grid, rows)
    paths, scale_NG = refine_all(
        target_NK,
        curvature.hessian_KK,
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


def _solve_tiles(
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
    target_NK = _target(weight_NK.float(), curvature, options)
    turn = choose_scales(target_NK, grid, seed)
    turned_nk = turn.weight(target_NK)
    elimination = eliminate_tiles(turn.hessian(curvature.hessian_KK), options.order)

    def solved(part_nk: Tensor) -> Tiles:
        return code_tiles(part_nk, elimination, grid.bits)

    at_once = TILED_ROWS if target_NK.device.type == "cpu" else ROWS_ON_DEVICE
    tiles = join_tiles(_each_part(solved, turned_nk, SIDE, at_once, ranks))
    turn = fit_scales(target_NK, curvature.hessian_KK, tiles.level_nk, turn)
    quantized = packed_tiles((len(target_NK), target_NK.shape[1]), tiles, turn, grid.bits)
    return Solution(
        quantized=quantized,
        loss_N=curvature.quadratic(quantized.dequantize().sub_(target_NK)),
        energy_N=curvature.quadratic(target_NK),
        damping=curvature.elimination.damping,
    )


def _solve_both(
    weight_NK: Tensor,
    curvature: Curvature,
    output_NN: Tensor,
    grid: Grid,
    options: Solver,
    scale_dtype: torch.dtype,
) -> Solution:
    """The same where rows feel each other's errors: scales, codes or paths, then both in turn."""
    device, curvature = weight_NK.device, curvature.to(torch.device("cpu"))
    elimination, hessian_KK = curvature.elimination, curvature.hessian_KK
    assert elimination is not None
    assert hessian_KK is not None, "sweeps look at the Hessian"
    target_NK = _target(weight_NK.float().cpu(), curvature, options)
    rows = eliminate_rows(output_NN, options.output_damping)
    if isinstance(grid, Trellis):
        ring = grid.ring_rows(len(target_NK))
        scale_NG = path_scales(target_NK, grid, scale_dtype)
        spreads = ring_spreads(rows.hessian_NN, ring)
        paths = code_columns(target_NK, elimination, scale_NG, grid, ring, spreads)
        codes = (paths.level_NK, scale_NG, torch.zeros_like(scale_NG))
        scale_NG = refine_scales_both(target_NK, hessian_KK, rows, codes, scale_dtype=scale_dtype)
        quantized = Quantized(
            q_NK=paths.symbol_NK, scale_NG=scale_NG.to(scale_dtype), zero_NG=None, grid=grid
        )
    else:
        scale_NG, zero_NG = search_scales(
            target_NK, hessian_KK, grid, judge=options.scale_search, scale_dtype=scale_dtype
        )
        q_NK = round_both(target_NK, elimination, rows, scale_NG, zero_NG, grid)
        codes, sweeps = (q_NK, scale_NG, zero_NG), options.refine_sweeps
        q_NK, scale_NG = refine_both(
            target_NK, hessian_KK, rows, codes, grid, sweeps=sweeps, scale_dtype=scale_dtype
        )
        quantized = _quantized((q_NK, scale_NG, zero_NG), grid, scale_dtype)
    return Solution(
        quantized=quantized,
        loss_N=curvature.quadratic(quantized.dequantize().sub_(target_NK)),
        energy_N=curvature.quadratic(target_NK),
        damping=elimination.damping,
    ).to(device)


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


def _nearest(
    weight_NK: Tensor,
    hessian_KK: Tensor | None,
    grid: Grid,
    options: Solver,
    scale_dtype: torch.dtype,
) -> Quantized:
    scale_NG, zero_NG = search_scales(
        weight_NK, hessian_KK, grid, judge=options.scale_search, scale_dtype=scale_dtype
    )
    w_NGg = weight_NK.view(weight_NK.shape[0], scale_NG.shape[1], -1)
    q_NGg = grid.nearest_((w_NGg / scale_NG[..., None]).add_(zero_NG[..., None]))
    return _quantized((q_NGg.view_as(weight_NK), scale_NG, zero_NG), grid, scale_dtype)


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
