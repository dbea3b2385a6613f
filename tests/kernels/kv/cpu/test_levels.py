"""Look-ups give the level of every code, at every place of a word."""

import pytest
import torch
from kv_cases import side_of

from rotq_kernels.kv.cpu.levels import level_reader, signs
from rotq_kernels.kv.encode.one_side import side_levels
from rotq_kernels.layout import pack_kv


@pytest.mark.parametrize("same", [True, False], ids=["same", "per head"])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_packed_codes(bits: int, head_dim: int, same: bool) -> None:
    side = side_of(3, head_dim, bits, seed=0)
    side.levels_HL = side.levels_HL[:1].expand(3, -1)
    if not same and bits <= 4:
        side.levels_HL = side.levels_HL + torch.tensor([[0], [7], [-9]], dtype=torch.int8)
    generator = torch.Generator().manual_seed(1)
    codes_HND = torch.randint(2**bits, (3, 50, head_dim), generator=generator).to(torch.uint8)
    expected_HND = side_levels(codes_HND[None], side, bits)[0]
    reader = level_reader(side, bits, head_dim)
    level_HNE = reader.read(pack_kv(codes_HND, bits), torch.float32)
    assert level_HNE.shape == (3, 50, reader.width)
    assert torch.equal(reader.natural(level_HNE), expected_HND)
    # rows in stored order meet levels as rows in natural order would, whatever padding holds
    x_HMD = torch.randint(-9, 9, (3, 2, head_dim), generator=generator).float()
    assert torch.equal(reader.stored(x_HMD) @ level_HNE.mT, x_HMD @ expected_HND.mT)


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_token_of_one_narrow_head(bits: int) -> None:
    """A single chunk, whose strides need not be those of a contiguous tensor to count as one."""
    side = side_of(1, 16, bits, seed=0)
    codes_HND = torch.arange(16).remainder(2**bits).to(torch.uint8).view(1, 1, 16)
    reader = level_reader(side, bits, 16)
    found_HND = reader.natural(reader.read(pack_kv(codes_HND, bits), torch.float32))
    assert torch.equal(found_HND, side_levels(codes_HND[None], side, bits)[0])


@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_signs_of_packed_bits(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    bits_HND = torch.randint(2, (2, 9, head_dim), generator=generator).to(torch.uint8)
    expected = 2 * bits_HND.to(torch.int8) - 1
    assert torch.equal(signs(pack_kv(bits_HND, 1), head_dim), expected)


def test_layers_share_tables() -> None:
    side, other = side_of(3, 64, 3, seed=0), side_of(3, 64, 3, seed=1)
    assert level_reader(side, 3, 64) is level_reader(other, 3, 64)
    assert level_reader(side, 3, 64) is not level_reader(other, 3, 80)
    other.levels_HL = other.levels_HL + 1
    assert level_reader(side, 3, 64) is not level_reader(other, 3, 64)
