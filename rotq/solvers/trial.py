"""What rows would lose on each of several grids, without refinement: for a choice among them.

Shape suffixes: N out features, K in features, C grids, L = C N.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.formats.trellis import Trellis
from rotq.recipe import Solver
from rotq.solvers.gptq import RowBounds, eliminate, round_columns
from rotq.solvers.paths import code_columns, path_scales
from rotq.solvers.scales import search_scales


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
    if any(isinstance(grid, Trellis) for grid in grids):
        return _trial_paths(weight_NK, hessian_KK, grids, options, scale_dtype)
    damped_KK, target_NK, elimination = hessian_KK, weight_NK, None
    if options.method != "rtn":
        elimination = eliminate(hessian_KK, options.order, options.damping)
        damped_KK = elimination.damp_(hessian_KK.clone())
        target_NK = weight_NK.masked_fill(hessian_KK.diagonal() == 0, 0.0)
    searched = [_searched(target_NK, damped_KK, grid, options, scale_dtype) for grid in grids]
    # all grids side by side: the loop over columns is run once
    target_LK = target_NK.repeat(len(grids), 1)
    scale_LK, zero_LK = (torch.cat(parts) for parts in zip(*searched, strict=True))
    bounds = RowBounds(
        q_min=_of_rows(target_NK, [grid.q_min for grid in grids]),
        q_max=_of_rows(target_NK, [grid.q_max for grid in grids]),
    )
    if elimination is None:
        q_LK = (target_LK / scale_LK + zero_LK).round_()
        q_LK = torch.clamp(q_LK, bounds.q_min[:, None], bounds.q_max[:, None])
    else:
        q_LK = round_columns(target_LK, elimination, scale_LK, zero_LK, bounds)
    error_LK = q_LK.sub_(zero_LK).mul_(scale_LK).sub_(target_LK)
    return (error_LK @ hessian_KK).mul_(error_LK).sum(-1).view(len(grids), -1)


def _trial_paths(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    grids: Sequence[Grid],
    options: Solver,
    scale_dtype: torch.dtype,
) -> Tensor:
    """``trial_losses`` on trellises: rows that are tried make rings of their own."""
    elimination = eliminate(hessian_KK, options.order, options.damping)
    target_NK = weight_NK.masked_fill(hessian_KK.diagonal() == 0, 0.0)
    losses = []
    for grid in grids:
        assert isinstance(grid, Trellis), "grids to choose from are of one kind"
        scale_NG = path_scales(target_NK, grid, scale_dtype)
        rows = grid.ring_rows(len(target_NK))
        paths = code_columns(target_NK, elimination, scale_NG, grid, rows)
        level_NGg = paths.level_NK.unflatten(1, (scale_NG.shape[1], -1))
        error_NK = (level_NGg * scale_NG[..., None]).flatten(1) - target_NK
        losses.append((error_NK @ hessian_KK).mul_(error_NK).sum(-1))
    return torch.stack(losses)


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
