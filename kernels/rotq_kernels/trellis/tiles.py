"""Tiles of 16 x 16 weights as closed paths, as EXL3 stores them (exllamav3).

A weight (K in features, N out features) is cut into tiles, and the 256 weights of a tile are one
ring, in the order in which the lanes of a tensor core hold them: with lane t < 32, r = 2 (t mod 4)
and c = t div 4, elements 8t to 8t + 7 are those at

    rows  r, r + 1, r + 8, r + 9   of column c,   then the same of column c + 8

The trellis is that of ``code`` with states of 16 bits, walked the other way: state_t has the symbol
of element t in its lowest bits, and above it those of t - 1, t - 2, ... around the ring. A tile's
stream of 256 symbols has its first bit in the highest one of its first word; of each two words of
16 bits the second is stored first.

Levels are rounded to fp16 once, as exllamav3's kernels do with a fused multiply-add of halves:

    level = fp16(sum of four bytes + 1024) * 0x1EEE + 0xC931

where 0x1EEE is 1774 / 2^18, about 1 / 147.8, and 0xC931 is -10.3828125.

Shape suffixes: K in features, N out features, I and J tiles along them, T elements of a tile, B
bits, W words of 16 bits.
"""

import functools

import torch
from torch import Tensor

from rotq_kernels.trellis.code import MULTIPLIER
from rotq_kernels.trellis.search import find_states

SIDE = 16
RING = SIDE * SIDE
TILE_STATE_BITS = 16


@functools.cache
def tile_levels(code: str = "mul1") -> Tensor:
    """fp32 (65536): what each state stands for, a number of fp16.

    Args:
        code: "mul1"; or "mcg" or "3inst", which files hold that rotq did not write.

    Raises:
        ValueError: another.
    """
    if code not in ("mul1", "mcg", "3inst"):
        raise ValueError(f"codes of tiles are mul1, mcg and 3inst, got {code!r}")
    state_P = torch.arange(2**TILE_STATE_BITS)
    if code == "mcg":
        return _sum_of_halves((state_P * 0xCBAC1FED) & 0xFFFFFFFF)
    if code == "3inst":
        return _sum_of_halves((state_P * 89226354 + 64248484) & 0xFFFFFFFF)
    y = (state_P * MULTIPLIER) & 0xFFFFFFFF
    total_P = torch.stack([(y >> shift) & 255 for shift in (0, 8, 16, 24)]).sum(0)
    unit, centre = torch.tensor([0x1EEE, 0xC931 - 0x10000], dtype=torch.int16).view(torch.float16)
    # exact before it is rounded: 11 bits by 11 bits, on a grid of 2^-18 below 2^4
    return ((total_P + 1024).float() * unit.float() + centre.float()).half().float()


def _sum_of_halves(y_P: Tensor) -> Tensor:
    """Of 3INST (QTIP, arXiv 2406.11235, section 3.1.1): both halves of y with some bits set."""
    halves_P = (y_P & 0x8FFF8FFF) ^ 0x3B603B60
    low_P, high_P = halves_P & 0xFFFF, halves_P >> 16
    as_half = [
        torch.where(half_P < 2**15, half_P, half_P - 2**16).to(torch.int16).view(torch.float16)
        for half_P in (low_P, high_P)
    ]
    return (as_half[0].float() + as_half[1].float()).half().float()


@functools.cache
def lane_order() -> Tensor:
    """int64 (256): row * 16 + column of each element of a ring."""
    lane = torch.arange(32)[:, None]
    row, column = 2 * (lane % 4), lane // 4
    rows = row + torch.tensor([0, 1, 8, 9] * 2)
    columns = column + torch.tensor([0] * 4 + [8] * 4)
    return (rows * SIDE + columns).flatten()


def to_rings(weight_KN: Tensor) -> Tensor:
    """(I, J, T) in the order of rings, from a weight whose sides are multiples of 16."""
    tiles = weight_KN.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE)).transpose(1, 2)
    return tiles.flatten(2)[..., lane_order().to(weight_KN.device)]


def from_rings(ring_IJT: Tensor) -> Tensor:
    """(K, N), undoing ``to_rings``."""
    tiles = ring_IJT[..., lane_order().argsort().to(ring_IJT.device)]
    return tiles.unflatten(2, (SIDE, SIDE)).transpose(1, 2).flatten(2).flatten(0, 1)


def search_tiles(x_ST: Tensor, bits: int, *, reach: int | None = None) -> tuple[Tensor, Tensor]:
    """The best closed path of each ring, or close to it.

    Args:
        x_ST: fp32 (S, 256), finite, in units of the levels; not modified.
        bits: 1 to 8.
        reach: As for ``search_paths``.

    Returns:
        symbol_ST: uint8.
        level_ST: fp32, what the path stands for.
    """
    levels = tile_levels().to(x_ST.device)
    state_ST = find_states(x_ST.flip(1).contiguous(), levels, bits, reach=reach).flip(1)
    level_ST = levels.index_select(0, state_ST.flatten().long()).view(x_ST.shape)
    return (state_ST & (2**bits - 1)).to(torch.uint8), level_ST


def pack_tiles(symbol_IJT: Tensor, bits: int) -> Tensor:
    """int16 (I, J, 16 bits): the stream of each ring.

    Args:
        symbol_IJT: uint8, below 2^bits.
    """
    places_B = torch.arange(bits - 1, -1, -1, device=symbol_IJT.device)
    bit_IJn = ((symbol_IJT[..., None].to(torch.int32) >> places_B) & 1).flatten(2)
    places_16 = torch.arange(15, -1, -1, device=symbol_IJT.device)
    word_IJW = (bit_IJn.unflatten(2, (-1, 16)) << places_16).sum(-1)
    return _swapped(torch.where(word_IJW < 2**15, word_IJW, word_IJW - 2**16).to(torch.int16))


def tile_states(packed_IJW: Tensor, bits: int) -> Tensor:
    """int32 (I, J, T): the 16 bits of the stream that end with those of each element."""
    word_IJW = _swapped(packed_IJW).to(torch.int32) & 0xFFFF
    following_IJW = torch.cat([word_IJW, word_IJW[..., :1]], dim=-1)
    first_T = ((torch.arange(RING, device=packed_IJW.device) + 1) * bits - 16) % (RING * bits)
    word_T, offset_T = first_T // 16, first_T % 16
    high_IJT = following_IJW[..., word_T] << offset_T
    low_IJT = following_IJW[..., word_T + 1] >> (16 - offset_T)
    return (high_IJT | low_IJT) & 0xFFFF


def tile_weight(packed_IJW: Tensor, bits: int, code: str = "mul1") -> Tensor:
    """fp32 (K, N): the levels that the packed paths stand for."""
    levels = tile_levels(code).to(packed_IJW.device)
    state_IJT = tile_states(packed_IJW, bits)
    return from_rings(levels.index_select(0, state_IJT.flatten()).view(state_IJT.shape))


def _swapped(word_IJW: Tensor) -> Tensor:
    """Each two words of 16 bits the other way round."""
    return word_IJW.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
