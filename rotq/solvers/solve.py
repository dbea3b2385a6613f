"""One entry to all solvers: target, scales, codes, refinement, and what they cost.

Shape suffixes: N out features, K in features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from rotq.formats.integer import Grid, Quantized
from rotq.numerics import side_by_side
from rotq.recipe import Solver
from rotq.solvers.gptq import Elimination, RowBounds, damp, eliminate, round_columns
from rotq.solvers.refine import refine
from rotq.solvers.scales import search_scales
from rotq.solvers.statistics import Moments, corrected_target

ROWS_IN_CACHE, ROWS_ON_DEVICE = 512, 16384
"""Rows solved at a time: by a CPU's thread, in whose cache few stay; on a GPU, which wants many."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found for one weight."""

    quantized: Quantized
    loss_N: Tensor
    """Per row (W^ - T) H (W^ - T)^T with undamped H: squared output error per token."""
    energy_N: Tensor
    """Per row T H T^T: squared output per token."""
    damping: float
    """Share of the mean diagonal that made H positive definite."""


def solve(
    weight_NK: Tensor,
    moments: Moments | None,
    grid: Grid,
    options: Solver,
    *,
    scale_dtype: torch.dtype,
) -> Solution:
    """Quantize one weight, or several stacked along N that read the same input.

    Args:
        weight_NK: fp32, not modified.
        moments: Statistics of the inputs; None (round to nearest only) stands for H = I.
        grid: Bits, group size, symmetry.
        options: The recipe's; ``passes`` is not looked at.
        scale_dtype: Storage type of the scales.

    Returns:
        Codes int8, scales in ``scale_dtype``, zeros int8 or None.

    Raises:
        ValueError: the group size does not divide K, an unknown choice, or GPTQ without moments.
        RotqError: the Hessian is not finite or cannot be made positive definite.
    """
    K = weight_NK.shape[1]
    if moments is None:
        if options.method != "rtn":
            raise ValueError(f"{options.method} needs moments of the inputs")
        hessian_KK, cross_KK = torch.eye(K, device=weight_NK.device), None
    else:
        hessian_KK, cross_KK = moments.hessian_KK(), moments.cross_KK()
    if options.method == "rtn":
        return _round_to_nearest(weight_NK, hessian_KK, grid, options, scale_dtype)
    damped_KK, damping = damp(hessian_KK, options.damping)
    target_NK = weight_NK
    if options.target_correction and cross_KK is not None:
        alpha = options.target_correction
        target_NK = corrected_target(weight_NK, hessian_KK, cross_KK, alpha=alpha, damping=damping)
    del cross_KK
    target_NK = target_NK.masked_fill(hessian_KK.diagonal() == 0, 0.0)
    elimination = eliminate(damped_KK, options.order)

    def descend(part_NK: Tensor) -> Quantized:
        return _descend(part_NK, damped_KK, elimination, grid, options, scale_dtype)

    quantized = _joined(_each_part(descend, target_NK))
    return _solution(quantized, target_NK, hessian_KK, damping)


def trial_losses(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    grids: Sequence[Grid],
    options: Solver,
    *,
    scale_dtype: torch.dtype,
) -> Tensor:
    """What rows would lose on each of several grids, (C, N), in one run of the solver.

    L counts the rows once for each grid.

    Args:
        weight_NK: fp32, not modified.
        hessian_KK: Mean of x x^T over tokens; not damped.
        grids, options, scale_dtype: As for ``solve``; targets are not corrected.

    Raises:
        RotqError: the Hessian is not finite or cannot be made positive definite.
    """
    hessian_KK = (hessian_KK + hessian_KK.T).div_(2)
    damped_KK, target_NK = hessian_KK, weight_NK
    if options.method != "rtn":
        damped_KK, _ = damp(hessian_KK, options.damping)
        target_NK = weight_NK.masked_fill(hessian_KK.diagonal() == 0, 0.0)
    searched = [_searched(target_NK, damped_KK, grid, options, scale_dtype) for grid in grids]
    # all grids side by side: the loop over columns is run once
    target_LK = target_NK.repeat(len(grids), 1)
    scale_LK, zero_LK = (torch.cat(parts) for parts in zip(*searched, strict=True))
    bounds = RowBounds(
        q_min=_of_rows(target_NK, [grid.q_min for grid in grids]),
        q_max=_of_rows(target_NK, [grid.q_max for grid in grids]),
    )
    if options.method == "rtn":
        q_LK = (target_LK / scale_LK + zero_LK).round_()
        q_LK = torch.clamp(q_LK, bounds.q_min[:, None], bounds.q_max[:, None])
    else:
        elimination = eliminate(damped_KK, options.order)
        q_LK = round_columns(target_LK, elimination, scale_LK, zero_LK, bounds)
    error_LK = q_LK.sub_(zero_LK).mul_(scale_LK).sub_(target_LK)
    return (error_LK @ hessian_KK).mul_(error_LK).sum(-1).view(len(grids), -1)


