"""Tiles of EXL3: their order, their stream and their levels, each against its definition."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rotq_kernels.trellis import search
from rotq_kernels.trellis.code import code_levels
from rotq_kernels.trellis.search import closing, find_states, search_reference
from rotq_kernels.trellis.tiles import (
    from_rings,
    lane_order,
    pack_tiles,
    search_tiles,
    tile_levels,
    tile_states,
    tile_weight,
    to_rings,
)

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba, which is optional"
)
BITS = tuple(range(1, 9))


def random_symbols(bits: int, *tiles: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (*tiles, 256), generator=generator, dtype=torch.uint8)


def test_the_order_is_that_of_a_tensor_core() -> None:
    """By hand: lanes 0 and 5, whose rows are 0 and 2, whose columns are 0 and 1."""
    order = lane_order().tolist()
    assert order[:8] == [0, 16, 128, 144, 8, 24, 136, 152]
    assert order[40:44] == [2 * 16 + 1, 3 * 16 + 1, 10 * 16 + 1, 11 * 16 + 1]
    assert order[44:48] == [2 * 16 + 9, 3 * 16 + 9, 10 * 16 + 9, 11 * 16 + 9]
    assert sorted(order) == list(range(256))


def test_rings_are_tiles_in_that_order() -> None:
    weight_KN = torch.arange(32 * 48.0).view(32, 48)
    ring_IJT = to_rings(weight_KN)
    assert ring_IJT.shape == (2, 3, 256)
    assert torch.equal(ring_IJT[1, 2], weight_KN[16:, 32:].flatten()[lane_order()])
    assert torch.equal(from_rings(ring_IJT), weight_KN)


@pytest.mark.parametrize("bits", BITS)
def test_a_state_is_the_sixteen_bits_of_the_stream_that_end_with_its_symbol(bits: int) -> None:
    """Read from the packed words as a string of bits."""
    symbol_IJT = random_symbols(bits, 1, 2)
    packed_IJW = pack_tiles(symbol_IJT, bits)
    assert packed_IJW.shape == (1, 2, 16 * bits)
    for tile in range(2):
        words = packed_IJW[0, tile].view(-1, 2).flip(1).flatten().numpy().astype(np.uint16)
        stream = "".join(f"{word:016b}" for word in words)
        assert stream == "".join(f"{symbol:0{bits}b}" for symbol in symbol_IJT[0, tile].tolist())
        ring = stream * 2
        ends = [256 * bits + (t + 1) * bits for t in range(256)]
        ends[-1] = 2 * 256 * bits
        states = [int(ring[end - 16 : end], 2) for end in ends]
        assert tile_states(packed_IJW, bits)[0, tile].tolist() == states


@pytest.mark.parametrize(
    ("code", "state", "level"),
    [
        # the sum of four bytes, by hand: 0x83DCD12D has 131 + 220 + 209 + 45 = 605
        ("mul1", 1, np.float16((605 + 1024) * 1774 / 2**18 - 10.3828125)),
        ("mul1", 0, np.float16(1024 * 1774 / 2**18 - 10.3828125)),
        # both halves of 0x3b603b60 are 0.921875
        ("mcg", 0, np.float16(2 * 0.921875)),
    ],
    ids=str,
)
def test_levels_by_hand(code: str, state: int, level: np.float16) -> None:
    assert tile_levels(code)[state].item() == float(level)


@pytest.mark.parametrize("code", ["mul1", "mcg", "3inst"])
def test_levels_are_near_to_normal(code: str) -> None:
    level_P = tile_levels(code)
    assert torch.equal(level_P, level_P.half().float())
    assert abs(level_P.mean().item()) < 0.01
    assert level_P.std().item() == pytest.approx(1.0 if code == "mul1" else 1.2437, abs=0.01)
    share = (level_P.abs() < level_P.std()).float().mean().item()
    assert share == pytest.approx(0.683, abs=0.02)


def test_another_code_is_refused() -> None:
    with pytest.raises(ValueError, match="mul1, mcg and 3inst, got 'hyb'"):
        tile_levels("hyb")


@needs_numba
@pytest.mark.parametrize("bits", [3, 8])
def test_what_the_search_found_is_what_the_file_stands_for(bits: int) -> None:
    x_ST = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    x_ST = 0.75 * x_ST  # levels end at 3.5
    symbol_ST, level_ST = search_tiles(x_ST, bits, reach=16)
    weight_KN = tile_weight(pack_tiles(symbol_ST[None], bits), bits)
    assert torch.equal(to_rings(weight_KN)[0], level_ST)
    assert (x_ST - level_ST).square().mean() < 1.5 * 4.0**-bits + 1e-4


@needs_numba
@pytest.mark.parametrize("reach", [4, 8, 100])
def test_both_programs_reach_as_far(reach: int) -> None:
    x_SR = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    found_SR = find_states(x_SR, code_levels(8), 3, reach=reach)
    expected_SR = search_reference(x_SR, code_levels(8), 3, closing(40, reach))
    assert torch.equal(found_SR, expected_SR)
    if reach == 100:
        assert torch.equal(found_SR, search_reference(x_SR, code_levels(8), 3))


def test_plain_pytorch_takes_some_rings_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the five here; each has 40 steps of 32 values."""
    x_SR = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    expected_SR = search_reference(x_SR, code_levels(8), 3)
    sizes: list[int] = []

    def noted(part_SR: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(part_SR))
        return search_reference(part_SR, *rest)

    monkeypatch.setattr(search, "is_native", lambda: False)
    monkeypatch.setattr(search, "search_reference", noted)
    monkeypatch.setattr(search, "REMEMBERED", 2 * 4 * 40 * 32)
    assert torch.equal(find_states(x_SR, code_levels(8), 3), expected_SR)
    assert sizes == [2, 2, 1]
