"""Feedback on both sides of a weight, against GPTQ on the whole Kronecker product."""

import pytest
import torch
from damping import damp
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.formats.trellis import Trellis
from rotq.recipe import Solver
from rotq.solvers.gptq import eliminate, round_columns
from rotq.solvers.solve import solve
from rotq.solvers.statistics import Moments
from rotq.solvers.two_sided import eliminate_rows, refine_both, round_both

pytest.importorskip("numba")

GRID = Grid(bits=3, group_size=8, symmetric=False)


def moment(size: int, seed: int, tokens: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) / torch.arange(1, size + 1).sqrt()
    x_MN = torch.randn(tokens, size, generator=generator) @ mix.T
    return x_MN.T @ x_MN / tokens


def a_case(N: int = 12, K: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
    scale_NG = weight_NK.view(N, -1, 8).abs().amax(-1) / 3
    return weight_NK, moment(K, 1), moment(N, 2), scale_NG, torch.zeros_like(scale_NG)


def loss(error_NK: Tensor, hessian_KK: Tensor, output_NN: Tensor) -> float:
    products = output_NN.double() @ error_NK.double() @ hessian_KK.double()
    return (products * error_NK).sum().item()


def test_it_is_gptq_on_the_kronecker_product():
    """All weights as one row, in the order of columns and of rows inside them."""
    weight_NK, hessian_KK, output_NN, scale_NG, zero_NG = a_case()
    hessian_KK, _ = damp(hessian_KK, 0.01)
    columns, rows = eliminate(hessian_KK, "activation"), eliminate_rows(output_NN, 0.05)
    q_NK = round_both(weight_NK, columns, rows, scale_NG, zero_NG, GRID)
    N, K = weight_NK.shape
    place_P = (columns.visit_K[:, None] + K * rows.visit_N[None]).flatten()
    whole_PP = torch.kron(rows.hessian_NN.double(), hessian_KK.double()).float()
    whole_PP = whole_PP[place_P][:, place_P]
    scale_NK = scale_NG.repeat_interleave(8, 1)
    as_row = [each.flatten()[place_P][None] for each in (weight_NK, scale_NK)]
    alone = Grid(bits=3, group_size=1, symmetric=False)
    expected_1P = round_columns(
        as_row[0], eliminate(whole_PP, "natural"), as_row[1], torch.zeros(1, N * K), alone
    )
    assert torch.equal(q_NK.flatten()[place_P], expected_1P[0])


def test_rows_that_do_not_feel_each_other_are_rounded_as_ever():
    weight_NK, hessian_KK, _, scale_NG, zero_NG = a_case()
    columns = eliminate(damp(hessian_KK, 0.01)[0], "activation")
    rows = eliminate_rows(torch.diag(torch.arange(1.0, 13)), 0.05)
    q_NK = round_both(weight_NK, columns, rows, scale_NG, zero_NG, GRID)
    assert torch.equal(q_NK, round_columns(weight_NK, columns, scale_NG, zero_NG, GRID))


def test_sweeps_never_raise_the_loss():
    weight_NK, hessian_KK, output_NN, scale_NG, zero_NG = a_case(24, 32)
    rows = eliminate_rows(output_NN, 0.05)
    codes = (torch.zeros_like(weight_NK), scale_NG, zero_NG)
    before = loss(weight_NK, hessian_KK, rows.hessian_NN)
    for _ in range(4):
        q_NK, scale_NG = refine_both(
            weight_NK, hessian_KK, rows, codes, GRID, sweeps=1, scale_dtype=torch.float32
        )
        error_NK = q_NK * scale_NG.repeat_interleave(8, 1) - weight_NK
        now = loss(error_NK, hessian_KK, rows.hessian_NN)
        assert now < before
        before, codes = now, (q_NK, scale_NG, zero_NG)


@pytest.mark.parametrize("rounder", ["scalar", "trellis"])
def test_the_loss_of_both_sides_is_lower(rounder: str):
    K, N = 64, 512
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    moments = Moments(K, cross=False, device=torch.device("cpu"))
    x_MK = torch.randn(400, K, generator=torch.Generator().manual_seed(4)) @ moment(K, 8)
    moments.add(x_MK, None, None)
    output_NN = moment(N, 6, 2000)
    grid: Grid | Trellis = Grid(bits=3, group_size=32, symmetric=False)
    if rounder == "trellis":
        grid = Trellis(bits=3, group_size=-1, state_bits=8)
    options = Solver(rounder=rounder, refine_sweeps=0, output_damping=0.05)
    losses = []
    for given in (None, output_NN):
        found = solve(weight_NK, moments, grid, options, scale_dtype=torch.float32, output_NN=given)
        error_NK = found.quantized.dequantize() - weight_NK
        losses.append(loss(error_NK, moments.hessian_KK(), output_NN))
    assert losses[1] < 0.9 * losses[0]
