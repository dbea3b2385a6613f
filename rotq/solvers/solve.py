"""One entry to all solvers: target, scales, codes, refinement, and what they cost.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

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

ROWS_IN_CACHE, ROWS_ON_DEVICE = 512, 16384
"""Rows solved at a time: by a CPU's thread, in whose cache few stay; on a GPU, which wants many."""

NUMBERS_AT_ONCE = 1 << 22
"""Of a CPU's rows, at most: wide layers are solved fewer rows at a time."""


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

    def to(self, device: torch.device) -> Solution:
        """The same there."""
        return replace(
            self,
            quantized=self.quantized.to(device),
            loss_N=self.loss_N.to(device),
            energy_N=self.energy_N.to(device),
        )

    def divided(self, global_scale: Tensor) -> Solution:
        """The solution for the weight, from that for the weight times a global scale."""
        return Solution(
            quantized=replace(self.quantized, global_scale=global_scale),
            loss_N=self.loss_N / global_scale.square(),
            energy_N=self.energy_N / global_scale.square(),
            damping=self.damping,
        )


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
        looks = options.scale_search in ("diagonal", "hessian") or options.rounder == "trellis"
        kept = not spend or options.refine_sweeps > 0 or looks
        elimination = eliminate(hessian_KK, options.order, options.damping, in_place=not kept)
        return cls(
            hessian_KK=elimination.damp_(hessian_KK) if kept else None,
            cross_KK=cross_KK if options.target_correction else None,
            elimination=elimination,
            dead_K=dead_K,
        )

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
) -> Solution:
    """Quantize one weight, or several stacked along N that read the same input.

    On a trellis one whole weight alone: where paths begin and end depends on its rows. Some rows
    are in fp32 at a time, and what is found for them.

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

    Returns:
        Codes int8, scales in ``scale_dtype``, zeros int8 or None.

    Raises:
        ValueError: the group size does not divide K, an unknown choice, GPTQ without moments, a
            trellis without GPTQ, or one that is longer than the weight's columns.
        RotqError: the Hessian is not finite or cannot be made positive definite.
    """
    if options.method == "rtn" and isinstance(grid, Trellis):
        raise ValueError("paths through a trellis are found by GPTQ")
    curvature = moments if isinstance(moments, Curvature) else Curvature.of(moments, options)
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
    return join_rows(_each_part(solved, weight_NK, rows, shared))


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
    solved: Callable[[Tensor], Solution], weight_NK: Tensor, rows: int, ranks: Ranks
) -> list[Solution]:
    """Runs of ``rows`` do not know of each other: parts of equal size, on a CPU side by side.

    Each process does some, and is given all.
    """
    on_cpu = weight_NK.device.type == "cpu"
    at_once = rows_at_once(weight_NK.shape[1]) if on_cpu else ROWS_ON_DEVICE
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
