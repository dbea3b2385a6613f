"""Levels of a weight large enough for native code, against those of plain PyTorch."""

import pytest
import torch

from rotq.formats.integer import Grid, Quantized
from rotq.layers import packed_weight
from rotq.layers.packed_weight import PackedWeight

pytest.importorskip("numba")

N, K = 300, 256


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_levels_are_codes_less_zero_points(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(bits=bits, group_size=32, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q_NK = torch.randint(low, high, (N, K), generator=generator).to(torch.int8)
    zero_NG = torch.randint(low, high, (N, K // 32), generator=generator).to(torch.int8)
    scale_NG = torch.ones(N, K // 32, dtype=torch.float16)
    quantized = Quantized(
        q_NK=q_NK, scale_NG=scale_NG, zero_NG=None if symmetric else zero_NG, grid=grid
    )
    weight = PackedWeight((N, K), grid).pack(quantized)
    asked: list[int] = []
    native = packed_weight.unpacked_levels
    monkeypatch.setattr(
        packed_weight, "unpacked_levels", lambda *given: asked.append(bits) or native(*given)
    )
    assert torch.equal(weight.levels(), quantized.levels())
    assert asked == [bits]
