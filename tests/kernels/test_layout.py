"""The packed layout: known words, bitwise equality with compressed-tensors, refusals."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from rotq.ops import pack, packed_words, unpack

ALL_BITS = range(1, 9)


def random_codes(N: int, K: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (N, K), generator=generator, dtype=torch.int8)


# written by hand: (bits, codes of one row, unsigned words)
TABLE = [
    (2, [-2, -1, 0, 1], [0b11_10_01_00]),
    (4, [-8, 7, 0, -1, -7], [0x178F0]),
    (8, [-128, 127, 0, -1, 5], [0x7F80FF00, 0x85]),
    # 3 bits: code 10 has two bits in word 0 (30, 31) and one in word 1
    (3, [-4] * 10 + [3], [0xC0000000, 0x1]),
    # 5 bits: stored 31, 0, 16 -> 31 + (16 << 10); code 6 straddles: bits 30..34
    (5, [15, -16, 0, -16, -16, -16, 15], [0xC000401F, 0x7]),
    # 6 bits: stored 1 at bit 30 is bit 30 of word 0; stored 63 takes bits 30..35
    (6, [-32] * 5 + [31], [0xC0000000, 0xF]),
    # 7 bits: code 4 takes bits 28..34; stored 127
    (7, [-64] * 4 + [63], [0xF0000000, 0x7]),
]


@pytest.mark.parametrize(("bits", "codes", "words"), TABLE, ids=lambda value: str(value)[:12])
def test_known_words(bits: int, codes: list[int], words: list[int]) -> None:
    packed = pack(torch.tensor([codes], dtype=torch.int8), bits)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == words
    assert unpack(packed, bits, len(codes))[0].tolist() == codes


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_code_at_every_position(bits: int) -> None:
    """Rolling all codes past all 32 positions of the pattern."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    q = torch.stack([codes.roll(shift) for shift in range(32)])
    assert torch.equal(unpack(pack(q, bits), bits, q.shape[1]), q)


@given(
    bits=st.integers(2, 8),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_equals_compressed_tensors(bits: int, N: int, K: int, dim: int, seed: int) -> None:
    q = random_codes(N, K, bits, seed)
    packed = pack(q, bits, dim=dim)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(q, bits, packed_dim=dim))
    size = q.shape[dim]
    assert packed.shape[dim] == packed_words(size, bits)
    unpacked = unpack(packed, bits, size, dim=dim)
    assert torch.equal(unpacked, q)
    assert torch.equal(unpacked, unpack_from_int32(packed, bits, q.shape, packed_dim=dim))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("layout", ["transposed", "rows of a wider buffer", "every second"])
def test_strided_inputs(bits: int, layout: str) -> None:
    wide = random_codes(24, 48, bits)
    q = {"transposed": wide.T, "rows of a wider buffer": wide[:, 3:30], "every second": wide[::2]}
    packed = pack(q[layout], bits)
    assert torch.equal(packed, pack(q[layout].contiguous(), bits))
    K = q[layout].shape[1]
    buffer = torch.full((packed.shape[0], packed.shape[1] + 2), -1, dtype=torch.int32)
    buffer[:, 1:-1] = packed
    assert torch.equal(unpack(buffer[:, 1:-1], bits, K), q[layout])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_size_of_a_real_layer(bits: int) -> None:
    q = random_codes(64, 1536, bits)
    assert pack(q, bits).shape == (64, 1536 * bits // 32)


@pytest.mark.parametrize(
    ("q", "bits", "dim", "message"),
    [
        (torch.zeros(4, dtype=torch.int8), 4, 1, "2-D"),
        (torch.zeros(4, 4, dtype=torch.int32), 4, 1, "int8"),
        (torch.zeros(4, 4, dtype=torch.int8), 0, 1, "1 to 8"),
        (torch.zeros(4, 4, dtype=torch.int8), 9, 1, "1 to 8"),
        (torch.zeros(4, 4, dtype=torch.int8), 4, 2, "dim"),
        (torch.full((4, 4), 8, dtype=torch.int8), 4, 1, "outside"),
        (torch.full((4, 4), -9, dtype=torch.int8), 4, 1, "outside"),
    ],
)
def test_pack_refuses(q: torch.Tensor, bits: int, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(q, bits, dim=dim)


@pytest.mark.parametrize("num_codes", [8, 25])
def test_unpack_refuses_a_wrong_count(num_codes: int) -> None:
    packed = pack(random_codes(2, 16, 4), 4)
    with pytest.raises(ValueError, match="words"):
        unpack(packed, 4, num_codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_one_word_of_codes_along_rows(bits: int) -> None:
    """As a file has the zero points of few rows: each column is one word, its stride anything."""
    q = random_codes(4, 6, bits)
    packed = pack(q, bits, dim=0)
    stored = torch.tensor(packed.tolist(), dtype=torch.int32)
    assert stored.shape == (1, 6)
    assert torch.equal(unpack(stored, bits, 4, dim=0), q)
