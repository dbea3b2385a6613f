"""What paths stand for: the definition bit by bit, rings, and refusals."""

import pytest
import torch

from rotq_kernels.layout import pack
from rotq_kernels.trellis.code import check_ring, code_levels, path_levels, path_states, ring_rows


def symbols(N: int, K: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (N, K), generator=generator, dtype=torch.int8)


def test_levels_are_sums_of_bytes() -> None:
    level_P = code_levels(12)
    for state in (0, 1, 2, 77, 4095):
        y = (0x83DCD12D * state) % 2**32
        assert level_P[state] == (sum(y.to_bytes(4, "little")) - 510) / 128
    assert torch.equal(level_P.half().float(), level_P)
    assert abs(level_P.std() - 1.154) < 0.01


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_state_is_read_from_the_packed_ring(bits: int) -> None:
    """Each is the L bits of the ring's stream that begin with its symbol."""
    rows, state_bits = 64, 12
    symbol_NK = symbols(2 * rows, 3, bits)
    state_NK = path_states(symbol_NK, bits, state_bits, rows)
    word_WK = pack(symbol_NK, bits, dim=0).to(torch.int64) & 0xFFFFFFFF
    for k in range(3):
        for ring, words in enumerate(word_WK[:, k].view(2, -1)):
            stream = sum(int(word) << (32 * i) for i, word in enumerate(words))
            turned = stream | stream << (rows * bits)
            found = [(turned >> (row * bits)) % 2**state_bits for row in range(rows)]
            assert found == state_NK[ring * rows : (ring + 1) * rows, k].tolist()


@pytest.mark.parametrize(
    ("rows", "ring"), [(96, 96), (256, 256), (576, 288), (1536, 256), (577, 577), (11008, 256)]
)
def test_rings(rows: int, ring: int) -> None:
    assert ring_rows(rows) == ring


def test_levels_of_rings_do_not_depend_on_others() -> None:
    symbol_NK = symbols(512, 5, 3)
    level_NK = path_levels(symbol_NK, 3, 12)
    assert torch.equal(path_levels(symbol_NK[256:], 3, 12), level_NK[256:])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 6 rows"):
        check_ring(5, 2, 12)
    check_ring(6, 2, 12)
    with pytest.raises(ValueError, match="8 to 16 bits, got 17"):
        code_levels(17)
