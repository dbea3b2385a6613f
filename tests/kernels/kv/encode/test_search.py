"""Searched codes: never worse in the metric, as good as trying every single move."""

import itertools
from dataclasses import replace

import pytest
import torch
from kv_cases import side_of
from torch import Tensor

from rotq_kernels.kv.encode.one_side import dequantize_side, quantize_side, side_levels
from rotq_kernels.kv.format import SideConstants, decode_norm, level_values


def metric(heads: int, width: int, *, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Random positive definite W with a wide spectrum."""
    generator = torch.Generator().manual_seed(seed)
    basis_HDD = torch.linalg.qr(torch.randn(heads, width, width, generator=generator)).Q
    value_HD = torch.exp(spread * torch.randn(heads, width, generator=generator))
    return (basis_HDD * value_HD[:, None]) @ basis_HDD.mT


def side_with(bits: int, search: int, *, width: int = 16) -> SideConstants:
    side = side_of(2, width, bits, seed=1, mean=0.0)
    value_HL = level_values(side.levels_HL, bits)
    middle_HL = (value_HL[:, 1:] + value_HL[:, :-1]) / 2 * side.unit_H[:, None]
    eye_HDD = torch.eye(width).expand(2, -1, -1).contiguous()
    return replace(
        side,
        matrix_HDD=eye_HDD,
        inverse_HDD=eye_HDD,
        thresholds_HL=middle_HL,
        metric_HDD=metric(2, width),
        search=search,
    )


def rows(tokens: int = 50, width: int = 16, seed: int = 3) -> Tensor:
    return torch.randn(1, 2, tokens, width, generator=torch.Generator().manual_seed(seed))


def cost(x_BHTD: Tensor, side: SideConstants, bits: int) -> Tensor:
    """e W e of each token, with the norm as it is stored."""
    codes, norm = quantize_side(x_BHTD, side, bits, "float16")
    e_BHTD = (dequantize_side(codes, norm, side, bits) - x_BHTD).double()
    assert side.metric_HDD is not None
    return ((e_BHTD @ side.metric_HDD.double()) * e_BHTD).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_more_steps_cost_less(bits: int) -> None:
    x_BHTD = rows()
    costs = [cost(x_BHTD, side_with(bits, steps), bits).mean() for steps in (0, 1, 4, 16)]
    assert costs[0] > costs[1] > costs[2] >= 0.999 * costs[3]
    assert costs[2] < 0.8 * costs[0]


def test_no_step_is_the_nearest_level() -> None:
    x_BHTD = rows()
    plain = replace(side_with(3, 0), metric_HDD=None)
    found, expected = (quantize_side(x_BHTD, side, 3, "log8") for side in (side_with(3, 0), plain))
    assert torch.equal(found[0], expected[0])
    assert found[1] is not None
    assert expected[1] is not None
    assert torch.equal(found[1], expected[1])


def test_one_step_is_the_best_single_move() -> None:
    """Against all levels of all elements, at the scale of the nearest codes."""
    width, bits = 8, 2
    x_BHTD = rows(10, width)
    side = side_with(bits, 1, width=width)
    assert side.metric_HDD is not None
    nearest, _ = quantize_side(x_BHTD, replace(side, search=0), bits, "float16")
    found, _ = quantize_side(x_BHTD, side, bits, "float16")
    level = side_levels(nearest, side, bits)
    s = (x_BHTD * level).sum(-1) / level.square().sum(-1)
    for head, token in itertools.product(range(2), range(10)):
        W_DD, y_D = side.metric_HDD[head].double(), x_BHTD[0, head, token].double()

        moves = [nearest[0, head, token]]
        for d, q in itertools.product(range(width), range(2**bits)):
            moves.append(nearest[0, head, token].clone())
            moves[-1][d] = q
        moves.append(found[0, head, token])
        value_ND = level_values(side.levels_HL, bits)[head][torch.stack(moves).long()]
        e_ND = s[0, head, token].double() * value_ND - y_D
        price_N = ((e_ND @ W_DD) * e_ND).sum(-1)
        assert float(price_N[-1]) == pytest.approx(float(price_N.min()), rel=1e-5)


def test_scale_is_the_metric_s_least_squares() -> None:
    x_BHTD = rows()
    side = side_with(3, 4)
    assert side.metric_HDD is not None
    codes, norm = quantize_side(x_BHTD, side, 3, "float16")
    assert norm is not None
    level = side_levels(codes, side, 3)
    weighted = level @ side.metric_HDD
    expected = (x_BHTD * weighted).sum(-1) / (level * weighted).sum(-1)
    found = decode_norm(norm, side.base_H[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_rows_of_zeros_stay_finite() -> None:
    codes, norm = quantize_side(torch.zeros(1, 2, 3, 16), side_with(3, 4), 3, "float16")
    assert norm is not None
    assert torch.equal(norm, torch.zeros_like(norm))
    assert int(codes.max()) < 8


def test_scale_equivariant() -> None:
    side = side_with(3, 4)
    once, _ = quantize_side(rows(), side, 3, "log8")
    twice, _ = quantize_side(8 * rows(), side, 3, "log8")
    assert torch.equal(once, twice)
