"""Rounding of activations: tables written by hand, the definition in a loop, dtypes, gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotq.formats.activations import ActivationGrid, fake_quantize

GRIDS = [
    ActivationGrid(bits=bits, symmetric=symmetric)
    for bits in range(2, 9)
    for symmetric in (True, False)
]


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def defined(row: Tensor, grid: ActivationGrid) -> Tensor:
    """The module's formula, one value at a time, in fp32."""
    low = torch.minimum(row.min(), torch.zeros(()))
    high = torch.maximum(row.max(), torch.zeros(()))
    levels = torch.tensor(float(2**grid.bits - 1))
    scale = (2 * torch.maximum(high, -low) if grid.symmetric else high - low) / levels
    if scale == 0:
        return torch.zeros_like(row)
    bottom, top = -(2.0 ** (grid.bits - 1)), 2.0 ** (grid.bits - 1) - 1
    zero = torch.zeros(()) if grid.symmetric else torch.round(bottom - low / scale)
    codes = [torch.round(torch.clamp(value / scale + zero, bottom, top)) for value in row]
    return torch.stack([(code - zero) * scale for code in codes])


@pytest.mark.parametrize(
    ("symmetric", "row", "expected"),
    [
        # s = 1, z = 0: halves to even
        (False, [-2.0, -0.5, 0.5, 1.0], [-2.0, 0.0, 0.0, 1.0]),
        # all positive: zero is on the grid, s = 1, z = -2, and x / s + z is what is rounded
        (False, [3.0, 1.5, 0.5, 2.0], [3.0, 2.0, 0.0, 2.0]),
        # all negative
        (False, [-3.0, -1.0, -2.25, -0.25], [-3.0, -1.0, -2.0, 0.0]),
        # s = 2 * 1.5 / 3 = 1: the largest value is clamped to q_max
        (True, [1.5, -1.0, 0.5, -0.75], [1.0, -1.0, 0.0, -1.0]),
        # the other sign has one level more
        (True, [-1.5, 1.0, -0.5, 0.75], [-2.0, 1.0, 0.0, 1.0]),
        (True, [0.0, -0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
        (False, [0.0, -0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_two_bits_written_by_hand(symmetric: bool, row: list[float], expected: list[float]) -> None:
    grid = ActivationGrid(bits=2, symmetric=symmetric)
    equal(fake_quantize(torch.tensor(row), grid), torch.tensor(expected))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_definition(grid: ActivationGrid) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 24, generator=generator) * torch.logspace(-3, 3, 6)[:, None]
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3] = 0
    equal(fake_quantize(rows, grid), torch.stack([defined(row, grid) for row in rows]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_level_is_kept(grid: ActivationGrid) -> None:
    """A token of levels, and of the value that makes the step 1/4, keeps them."""
    first = grid.q_min + 1 if grid.symmetric else grid.q_min
    levels = torch.arange(first, grid.q_max + 1) * 0.25
    widest = [(2**grid.bits - 1) * 0.125] if grid.symmetric else []
    row = torch.cat([levels, torch.tensor(widest)])
    equal(fake_quantize(row, grid)[: len(levels)], levels)


def test_each_token_and_each_group_has_its_own_scale() -> None:
    grid = ActivationGrid(bits=4, symmetric=False)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    by_group = fake_quantize(x, grid, group_size=4)
    for b in range(2):
        for t in range(3):
            equal(fake_quantize(x, grid)[b, t], defined(x[b, t], grid))
            equal(by_group[b, t, :4], defined(x[b, t, :4], grid))
            equal(by_group[b, t, 4:], defined(x[b, t, 4:], grid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_fp32(dtype: torch.dtype) -> None:
    grid = ActivationGrid(bits=8, symmetric=False)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    equal(fake_quantize(x, grid), fake_quantize(x.float(), grid).to(dtype))


def test_fp64_stays_fp64() -> None:
    grid = ActivationGrid(bits=8, symmetric=True)
    x = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 2 * x.abs().max() / 255
    equal(fake_quantize(x, grid), (x / step).clamp(-128, 127).round() * step)


def test_the_input_is_not_modified() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    before = x.clone()
    fake_quantize(x, ActivationGrid(bits=2, symmetric=False))
    equal(x, before)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        ActivationGrid(bits=bits, symmetric=False)


@pytest.mark.parametrize("group_size", [0, 3, -2])
def test_group_size_must_divide(group_size: int) -> None:
    grid = ActivationGrid(bits=4, symmetric=False)
    with pytest.raises(ValueError, match=f"group size {group_size} does not divide 8"):
        fake_quantize(torch.zeros(2, 8), grid, group_size=group_size)
