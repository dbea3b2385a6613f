"""Integer grids: all codes, the dequantization formula, sizes, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotq.formats.integer import Grid, Quantized, legal_group_sizes


@pytest.mark.parametrize(
    ("bits", "q_min", "q_max"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (5, -16, 15), (8, -128, 127)]
)
def test_range(bits: int, q_min: int, q_max: int) -> None:
    grid = Grid(bits=bits, group_size=-1, symmetric=True)
    assert (grid.q_min, grid.q_max) == (q_min, q_max)


def test_values_written_by_hand() -> None:
    quantized = Quantized(
        q_NK=torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8),
        scale_NG=torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        zero_NG=torch.tensor([[-8, 1]], dtype=torch.int8),
        grid=Grid(bits=4, group_size=2, symmetric=False),
    )
    assert quantized.dequantize().tolist() == [[0.0, 7.5, -2.0, 0.0]]
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_codes_are_evenly_spaced_and_monotone(bits: int, symmetric: bool) -> None:
    grid = Grid(bits=bits, group_size=-1, symmetric=symmetric)
    codes = torch.arange(grid.q_min, grid.q_max + 1, dtype=torch.int8)[None]
    for zero in [0] if symmetric else [grid.q_min, -1, grid.q_max]:
        quantized = Quantized(
            q_NK=codes,
            scale_NG=torch.tensor([[0.25]]),
            zero_NG=None if symmetric else torch.tensor([[zero]], dtype=torch.int8),
            grid=grid,
        )
        values = quantized.dequantize()[0]
        assert torch.equal(values.diff(), torch.full((2**bits - 1,), 0.25))
        assert values[zero - grid.q_min] == 0


@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_loop_in_fp32(bits: int, groups: int, size: int, seed: int) -> None:
    """q - z of 8 bits does not fit int8: the formula must not wrap around."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits=bits, group_size=size, symmetric=False)
    shape = (3, groups * size)
    q_NK = torch.randint(grid.q_min, grid.q_max + 1, shape, generator=generator).to(torch.int8)
    zero_NG = torch.randint(grid.q_min, grid.q_max + 1, (3, groups), generator=generator)
    scale_NG = torch.rand(3, groups, generator=generator).half() + 0.01
    quantized = Quantized(q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG.to(torch.int8), grid=grid)
    dense_NK = quantized.dequantize()
    for n in range(3):
        for k in range(groups * size):
            g = k // size
            step = scale_NG[n, g].float()
            assert dense_NK[n, k] == (int(q_NK[n, k]) - int(zero_NG[n, g])) * step


def test_dequantized_codes_round_to_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        grid = Grid(bits=bits, group_size=4, symmetric=True)
        q_NK = torch.randint(grid.q_min, grid.q_max + 1, (8, 16), generator=generator)
        scale_NG = torch.rand(8, 4, generator=generator).half() + 0.01
        quantized = Quantized(q_NK=q_NK.to(torch.int8), scale_NG=scale_NG, zero_NG=None, grid=grid)
        again = quantized.dequantize().view(8, 4, 4) / scale_NG.float()[..., None]
        assert torch.equal(again.round().view(8, 16).long(), q_NK)


def test_bits_per_weight() -> None:
    symmetric = Grid(bits=4, group_size=128, symmetric=True)
    assert symmetric.bits_per_weight(4096) == 4 + 16 / 128
    assert symmetric.bits_per_weight(4096, scale_bits=32) == 4 + 32 / 128
    asymmetric = Grid(bits=3, group_size=64, symmetric=False)
    assert asymmetric.bits_per_weight(4096) == 3 + (16 + 3) / 64
    assert Grid(bits=4, group_size=-1, symmetric=True).bits_per_weight(4096) == 4 + 16 / 4096


def test_group_sizes() -> None:
    grid = Grid(bits=4, group_size=64, symmetric=True)
    assert grid.columns_per_group(576) == 64
    assert Grid(bits=4, group_size=-1, symmetric=True).columns_per_group(577) == 577
    assert legal_group_sizes(576) == [16, 24, 32, 48, 64, 72, 96, 144, 192, 288, 576]
    with pytest.raises(ValueError, match="128 does not divide 576 columns; legal sizes: 16, 24"):
        Grid(bits=4, group_size=128, symmetric=True).columns_per_group(576)


@pytest.mark.parametrize(
    ("in_features", "sizes"),
    [(60, "2, 3, 4, 5, 6, 10, 12, 15, 20, 30, or -1 for"), (61, "only -1, for")],
)
def test_legal_sizes_are_never_an_empty_list(in_features: int, sizes: str) -> None:
    grid = Grid(bits=4, group_size=128, symmetric=True)
    with pytest.raises(ValueError, match=f"columns; legal sizes: {sizes} one group per channel"):
        grid.columns_per_group(in_features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"group_size": 0}, "group_size must be"),
        ({"group_size": -2}, "group_size must be"),
    ],
)
def test_refusals(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"bits": 4, "group_size": 8, "symmetric": True, **fields})  # type: ignore[arg-type]
