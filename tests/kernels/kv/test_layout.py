"""The packed layout of keys and values: known words, every code everywhere, refusals."""

import pytest
import torch

from rotq.ops import pack_kv, unpack_kv

ALL_BITS = range(1, 9)


def at(positions: dict[int, int], length: int = 32) -> list[int]:
    """Codes that are zero but at the positions given."""
    return [positions.get(i, 0) for i in range(length)]


# written by hand from the table in the docstring of layout: (bits, codes, unsigned words)
TABLE = [
    (1, at({0: 1, 5: 1, 31: 1}), [0x80000021]),
    (2, at({0: 3, 1: 1, 15: 2, 16: 1, 31: 3}), [0x80000007, 0xC0000001]),
    # 3 bits: codes 0 and 7 are the outer nibbles of word 0, code 23 the last of word 2
    (3, at({0: 7, 7: 5, 23: 7}), [0x50000007, 0, 0x70000000]),
    # codes 8 and 9 are the first nibbles of word 1
    (3, at({8: 1, 9: 6}), [0, 0x61, 0]),
    # code 24 = 0b101: bit 3 of nibble 0 of words 0 and 2; code 31 = 0b010: bit 31 of word 1
    (3, at({24: 5, 31: 2}), [0x8, 0x80000000, 0x8]),
    # all together: code 25 = 0b110 sets bit 7 of words 1 and 2
    (3, at({0: 7, 1: 1, 8: 2, 16: 4, 25: 6}), [0x17, 0x82, 0x84]),
    (3, [7] * 32, [0xFFFFFFFF] * 3),
    # 0 to 7 four times: nibble j of word i is j, with bit i of j on top
    (3, list(range(8)) * 4, [0xF6D4B290, 0xFE54BA10, 0xFEDC3210]),
    (4, at({0: 15, 7: 8, 8: 1, 31: 12}), [0x8000000F, 0x1, 0, 0xC0000000]),
    (5, at({0: 31, 9: 16, 31: 17}), [0xF, 0, 0, 0x10000000, 0x80000201]),
    (6, at({1: 63, 31: 32}), [0xF0, 0, 0, 0, 0x2, 0x80000002]),
    (7, at({2: 127, 8: 64}), [0xF00, 0, 0, 0, 0x4, 0x4, 0x104]),
    (8, at({0: 255, 3: 128, 4: 1, 31: 254}), [0x800000FF, 0x1, 0, 0, 0, 0, 0, 0xFE000000]),
    # 40 codes: the second chunk is padded with zeros
    (3, at({32: 7, 39: 3}, 40), [0, 0, 0, 0x30000007, 0, 0]),
]


@pytest.mark.parametrize(("bits", "codes", "words"), TABLE, ids=lambda value: str(value)[:12])
def test_known_words(bits: int, codes: list[int], words: list[int]) -> None:
    packed = pack_kv(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in packed.tolist()] == words
    assert unpack_kv(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 80, 96, 128, 256])
def test_round_trip(bits: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    codes = torch.randint(2**bits, (3, 5, head_dim), generator=generator, dtype=torch.uint8)
    packed = pack_kv(codes, bits)
    assert packed.is_contiguous()
    assert packed.shape == (3, 5, -(-head_dim // 32) * bits)
    assert torch.equal(unpack_kv(packed, bits, head_dim), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_code_at_every_position(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(32)[: max(32, 2**bits)]
    codes = torch.stack([codes.roll(shift) for shift in range(32)])
    assert torch.equal(unpack_kv(pack_kv(codes, bits), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_code_touches_its_own_bits_only(bits: int) -> None:
    """The words of single codes are disjoint and fill the chunk."""
    single = torch.eye(32, dtype=torch.uint8) * (2**bits - 1)
    words = pack_kv(single, bits)
    ones = (words[..., None] >> torch.arange(32)) & 1
    assert ones.sum(0).eq(1).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_strided_inputs(bits: int) -> None:
    wide = torch.randint(2**bits, (6, 4, 80), dtype=torch.uint8)
    for codes in (wide.transpose(0, 1), wide[..., 3:67], wide[::2], wide.mT):
        packed = pack_kv(codes, bits)
        assert torch.equal(packed, pack_kv(codes.contiguous(), bits))
        buffer = torch.full((*packed.shape[:-1], packed.shape[-1] + 2), -1, dtype=torch.int32)
        buffer[..., 1:-1] = packed
        assert torch.equal(unpack_kv(buffer[..., 1:-1], bits, codes.shape[-1]), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(32, dtype=torch.int8), 3, "uint8"),
        (torch.zeros(32, dtype=torch.uint8), 0, "1 to 8"),
        (torch.zeros(32, dtype=torch.uint8), 9, "1 to 8"),
        (torch.full((32,), 8, dtype=torch.uint8), 3, "outside"),
    ],
)
def test_pack_refuses(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_kv(codes, bits)


@pytest.mark.parametrize(
    ("words", "bits", "message"),
    [
        (torch.zeros(6), 3, "int32"),
        (torch.zeros(6, dtype=torch.int32), 9, "1 to 8"),
        (torch.zeros(7, dtype=torch.int32), 3, "take 6 words"),
    ],
)
def test_unpack_refuses(words: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_kv(words, bits, 64)
