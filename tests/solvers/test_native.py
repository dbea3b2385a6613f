"""Native loops against plain PyTorch's: the same codes, on weights large enough for the former."""

from collections.abc import Callable

import pytest
import torch
from damping import damp
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.solvers import gptq, refine, scales
from rotq.solvers.gptq import RowBounds, eliminate, round_columns
from rotq.solvers.refine import refine_codes
from rotq.solvers.scales import search_scales

pytest.importorskip("numba")

N, K = 330, 272
"""No multiples of a strip of rows or of a block of columns."""


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Calls a function without native code."""

    def call(function: Callable[..., Tensor], *given: object, **named: object) -> Tensor:
        with monkeypatch.context() as patch:
            for module in (gptq, refine):
                patch.setattr(module, "rounds_natively", lambda _: False)
            patch.setattr(scales, "searches_natively", lambda _: False)
            return function(*given, **named)

    return call


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a damped Hessian."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(900, K, generator=generator) @ torch.randn(K, K, generator=generator)
    damped_KK, _ = damp(x_MK.T @ x_MK / 900, 0.05)
    return torch.randn(N, K, generator=generator), damped_KK


def grids() -> list[Grid]:
    return [
        Grid(bits=3, group_size=16, symmetric=False),
        Grid(bits=2, group_size=68, symmetric=True),
    ]


@pytest.mark.parametrize("grid", grids(), ids=["asymmetric", "symmetric"])
def test_scales_have_the_least_loss(grid: Grid, plainly: Callable[..., Tensor]) -> None:
    weight_NK, damped_KK = problem()
    options = {"judge": "hessian", "scale_dtype": torch.float16}
    assert scales.searches_natively(weight_NK.view(N, -1, grid.columns_per_group(K)))
    found = search_scales(weight_NK, damped_KK, grid, **options)
    expected = plainly(search_scales, weight_NK, damped_KK, grid, **options)
    # sums are in another order: of two that are equal to rounding either may be taken
    for one, other in zip(found, expected, strict=True):
        assert (one != other).float().mean() < 1e-3


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_columns_have_the_same_codes(order: str, plainly: Callable[..., Tensor]) -> None:
    weight_NK, damped_KK = problem()
    grid = grids()[0]
    found = search_scales(weight_NK, damped_KK, grid, judge="mse", scale_dtype=torch.float16)
    elimination = eliminate(damped_KK, order)
    codes = round_columns(weight_NK, elimination, *found, grid)
    expected = plainly(round_columns, weight_NK, elimination, *found, grid)
    assert (codes != expected).float().mean() < 1e-4
    assert len(codes.unique()) == 8


def test_rows_have_bounds_of_their_own() -> None:
    weight_NK, damped_KK = problem()
    grid = Grid(bits=4, group_size=16, symmetric=True)
    found = search_scales(weight_NK, damped_KK, grid, judge="mse", scale_dtype=torch.float16)
    low_N = torch.tensor([-8.0, -2.0]).repeat(N // 2)
    bounds = RowBounds(q_min=low_N, q_max=-low_N - 1)
    codes = round_columns(weight_NK, eliminate(damped_KK, "natural"), *found, bounds)
    assert codes[1::2].aminmax() == (-2, 1)
    assert codes[::2].aminmax() == (-8, 7)


def test_sweeps_have_the_same_codes(plainly: Callable[..., Tensor]) -> None:
    weight_NK, damped_KK = problem()
    grid = grids()[0]
    scale_NG, zero_NG = search_scales(
        weight_NK, damped_KK, grid, judge="mse", scale_dtype=torch.float16
    )
    elimination = eliminate(damped_KK, "natural")
    start_NK = round_columns(weight_NK, elimination, scale_NG, zero_NG, grid)
    given = (weight_NK, damped_KK, (start_NK, scale_NG, zero_NG), grid)
    codes_NK = refine_codes(*given)
    assert (codes_NK != start_NK).float().mean() > 0.01
    assert (codes_NK != plainly(refine_codes, *given)).float().mean() < 1e-4
