"""Factoring in place, against the same in fp64 at once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.recipe import Solver
from rotq.solvers import factor, gptq
from rotq.solvers.curvature import Curvature
from rotq.solvers.factor import (
    add_lower_,
    factor_,
    mirror_,
    permute_,
    solved_rows,
    upper_panels,
)
from rotq.solvers.gptq import eliminate
from rotq.solvers.solve import solve
from rotq.solvers.statistics import Moments

K = 37
GPTQ = Solver(method="gptq", scale_search="minmax", target_correction=0.0, refine_sweeps=0)


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "PANEL", 8)
    monkeypatch.setattr(gptq, "BLOCK", 8)


def hessian() -> Tensor:
    x_MK = torch.randn(200, K, generator=torch.Generator().manual_seed(0))
    x_MK = x_MK @ torch.randn(K, K, generator=torch.Generator().manual_seed(1))
    return x_MK.T @ x_MK / 200


def test_the_factor_times_itself_is_the_matrix() -> None:
    hessian_KK = hessian()
    work_KK = hessian_KK.clone()
    assert factor_(work_KK)
    V_KK = work_KK.triu()
    torch.testing.assert_close(V_KK @ V_KK.T, hessian_KK, rtol=1e-5, atol=1e-4)
    assert torch.equal(work_KK.tril(-1), hessian_KK.tril(-1))
    for panel, part_PB in upper_panels(work_KK):
        assert torch.equal(part_PB, V_KK[: panel.stop, panel])


def test_what_is_not_positive_definite_can_be_tried_again() -> None:
    hessian_KK = hessian()
    hessian_KK[3, 3] = -1.0
    work_KK = hessian_KK.clone()
    assert not factor_(work_KK)
    mirror_(work_KK)
    work_KK.diagonal().copy_(hessian_KK.diagonal())
    symmetric_KK = hessian_KK.tril() + hessian_KK.tril(-1).T
    assert torch.equal(work_KK, symmetric_KK)


@pytest.mark.parametrize("columns", [1, 70, 513, 640])
def test_the_lower_half_of_a_symmetric_product_is_enough(columns: int) -> None:
    x_MK, weight_M = torch.randn(24, columns), torch.rand(24)
    expected_KK = 3 + x_MK.double().T @ (weight_M.double()[:, None] * x_MK.double())
    sum_KK = torch.full((columns, columns), 3.0)
    add_lower_(sum_KK, weight_M[:, None] * x_MK, x_MK)
    mirror_(sum_KK)
    assert torch.equal(sum_KK, sum_KK.T)
    torch.testing.assert_close(sum_KK.double(), expected_KK, atol=1e-4, rtol=1e-5)


def test_rows_are_mirrored_and_permuted_in_place() -> None:
    matrix_KK, order_K = torch.randn(K, K), torch.randperm(K)
    expected_KK = matrix_KK.tril() + matrix_KK.tril(-1).T
    mirror_(matrix_KK)
    assert torch.equal(matrix_KK, expected_KK)
    permute_(matrix_KK, order_K)
    assert torch.equal(matrix_KK, expected_KK[order_K][:, order_K])


def test_rows_are_solved_for() -> None:
    hessian_KK, rows_NK = hessian(), torch.randn(5, K)
    hessian_KK.diagonal().add_(0.1 * hessian_KK.diagonal().mean())
    factor_KK = hessian_KK.clone()
    assert factor_(factor_KK)
    expected_NK = torch.linalg.solve(hessian_KK.double(), rows_NK.double().T).T
    torch.testing.assert_close(solved_rows(factor_KK, rows_NK), expected_NK, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_quadratic_form_is_that_of_the_matrix_before_damping(order: str) -> None:
    hessian_KK, x_NK = hessian(), torch.randn(6, K)
    found_N = eliminate(hessian_KK, order, 0.1).quadratic(x_NK)
    expected_N = ((x_NK @ hessian_KK) * x_NK).sum(-1).double()
    torch.testing.assert_close(found_N, expected_N, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_spent_moments_give_the_same_codes_where_they_lie(sweeps: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x_MK = torch.randn(150, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight_NK = torch.randn(12, 32, generator=generator)
    moments = Moments(32, cross=True, device=torch.device("cpu"))
    moments.add(x_MK, x_MK + 0.3 * torch.randn(150, 32, generator=generator), None)
    options = replace(GPTQ, refine_sweeps=sweeps, target_correction=alpha)
    grid = Grid(bits=3, group_size=16, symmetric=False)
    expected = solve(weight_NK, moments, grid, options, scale_dtype=torch.float16)
    curvature = Curvature.of(moments, options, spend=True)
    found = solve(weight_NK, curvature, grid, options, scale_dtype=torch.float16)
    assert torch.equal(found.quantized.q_NK, expected.quantized.q_NK)
    torch.testing.assert_close(found.loss_N, expected.loss_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.energy_N, expected.energy_N, rtol=1e-4, atol=1e-4)
    assert curvature.elimination is not None
    in_place = curvature.elimination.factor_KK is moments.hessian_sum_KK
    assert in_place == (sweeps == 0)
