"""GPTQ against a slow reference, its identities, and the odd inputs."""

import pytest
import torch
from damping import damp
from torch import Tensor

from rotq.errors import RotqError
from rotq.formats.integer import Grid
from rotq.solvers.gptq import eliminate, round_columns
from rotq.solvers.scales import round_to_grid, search_scales


def problem(N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random weights, and a Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(4 * K, K, generator=generator) @ torch.randn(K, K, generator=generator)
    return torch.randn(N, K, generator=generator), x_MK.T @ x_MK / len(x_MK)


def scales_of(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    return search_scales(weight_NK, hessian_KK, grid, judge="minmax", scale_dtype=torch.float32)


def dequantize(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
    q_NGg = q_NK.view(len(q_NK), scale_NG.shape[1], -1)
    return ((q_NGg - zero_NG[..., None]) * scale_NG[..., None]).view_as(q_NK)


def slow_gptq(weight_NK: Tensor, hessian_KK: Tensor, scale_NG: Tensor, zero_NG: Tensor, grid: Grid):
    """Optimal brain quantization with a fixed order, from the inverse of the remaining Hessian."""
    w_NK, K = weight_NK.double().clone(), weight_NK.shape[1]
    q_NK = torch.zeros_like(w_NK)
    for k in range(K):
        g = k // (K // scale_NG.shape[1])
        scale_N, zero_N = scale_NG[:, g].double(), zero_NG[:, g].double()
        q_NK[:, k] = (w_NK[:, k] / scale_N + zero_N).round().clamp(grid.q_min, grid.q_max)
        error_N = w_NK[:, k] - (q_NK[:, k] - zero_N) * scale_N
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian_KK[k:, k:].double()))
        w_NK[:, k:] -= error_N[:, None] * inverse[0] / inverse[0, 0]
    return q_NK


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("N", "K", "group_size"), [(5, 24, 8), (3, 300, 100), (1, 17, -1)])
def test_round_columns_equals_slow_reference(N, K, group_size, symmetric):
    weight_NK, hessian_KK = problem(N, K)
    grid = Grid(bits=3, group_size=group_size, symmetric=symmetric)
    hessian_KK, _ = damp(hessian_KK, 0.05)
    scale_NG, zero_NG = scales_of(weight_NK, hessian_KK, grid)
    q_NK = round_columns(weight_NK, eliminate(hessian_KK, "natural"), scale_NG, zero_NG, grid)
    expected_NK = slow_gptq(weight_NK, hessian_KK, scale_NG, zero_NG, grid)
    # a tie broken the other way in fp32 may change later columns of its row
    assert (q_NK != expected_NK).any(-1).float().mean() <= 1 / N * (N > 1)


def test_identity_hessian_is_round_to_nearest():
    weight_NK, _ = problem(7, 64)
    grid = Grid(bits=4, group_size=32, symmetric=False)
    scale_NG, zero_NG = scales_of(weight_NK, torch.eye(64), grid)
    for order in ("natural", "activation"):
        q_NK = round_columns(weight_NK, eliminate(torch.eye(64), order), scale_NG, zero_NG, grid)
        nearest = round_to_grid(weight_NK.view(7, 2, 32), scale_NG, zero_NG, grid).view(7, 64)
        assert torch.equal(dequantize(q_NK, scale_NG, zero_NG), nearest)


def test_activation_order_is_natural_order_of_permuted_columns():
    weight_NK, hessian_KK = problem(6, 40)
    hessian_KK, _ = damp(hessian_KK, 0.01)
    grid = Grid(bits=3, group_size=-1, symmetric=True)
    scale_NG, zero_NG = scales_of(weight_NK, hessian_KK, grid)
    visit_K = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True)
    actual = round_columns(weight_NK, eliminate(hessian_KK, "activation"), scale_NG, zero_NG, grid)
    permuted = round_columns(
        weight_NK[:, visit_K],
        eliminate(hessian_KK[visit_K][:, visit_K], "natural"),
        scale_NG,
        zero_NG,
        grid,
    )
    assert torch.equal(actual[:, visit_K], permuted)
    natural = round_columns(weight_NK, eliminate(hessian_KK, "natural"), scale_NG, zero_NG, grid)
    assert not torch.equal(actual, natural)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_beats_round_to_nearest(seed):
    weight_NK, hessian_KK = problem(32, 128, seed)
    hessian_KK, _ = damp(hessian_KK, 0.01)
    grid = Grid(bits=3, group_size=32, symmetric=False)
    scale_NG, zero_NG = scales_of(weight_NK, hessian_KK, grid)

    def loss(q_NK: Tensor) -> float:
        error_NK = dequantize(q_NK, scale_NG, zero_NG) - weight_NK
        return float(((error_NK @ hessian_KK) * error_NK).sum())

    nearest = round_columns(
        weight_NK, eliminate(torch.eye(128), "natural"), scale_NG, zero_NG, grid
    )
    ours = round_columns(weight_NK, eliminate(hessian_KK, "activation"), scale_NG, zero_NG, grid)
    assert loss(ours) < 0.7 * loss(nearest)


def test_damp_climbs_until_the_hessian_factors():
    hessian_KK = torch.ones(32, 32)
    hessian_KK[0, 0] = -3.0
    with pytest.raises(RotqError, match="not positive definite"):
        damp(hessian_KK - 40 * torch.eye(32), 0.01)
    indefinite_KK = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.03]))
    damped_KK, share = damp(indefinite_KK, 0.01)
    assert share == pytest.approx(0.05)
    assert torch.linalg.eigvalsh(damped_KK).min() > 0


def test_damp_handles_dead_columns_and_rank_deficiency():
    x_MK = torch.randn(3, 16)
    x_MK[:, 5] = 0
    damped_KK, share = damp(x_MK.T @ x_MK, 0.01)
    assert share == 0.01
    assert damped_KK[5, 5] > 0


def test_damp_refuses_what_is_not_finite():
    with pytest.raises(RotqError, match="not finite"):
        damp(torch.full((4, 4), float("nan")), 0.01)
