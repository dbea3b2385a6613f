"""EXL3's transforms in fp64 against matrices, and what a weight in tiles says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rotq.formats.exl3 import TiledWeight, TileGrid, in_blocks, padded, unturned
from rotq.ops import pack_tiles, tile_weight
from rotq.rotations.hadamard import hadamard


def blocks_of_hadamard(size: int) -> Tensor:
    """fp64 (size, size): H in its blocks, as a matrix."""
    return torch.block_diag(*[hadamard(128).double() / 128**0.5] * (size // 128))


def random_tiled(N: int, K: int, bits: int) -> TiledWeight:
    """All symbols possible, scales of both signs."""
    generator = torch.Generator().manual_seed(0)
    k, n = padded(K), padded(N)
    symbols = torch.randint(0, 2**bits, (k // 16, n // 16, 256), generator=generator)
    return TiledWeight(
        shape=(N, K),
        trellis_IJW=pack_tiles(symbols.to(torch.uint8), bits),
        suh_k=(torch.randn(k, generator=generator) * 0.05).half(),
        svh_n=torch.randn(n, generator=generator).half(),
    )


def test_transforms_are_the_matrices_of_the_definition() -> None:
    """y = ((x * suh) H Wq) H * svh, in fp64 to its last digits."""
    generator = torch.Generator().manual_seed(1)
    weight_kn, x_Mk, suh_k, svh_n = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((256, 384), (5, 256), (256,), (384,))
    )
    turned_Mn = (x_Mk * suh_k) @ blocks_of_hadamard(256) @ weight_kn
    expected_Mn = turned_Mn @ blocks_of_hadamard(384) * svh_n
    found_Mn = F.linear(x_Mk, unturned(weight_kn.T, suh_k, svh_n))
    torch.testing.assert_close(found_Mn, expected_Mn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_blocks(in_blocks(x_Mk)), x_Mk, rtol=1e-12, atol=1e-12)


def test_a_padded_weight_is_the_corner_of_a_whole_one() -> None:
    weight = random_tiled(100, 200, 2)
    wide = TiledWeight(
        shape=(128, 256),
        trellis_IJW=weight.trellis_IJW,
        suh_k=weight.suh_k,
        svh_n=weight.svh_n,
    )
    assert torch.equal(weight.dequantize(), wide.dequantize()[:100, :200])
    exact_kn = tile_weight(weight.trellis_IJW, 2).double()
    exact_kn = blocks_of_hadamard(256) @ exact_kn @ blocks_of_hadamard(128)
    exact_kn = exact_kn * weight.suh_k.double()[:, None] * weight.svh_n.double()
    torch.testing.assert_close(wide.dequantize().double(), exact_kn.T, rtol=1e-5, atol=1e-6)


def test_bits_count_padding_and_both_scales() -> None:
    weight = random_tiled(100, 200, 3)
    assert weight.grid == TileGrid(bits=3)
    assert weight.grid.bits_per_weight(200) == (3 * 256 + 16) / 200
    assert weight.bits_per_weight() == (3 * 128 * 256 + 16 * (128 + 256)) / (100 * 200)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        TileGrid(bits=9)
    with pytest.raises(ValueError, match="no groups of columns"):
        TileGrid(bits=3, group_size=128)