def _searched(
    target_NK: Tensor, damped_KK: Tensor, grid: Grid, options: Solver, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every column, (N, K) each."""
    found = search_scales(
        target_NK, damped_KK, grid, judge=options.scale_search, scale_dtype=scale_dtype
    )
    width = grid.columns_per_group(target_NK.shape[1])
    scale_NK, zero_NK = (each_NG.repeat_interleave(width, dim=1) for each_NG in found)
    return scale_NK, zero_NK


def _of_rows(target_NK: Tensor, limits: Sequence[int]) -> Tensor:
    """A limit for each row of one copy of the target after the other, fp32."""
    return torch.tensor(limits, device=target_NK.device).float().repeat_interleave(len(target_NK))


def _each_part(descend: Callable[[Tensor], Quantized], target_NK: Tensor) -> list[Quantized]:
    """Rows do not know of each other: parts of equal size, on a CPU side by side."""
    on_cpu = target_NK.device.type == "cpu"
    count = ceil(target_NK.shape[0] / (ROWS_IN_CACHE if on_cpu else ROWS_ON_DEVICE))
    parts = target_NK.tensor_split(count)
    return side_by_side(descend, parts) if on_cpu else [descend(part_NK) for part_NK in parts]


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


def _joined(parts: list[Quantized]) -> Quantized:
    """Weights of one grid, stacked along N."""
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return Quantized(
        q_NK=torch.cat([part.q_NK for part in parts]),
        scale_NG=torch.cat([part.scale_NG for part in parts]),
        zero_NG=torch.cat(zeros) if zeros else None,
        grid=parts[0].grid,
    )


def join_rows(solutions: list[Solution]) -> Solution:
    """Stack along N what was solved apart, on one grid; the damping is the largest."""
    return Solution(
        quantized=_joined([solution.quantized for solution in solutions]),
        loss_N=torch.cat([solution.loss_N for solution in solutions]),
        energy_N=torch.cat([solution.energy_N for solution in solutions]),
        damping=max(solution.damping for solution in solutions),
    )


def split_rows(solution: Solution, sizes: list[int]) -> list[Solution]:
    """Undo stacking along N: one solution per entry of ``sizes``."""
    quantized = solution.quantized
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
            quantized=Quantized(q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG, grid=quantized.grid),
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
    q_NGg = (w_NGg / step_NG1 + zero_NG[..., None]).round_().clamp_(grid.q_min, grid.q_max)
    quantized = _quantized((q_NGg.view_as(weight_NK), scale_NG, zero_NG), grid, scale_dtype)
    return _solution(quantized, weight_NK, hessian_KK, 0.0)


def _quantized(
    codes: tuple[Tensor, Tensor, Tensor], grid: Grid, scale_dtype: torch.dtype
) -> Quantized:
    q_NK, scale_NG, zero_NG = codes
    return Quantized(
        q_NK=q_NK.to(torch.int8),
        scale_NG=scale_NG.to(scale_dtype),
        zero_NG=None if grid.symmetric else zero_NG.to(torch.int8),
        grid=grid,
    )


def _solution(
    quantized: Quantized, target_NK: Tensor, hessian_KK: Tensor, damping: float
) -> Solution:
    error_NK = quantized.dequantize() - target_NK
    return Solution(
        quantized=quantized,
        loss_N=(error_NK @ hessian_KK).mul_(error_NK).sum(-1),
        energy_N=(target_NK @ hessian_KK).mul_(target_NK).sum(-1),
        damping=damping,
    )
