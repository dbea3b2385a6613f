"""Block LDLQ on tiles: the recursion against its definition, and what it gains."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from damping import damp
from torch import Tensor

from rotq.formats.exl3 import TiledWeight, TileGrid, unturned
from rotq.numerics import inverse
from rotq.ops import from_rings, search_tiles, to_rings
from rotq.recipe import Solver
from rotq.solvers.solve import solve
from rotq.solvers.statistics import Moments
from rotq.solvers.tiles import (
    REACH,
    Turn,
    choose_scales,
    code_tiles,
    eliminate_tiles,
    fit_scales,
    join_tiles,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="without numba the search takes minutes"
)

OPTIONS = Solver(rounder="trellis", damping=0.01)


def layer(N: int, K: int, seed: int = 0) -> tuple[Tensor, Moments]:
    """A weight and moments of correlated inputs, some features larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed_KK = torch.randn(K, K, generator=generator) * torch.logspace(0, -1.5, K)
    moments = Moments(K, cross=False, device=torch.device("cpu"))
    moments.add(torch.randn(4 * K, K, generator=generator) @ mixed_KK, None, None)
    return torch.randn(N, K, generator=generator) * 0.02, moments


def relative_loss(weight_NK: Tensor, found_NK: Tensor, moments: Moments) -> float:
    H, error_NK = moments.hessian_KK(), found_NK - weight_NK
    return float(((error_NK @ H) * error_NK).sum() / ((weight_NK @ H) * weight_NK).sum())


def test_turned_weight_and_hessian_give_the_same_loss() -> None:
    """In fp64, padding left out: tr (E H E^T) is the same in both bases, and turning inverts."""
    weight_NK, moments = layer(128, 256)
    turn = choose_scales(weight_NK, TileGrid(bits=4), 3)
    turn = Turn(suh_k=turn.suh_k.double(), svh_n=turn.svh_n.double())
    turned_nk = turn.weight(weight_NK.double())
    back_NK = unturned(turned_nk, turn.suh_k, turn.svh_n)
    torch.testing.assert_close(back_NK, weight_NK.double(), rtol=1e-10, atol=1e-12)
    hessian_KK = moments.hessian_KK().double()
    turned_kk = turn.hessian(hessian_KK)
    loss_n = ((turned_nk @ turned_kk) * turned_nk).sum()
    # outputs are turned too, and divided by their scales
    plain_NK = weight_NK.double() / turn.svh_n[:, None]
    loss_N = ((plain_NK @ hessian_KK) * plain_NK).sum()
    assert loss_n.item() == pytest.approx(loss_N.item(), rel=1e-10)


def test_rows_that_are_turned_have_one_size_and_padding_is_silent() -> None:
    weight_NK, _ = layer(144, 80)
    weight_NK[3] *= 50
    turn = choose_scales(weight_NK, TileGrid(bits=3), 0)
    assert turn.svh_n.shape == (256,)
    assert turn.suh_k.shape == (128,)
    assert not turn.svh_n[144:].any()
    sizes_k = turn.weight(weight_NK).square().mean(0).sqrt()
    assert sizes_k.max() / sizes_k.min() < 2


def test_each_tile_of_columns_takes_up_the_errors_of_those_before() -> None:
    """The recursion by its other form: rounded is w + E H_b,rest H_rest^-1, tile by tile."""
    generator = torch.Generator().manual_seed(2)
    turned_nk = torch.randn(16, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator)
    hessian_kk, _ = damp(x.T @ (x * torch.linspace(0.2, 3, 200)[:, None]) / 200, 0.01)
    elimination = eliminate_tiles(hessian_kk, "activation")
    tiles = code_tiles(turned_nk, elimination, 2)
    order = elimination.visit_K
    assert sorted(order.view(-1, 16)[:, 0].tolist()) == [0, 16, 32, 48]
    H = hessian_kk[order[:, None], order].double()
    w_nk, level_nk = turned_nk[:, order].double(), tiles.level_nk[:, order].double()
    for start in range(0, 64, 16):
        done, tile, rest = slice(start), slice(start, start + 16), slice(start, 64)
        error_nd = level_nk[:, done] - w_nk[:, done]
        change_nr = -(inverse(H[rest, rest]) @ H[rest, done] @ error_nd.T).T
        wanted_n16 = (w_nk[:, rest] + change_nr)[:, :16]
        ring_11T = to_rings(wanted_n16.T.float())
        _, found_1T = search_tiles(ring_11T[0], 2, reach=REACH)
        # sums in fp32 may find another path where two are as good
        assert (level_nk[:, tile] != from_rings(found_1T[None]).T).double().mean() < 0.1


