"""Moments are weighted second moments; the corrected target is the least-squares one."""

import pytest
import torch

from rotq.solvers.gptq import eliminate
from rotq.solvers.statistics import Moments, corrected_target


def test_moments_equal_their_definition_over_batches():
    x_MK, original_MK = torch.randn(50, 8), torch.randn(50, 8)
    r_M = torch.rand(50)
    moments = Moments(8, cross=True, device=torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        moments.add(x_MK[part], original_MK[part], r_M[part])
    hessian_KK = (x_MK * r_M[:, None]).T @ x_MK / r_M.sum()
    cross_KK = (original_MK - x_MK).T @ (x_MK * r_M[:, None]) / r_M.sum()
    torch.testing.assert_close(moments.hessian_KK(), hessian_KK)
    torch.testing.assert_close(moments.cross_KK(), cross_KK)
    assert moments.tokens == 50


@pytest.mark.parametrize("settled", [False, True])
def test_a_hessian_of_which_a_half_is_summed_is_whole(settled):
    K = 520  # from 512 on
    x_MK, moments = torch.randn(9, K), Moments(K, cross=False, device=torch.device("cpu"))
    moments.add(x_MK[:4], None, None)
    moments.add(x_MK[4:], None, None)
    if settled:
        moments.settle()
    found_KK = moments.hessian_sum_KK if settled else moments.hessian_KK()
    assert torch.equal(found_KK, found_KK.T)
    torch.testing.assert_close(found_KK, x_MK.T @ x_MK / 9)


def test_equal_weights_are_no_weights():
    x_MK = torch.randn(30, 6)
    plain, weighted = (Moments(6, cross=False, device=torch.device("cpu")) for _ in range(2))
    plain.add(x_MK, None, None)
    weighted.add(x_MK, None, torch.full((30,), 0.5))
    torch.testing.assert_close(plain.hessian_KK(), weighted.hessian_KK())
    assert plain.cross_KK() is None


def test_weight_zero_leaves_a_token_out():
    x_MK = torch.randn(10, 4)
    some, masked = (Moments(4, cross=False, device=torch.device("cpu")) for _ in range(2))
    some.add(x_MK[:7], None, None)
    masked.add(x_MK, None, (torch.arange(10) < 7).float())
    torch.testing.assert_close(some.hessian_KK(), masked.hessian_KK())


def test_cross_moments_need_the_original_stream():
    with pytest.raises(ValueError, match="original"):
        Moments(4, cross=True, device=torch.device("cpu")).add(torch.randn(3, 4), None, None)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_corrected_target_interpolates_to_least_squares(alpha):
    x_MK, original_MK, weight_NK = torch.randn(200, 8), torch.randn(200, 8), torch.randn(5, 8)
    moments = Moments(8, cross=True, device=torch.device("cpu"))
    moments.add(x_MK, original_MK, None)
    elimination = eliminate(moments.hessian_KK(), "activation", 1e-9)
    target_NK = corrected_target(weight_NK, moments.cross_KK(), elimination, alpha)
    optimum_NK = torch.linalg.lstsq(x_MK.double(), original_MK.double() @ weight_NK.double().T)
    expected = (1 - alpha) * weight_NK + alpha * optimum_NK.solution.T.float()
    torch.testing.assert_close(target_NK, expected, rtol=1e-4, atol=1e-5)


def test_equal_streams_need_no_correction():
    x_MK, weight_NK = torch.randn(40, 8), torch.randn(3, 8)
    moments = Moments(8, cross=True, device=torch.device("cpu"))
    moments.add(x_MK, x_MK, None)
    elimination = eliminate(moments.hessian_KK(), "natural", 0.01)
    target_NK = corrected_target(weight_NK, moments.cross_KK(), elimination, 1.0)
    assert torch.equal(target_NK, weight_NK)
