"""The search: the best closed path, its distortion on normal data, one result of both programs."""

import importlib.util

import pytest
import torch

from rotq_kernels.trellis.code import code_levels, path_levels
from rotq_kernels.trellis.search import _forward, search_paths, search_reference

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba, which is optional"
)

CODES = [(1, 8), (2, 9), (3, 8), (4, 8), (5, 8), (8, 9), (3, 12)]


def normal(rings: int, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rings, rows, generator=torch.Generator().manual_seed(seed))


@needs_numba
@pytest.mark.parametrize(("bits", "state_bits"), CODES, ids=str)
def test_native_code_finds_the_paths_of_plain_pytorch(bits: int, state_bits: int) -> None:
    from rotq_kernels.trellis.native import search_native

    level_P = code_levels(state_bits)
    for rows in (20, 33):
        x_SR = normal(3, rows)
        expected_SR = search_reference(x_SR, level_P, bits)
        assert torch.equal(search_native(x_SR, level_P, bits), expected_SR)


@pytest.mark.parametrize(("bits", "state_bits"), CODES[:-1], ids=str)
def test_paths_close(bits: int, state_bits: int) -> None:
    """The levels that are returned are those that the symbols alone stand for."""
    symbol_SR, level_SR = search_paths(normal(3, 24), bits, state_bits)
    read_RS = path_levels(symbol_SR.T.contiguous(), bits, state_bits, 24)
    assert torch.equal(read_RS.T, level_SR)


def test_few_paths_are_better() -> None:
    """The least cost of all closed paths, from every u that there is; ends are only guessed."""
    level_P, bits = code_levels(8), 2
    x_SR = normal(20, 60)
    _, level_SR = search_paths(x_SR, bits, 8)
    found_S = (x_SR - level_SR).square().sum(1)
    held_GG = torch.full((64, 64), float("inf")).fill_diagonal_(0.0)
    least_S = torch.stack(
        [
            _forward(x_R.flip(0).expand(64, -1), level_P, bits, held_GG)[1].diagonal().min()
            for x_R in x_SR
        ]
    )
    assert (found_S > 0.9999 * least_S).all()
    assert found_S.sum() < 1.03 * least_S.sum()


@needs_numba
@pytest.mark.parametrize(
    ("bits", "gain", "limit"), [(2, 1.1, 0.0739), (3, 1.08, 0.0189), (4, 1.0, 0.0054)]
)
def test_distortion_on_normal_data(bits: int, gain: float, limit: float) -> None:
    """The bound of any code is 4^-bits; Lloyd-Max scalars have 0.1175, 0.0346, 0.0095."""
    x_SR = normal(100, 256, seed=1)
    x_SR /= x_SR.square().mean().sqrt()
    _, level_SR = search_paths(gain * x_SR, bits, 12)
    assert 4.0**-bits < (x_SR - level_SR / gain).square().mean().item() <= limit


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 4 rows"):
        search_paths(torch.zeros(1, 3), 3, 12)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        search_paths(torch.zeros(1, 30), 9, 12)
    with pytest.raises(ValueError, match=r"2-D torch.float32, got 1-D torch.float64"):
        search_paths(torch.zeros(30, dtype=torch.float64), 3, 12)
