"""Paths inside GPTQ: feedback, refinement, rings that do not know of each other."""

from dataclasses import replace

import pytest
import torch
from damping import damp
from torch import Tensor

import rotq.solvers.parts
from rotq.formats.integer import Grid
from rotq.formats.trellis import Trellis
from rotq.recipe import Solver
from rotq.solvers.gptq import eliminate
from rotq.solvers.paths import code_columns, path_scales, refine_all
from rotq.solvers.solution import Solution
from rotq.solvers.solve import solve
from rotq.solvers.statistics import Moments

TRELLIS = Trellis(bits=3, group_size=-1, state_bits=8)
OPTIONS = Solver(rounder="trellis", damping=0.05)


def problem(N: int = 48, K: int = 24) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(300, K, generator=generator) @ torch.randn(K, K, generator=generator)
    moments = Moments(K, cross=True, device=torch.device("cpu"))
    moments.add(x_MK, x_MK + 0.3 * torch.randn(300, K, generator=generator), None)
    return torch.randn(N, K, generator=generator), moments


def solved(grid: Grid, options: Solver = OPTIONS, N: int = 48) -> Solution:
    weight_NK, moments = problem(N)
    return solve(weight_NK, moments, grid, options, scale_dtype=torch.float16)


def test_the_loss_is_of_what_is_stored() -> None:
    weight_NK, moments = problem()
    solution = solved(TRELLIS)
    error_NK = solution.quantized.dequantize() - weight_NK
    expected_N = (error_NK @ moments.hessian_KK() * error_NK).sum(-1)
    torch.testing.assert_close(solution.loss_N, expected_N)
    assert solution.quantized.scale_NG.shape == (48, 1)


def test_paths_lose_less_than_scalars_of_the_same_bits() -> None:
    scalar = replace(OPTIONS, rounder="scalar", refine_sweeps=3)
    losses = [
        solved(grid, options).loss_N.sum().item()
        for grid, options in (
            (Grid(bits=3, group_size=-1, symmetric=True), scalar),
            (replace(TRELLIS, state_bits=10), replace(OPTIONS, refine_sweeps=1)),
        )
    ]
    assert losses[1] < 0.7 * losses[0]


def test_columns_learn_of_the_errors_before_them() -> None:
    """Without the feedback the same paths lose much more."""
    weight_NK, moments = problem()
    hessian_KK = moments.hessian_KK()
    scale_NG = path_scales(weight_NK, TRELLIS, torch.float16)
    found = []
    for seen_KK in (damp(hessian_KK, 0.01)[0], torch.eye(24)):
        elimination = eliminate(seen_KK, "activation")
        paths = code_columns(weight_NK, elimination, scale_NG, TRELLIS, 48)
        error_NK = paths.level_NK * scale_NG - weight_NK
        found.append((error_NK @ hessian_KK * error_NK).sum().item())
    assert found[0] < 0.6 * found[1]


def test_refinement_never_raises_the_loss() -> None:
    weight_NK, moments = problem()
    damped_KK, _ = damp(moments.hessian_KK(), 0.05)
    scale_NG = path_scales(weight_NK, TRELLIS, torch.float16)
    paths = code_columns(weight_NK, eliminate(damped_KK, "activation"), scale_NG, TRELLIS, 24)
    losses = []
    for sweeps in (0, 1, 2):
        refined, scale = refine_all(
            weight_NK,
            damped_KK,
            paths,
            scale_NG,
            TRELLIS,
            24,
            sweeps=sweeps,
            scale_dtype=torch.float16,
        )
        error_NK = refined.level_NK * scale - weight_NK
        losses.append((error_NK @ damped_KK * error_NK).sum().item())
    assert losses[2] <= losses[1] < losses[0]


def test_parts_and_groups_change_nothing_but_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings are solved side by side; that is not seen in the result."""
    whole = solved(TRELLIS, N=512)
    monkeypatch.setattr(rotq.solvers.parts, "ROWS_IN_CACHE", 100)
    parts = solved(TRELLIS, N=512)
    assert torch.equal(whole.quantized.q_NK, parts.quantized.q_NK)
    grouped = solved(replace(TRELLIS, group_size=8), N=512)
    assert grouped.quantized.scale_NG.shape == (512, 3)
    assert grouped.loss_N.sum() < 1.1 * whole.loss_N.sum()


def test_the_target_is_corrected() -> None:
    corrected = solved(TRELLIS, replace(OPTIONS, target_correction=0.5))
    assert not torch.equal(corrected.quantized.q_NK, solved(TRELLIS).quantized.q_NK)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="found by GPTQ"):
        solved(TRELLIS, replace(OPTIONS, method="rtn"))
    with pytest.raises(ValueError, match="at least 3 rows"):
        solved(TRELLIS, N=2)
