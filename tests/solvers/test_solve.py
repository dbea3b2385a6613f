"""The solver as a whole: losses, options, stacking, brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.recipe import Solver
from rotq.solvers.scales import search_scales
from rotq.solvers.solution import Solution, split_rows
from rotq.solvers.solve import solve as solve_for
from rotq.solvers.statistics import Moments
from rotq.solvers.trial import trial_losses

OPTIONS = Solver(
    method="gptq",
    order="activation",
    damping=0.01,
    scale_search="hessian",
    target_correction=0.0,
    refine_sweeps=2,
)


def solve(weight_NK: Tensor, moments: Moments | None, grid: Grid, options: Solver) -> Solution:
    return solve_for(weight_NK, moments, grid, options, scale_dtype=torch.float16)


def problem(N: int = 12, K: int = 64, seed: int = 0) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(300, K, generator=generator) @ torch.randn(K, K, generator=generator)
    moments = Moments(K, cross=True, device=torch.device("cpu"))
    moments.add(x_MK, x_MK + 0.3 * torch.randn(300, K, generator=generator), None)
    return torch.randn(N, K, generator=generator), moments


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_stage_lowers_the_loss(bits, group_size, symmetric):
    weight_NK, moments = problem()
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    stages = [
        replace(OPTIONS, method="rtn", scale_search="minmax"),
        replace(OPTIONS, refine_sweeps=0),
        OPTIONS,
    ]
    losses = [float(solve(weight_NK, moments, grid, stage).loss_N.sum()) for stage in stages]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < losses[1]


def test_loss_and_energy_are_mean_squared_outputs():
    weight_NK, moments = problem()
    grid = Grid(bits=3, group_size=16, symmetric=False)
    solution = solve(weight_NK, moments, grid, OPTIONS)
    error_NK = solution.quantized.dequantize() - weight_NK
    H_KK = moments.hessian_KK()
    torch.testing.assert_close(
        solution.loss_N, torch.einsum("nk,kl,nl->n", error_NK, H_KK, error_NK)
    )
    torch.testing.assert_close(
        solution.energy_N, torch.einsum("nk,kl,nl->n", weight_NK, H_KK, weight_NK)
    )


def test_target_correction_lowers_the_error_against_the_original_stream():
    generator = torch.Generator().manual_seed(0)
    original_MK = torch.randn(400, 32, generator=generator)
    x_MK = original_MK @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator))
    weight_NK = torch.randn(16, 32, generator=generator)
    moments = Moments(32, cross=True, device=torch.device("cpu"))
    moments.add(x_MK, original_MK, None)
    grid = Grid(bits=4, group_size=-1, symmetric=False)

    def output_error(alpha: float) -> float:
        options = replace(OPTIONS, target_correction=alpha)
        rounded_NK = solve(weight_NK, moments, grid, options).quantized.dequantize()
        return float((original_MK @ weight_NK.T - x_MK @ rounded_NK.T).square().mean())

    assert output_error(1.0) < 0.7 * output_error(0.5) < 0.5 * output_error(0.0)


def test_stacked_rows_are_solved_as_if_alone():
    weight_NK, moments = problem(N=9)
    grid = Grid(bits=3, group_size=32, symmetric=False)
    together = split_rows(solve(weight_NK, moments, grid, OPTIONS), [2, 7])
    for part, rows in zip(together, (weight_NK[:2], weight_NK[2:]), strict=True):
        alone = solve(rows, moments, grid, OPTIONS)
        assert (part.quantized.q_NK != alone.quantized.q_NK).float().mean() < 0.01
        torch.testing.assert_close(part.loss_N, alone.loss_N, rtol=0.02, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_few_rows_at_a_time_give_what_all_at_once_give(monkeypatch, symmetric):
    weight_NK, moments = problem(N=50)
    grid = Grid(bits=3, group_size=32, symmetric=symmetric)
    whole = solve(weight_NK, moments, grid, OPTIONS).quantized
    monkeypatch.setattr("rotq.solvers.parts.ROWS_IN_CACHE", 16)
    parts = solve(weight_NK, moments, grid, OPTIONS).quantized
    assert (parts.q_NK != whole.q_NK).float().mean() < 0.01
    assert (parts.scale_NG != whole.scale_NG).float().mean() < 0.05
    assert (parts.zero_NG is None) == symmetric


def test_dead_column_is_coded_as_zero():
    weight_NK, _ = problem(K=16)
    x_MK = torch.randn(100, 16)
    x_MK[:, 3] = 0
    moments = Moments(16, cross=False, device=torch.device("cpu"))
    moments.add(x_MK, None, None)
    solution = solve(weight_NK, moments, Grid(bits=4, group_size=8, symmetric=False), OPTIONS)
    assert (solution.quantized.dequantize()[:, 3] == 0).all()


def test_brute_force_over_all_codes_of_two_columns():
    weight_NK, moments = problem(N=5, K=2)
    grid = Grid(bits=2, group_size=-1, symmetric=True)
    solution = solve(weight_NK, moments, grid, replace(OPTIONS, refine_sweeps=8))
    scale_N1, H_KK = solution.quantized.scale_NG.float(), moments.hessian_KK()
    best_N = torch.full((5,), torch.inf)
    for codes in itertools.product(range(grid.q_min, grid.q_max + 1), repeat=2):
        error_NK = torch.tensor(codes) * scale_N1 - weight_NK
        best_N = torch.minimum(best_N, ((error_NK @ H_KK) * error_NK).sum(-1))
    # a coordinate optimum, found by a heuristic: never below the best, seldom far above
    assert (solution.loss_N >= best_N * 0.999).all()
    assert solution.loss_N.sum() < 1.3 * best_N.sum()


def test_round_to_nearest_needs_no_data_and_gptq_does():
    weight_NK, _ = problem()
    grid = Grid(bits=4, group_size=16, symmetric=False)
    rtn = replace(OPTIONS, method="rtn", scale_search="mse")
    rounded_NK = solve(weight_NK, None, grid, rtn).quantized.dequantize()
    assert (rounded_NK - weight_NK).square().mean() < 0.02 * weight_NK.square().mean()
    with pytest.raises(ValueError, match="needs moments"):
        solve(weight_NK, None, grid, OPTIONS)


@pytest.mark.parametrize("judge", ["mse", "diagonal", "hessian"])
def test_searched_scales_are_better_by_their_own_judge(judge):
    weight_NK, moments = problem()
    weight_NK[:, ::7] *= 4
    grid = Grid(bits=3, group_size=16, symmetric=False)
    H_KK = moments.hessian_KK()

    def error(how: str) -> Tensor:
        options = replace(OPTIONS, method="rtn", scale_search=how)
        e_NGg = (solve(weight_NK, moments, grid, options).quantized.dequantize() - weight_NK).view(
            12, 4, 16
        )
        if judge == "mse":
            return e_NGg.abs().pow(2.4).sum()
        blocks = torch.stack([H_KK[k : k + 16, k : k + 16] for k in range(0, 64, 16)])
        if judge == "diagonal":
            blocks = torch.diag_embed(blocks.diagonal(dim1=-2, dim2=-1))
        return torch.einsum("ngi,gij,ngj->", e_NGg, blocks, e_NGg)

    assert error(judge) < 0.95 * error("minmax")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_positive_and_storable(dtype):
    weight_NK = torch.zeros(3, 8)
    weight_NK[1] = 1e-12
    grid = Grid(bits=3, group_size=4, symmetric=True)
    scale_NG, zero_NG = search_scales(weight_NK, torch.eye(8), grid, judge="mse", scale_dtype=dtype)
    assert (scale_NG > 0).all()
    assert torch.equal(scale_NG, scale_NG.to(dtype).float())
    assert (zero_NG == 0).all()


def test_unknown_names_are_refused():
    weight_NK, moments = problem()
    grid = Grid(bits=4, group_size=16, symmetric=False)
    with pytest.raises(ValueError, match="unknown judge 'best'"):
        solve(weight_NK, moments, grid, replace(OPTIONS, scale_search="best"))
    with pytest.raises(ValueError, match="unknown order 'random'"):
        solve(weight_NK, moments, grid, replace(OPTIONS, order="random"))
    with pytest.raises(ValueError, match="legal sizes: 16, 32, 64"):
        solve(weight_NK, moments, Grid(bits=4, group_size=24, symmetric=False), OPTIONS)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_trial_of_several_grids_loses_what_each_loses_alone(method, symmetric):
    torch.manual_seed(0)
    weight_NK, x_MK = torch.randn(5, 64), torch.randn(200, 64) @ torch.randn(64, 64)
    moments = Moments(64, cross=False, device=torch.device("cpu"))
    moments.add(x_MK, None, None)
    options = Solver(method=method, damping=0.05)
    grids = [
        Grid(bits=bits, group_size=size, symmetric=symmetric)
        for bits, size in ((2, -1), (3, 16), (4, 32))
    ]
    found_CN = trial_losses(
        weight_NK, moments.hessian_KK(), grids, options, scale_dtype=torch.float16
    )
    for grid, loss_N in zip(grids, found_CN, strict=True):
        alone = solve(weight_NK, moments, grid, options)
        torch.testing.assert_close(loss_N, alone.loss_N, rtol=1e-4, atol=1e-5)
