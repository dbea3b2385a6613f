"""Refinement never raises the objective, and each step is the exact optimum of its coordinate."""

import pytest
import torch
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.solvers.refine import refine, refine_codes, refine_scales


def start(symmetric: bool, group_size: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian_KK = x_MK.T @ x_MK / 200 + 0.1 * torch.eye(64)
    target_NK = torch.randn(6, 64, generator=generator)
    grid = Grid(bits=3, group_size=group_size, symmetric=symmetric)
    groups = 64 // grid.columns_per_group(64)
    scale_NG = torch.full((6, groups), 0.5)
    zero_NG = torch.zeros(6, groups) if symmetric else torch.ones(6, groups)
    w_NGg = target_NK.view(6, groups, -1) / scale_NG[..., None] + zero_NG[..., None]
    q_NK = w_NGg.round().clamp(grid.q_min, grid.q_max).view(6, 64)
    return target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), grid


def loss(target_NK: Tensor, hessian_KK: Tensor, codes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Per row, fp64."""
    q_NK, scale_NG, zero_NG = (tensor.double() for tensor in codes)
    w_NK = (q_NK.view(len(q_NK), scale_NG.shape[1], -1) - zero_NG[..., None]) * scale_NG[..., None]
    error_NK = w_NK.view_as(q_NK) - target_NK.double()
    return ((error_NK @ hessian_KK.double()) * error_NK).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_never_rises(symmetric, group_size, dtype):
    target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), grid = start(symmetric, group_size)
    before = loss(target_NK, hessian_KK, (q_NK, scale_NG, zero_NG))
    first = before
    for _ in range(4):
        codes = (q_NK, scale_NG, zero_NG)
        scale_NG = refine_scales(target_NK, hessian_KK, codes, scale_dtype=dtype)
        after = loss(target_NK, hessian_KK, (q_NK, scale_NG, zero_NG))
        assert (after <= before * (1 + 1e-5)).all()
        q_NK = refine_codes(target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), grid)
        before = loss(target_NK, hessian_KK, (q_NK, scale_NG, zero_NG))
        assert (before <= after * (1 + 1e-5)).all()
    assert (before < 0.9 * first).all()
    assert torch.equal(scale_NG, scale_NG.to(dtype).float())
    assert q_NK.min() >= grid.q_min
    assert q_NK.max() <= grid.q_max


def test_scale_of_a_single_group_is_the_least_squares_one():
    target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), _ = start(True, -1)
    refined = refine_scales(
        target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), scale_dtype=torch.float32
    )
    exact_N = ((q_NK @ hessian_KK) * target_NK).sum(-1) / ((q_NK @ hessian_KK) * q_NK).sum(-1)
    torch.testing.assert_close(refined[:, 0], exact_N, rtol=1e-5, atol=0)


def test_last_code_is_the_best_of_all_levels():
    target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), grid = start(False)
    refined_NK = refine_codes(target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), grid)
    actual = loss(target_NK, hessian_KK, (refined_NK, scale_NG, zero_NG))
    for level in range(grid.q_min, grid.q_max + 1):
        other_NK = refined_NK.clone()
        other_NK[:, -1] = level
        other = loss(target_NK, hessian_KK, (other_NK, scale_NG, zero_NG))
        assert (actual <= other * (1 + 1e-5)).all()


def test_no_sweeps_change_nothing():
    target_NK, hessian_KK, codes, grid = start(False)
    q_NK, scale_NG = refine(target_NK, hessian_KK, codes, grid, sweeps=0, scale_dtype=torch.float16)
    assert torch.equal(q_NK, codes[0])
    assert torch.equal(scale_NG, codes[1])
