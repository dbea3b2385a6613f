"""One entry to all solvers: target, scales, codes, refinement, and what they cost.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.formats.exl3 import TileGrid
from rotq.formats.integer import Grid, Quantized
from rotq.formats.trellis import Trellis
from rotq.ranks import ALONE, Ranks
from rotq.recipe import Solver
from rotq.solvers.curvature import Curvature
from rotq.solvers.gptq import round_columns
from rotq.solvers.parts import ROWS_ON_DEVICE, each_part, rows_at_once
from rotq.solvers.paths import code_columns, path_scales, refine_all
from rotq.solvers.refine import refine
from rotq.solvers.scales import search_scales
from rotq.solvers.solution import Solution, join_rows
from rotq.solvers.statistics import Moments
from rotq.solvers.tiles import solve_tiles
from rotq.solvers.two_sided import (
    eliminate_rows,
    refine_both,
    refine_scales_both,
    ring_spreads,
    round_both,
)


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
        return solve_tiles(weight_NK, curvature, grid, options, seed, ranks)
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
            target_NK = curvature.target(target_NK, options.target_correction)
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
    return join_rows(each_part(solved, weight_NK, rows, at_once, shared))


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
    target_NK = curvature.target(weight_NK.float().cpu(), options.target_correction)
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