def test_feedback_and_fitted_scales_lower_the_loss() -> None:
    weight_NK, moments = layer(64, 256)
    grid = TileGrid(bits=2)
    hessian_KK, _ = damp(moments.hessian_KK(), 0.01)
    turn = choose_scales(weight_NK, grid, 0)
    turned_nk = turn.weight(weight_NK)

    def loss(level_nk: Tensor, scales: Turn) -> float:
        found_NK = unturned(level_nk, scales.suh_k, scales.svh_n)[:64, :256]
        return relative_loss(weight_NK, found_NK, moments)

    blind = code_tiles(turned_nk, eliminate_tiles(torch.eye(256), "natural"), 2)
    fed = code_tiles(turned_nk, eliminate_tiles(turn.hessian(hessian_KK), "activation"), 2)
    fitted = fit_scales(weight_NK, hessian_KK, fed.level_nk, turn)
    assert loss(fed.level_nk, turn) < 0.7 * loss(blind.level_nk, turn)
    assert loss(fed.level_nk, fitted) < loss(fed.level_nk, turn)
    # scales of either side that were wrong come back
    wrong = torch.linspace(0.5, 2, 256)
    for spoilt in (
        Turn(suh_k=turn.suh_k * wrong, svh_n=turn.svh_n),
        Turn(suh_k=turn.suh_k, svh_n=turn.svh_n * wrong[: len(turn.svh_n)]),
    ):
        found = fit_scales(weight_NK, hessian_KK, fed.level_nk, spoilt, rounds=4)
        assert loss(fed.level_nk, found) < 1.05 * loss(fed.level_nk, fitted)


def test_rows_in_parts_are_those_of_the_whole() -> None:
    weight_NK, moments = layer(128, 128)
    turn = choose_scales(weight_NK, TileGrid(bits=3), 0)
    elimination = eliminate_tiles(turn.hessian(damp(moments.hessian_KK(), 0.05)[0]), "natural")
    turned_nk = turn.weight(weight_NK)
    whole = code_tiles(turned_nk, elimination, 3)
    parts = join_tiles([code_tiles(part, elimination, 3) for part in turned_nk.split(64)])
    assert torch.equal(parts.symbol_IJT, whole.symbol_IJT)


def test_the_solution_is_what_it_says() -> None:
    weight_NK, moments = layer(80, 144)
    solution = solve(
        weight_NK, moments, TileGrid(bits=4), OPTIONS, scale_dtype=torch.float16, seed=1
    )
    tiled = solution.quantized
    assert isinstance(tiled, TiledWeight)
    assert tiled.trellis_IJW.shape == (16, 8, 64)
    loss = solution.loss_N.sum() / solution.energy_N.sum()
    found = relative_loss(weight_NK, tiled.dequantize(), moments)
    assert float(loss) == pytest.approx(found, rel=1e-3)
    assert found < 0.01


def test_zeros_stay_zeros() -> None:
    weight_NK, moments = layer(32, 128)
    weight_NK[:5] = 0
    solution = solve(weight_NK, moments, TileGrid(bits=3), OPTIONS, scale_dtype=torch.float16)
    found_NK = solution.quantized.dequantize()
    assert torch.isfinite(found_NK).all()
    # a row of zeros shares its block with others: their noise, scaled by nothing, is fitted away
    assert found_NK[:5].abs().max() < 1e-3
