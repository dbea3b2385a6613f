"""Packed codes to their levels on a CPU, four or eight at a time by table look-ups.

16 bits of packed codes are an index into a table of what they stand for: four int8 for 3 and 4
bits, eight for 2. Three words of 3-bit codes hold 24 codes in their nibbles and 8 in the spare
bits. Putting the latter back in their place would cost more than the look-up, so all codes of the
nibbles come first, then those of the spare bits; queries and outputs are put in that order instead.

Shape suffixes: H KV heads, M query rows, N tokens, D head width, E width as stored: D in whole
chunks of 32, in the order of a look-up; W words of a token, C chunks of a token, L levels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rotq_kernels.kv.format import TABLE_BITS, SideConstants
from rotq_kernels.layout import unpack_kv


class LevelReader:
    """What codes of a width and their levels stand for; see ``level_reader``.

    Args:
        levels: Of each head, or of all heads at once; none for more than TABLE_BITS bits.
        bits: 2 to 8.
        head_dim: D.
    """

    def __init__(self, levels: tuple[tuple[int, ...], ...], bits: int, head_dim: int) -> None:
        self.bits, self.head_dim = bits, head_dim
        self.width = -(-head_dim // 32) * 32
        self.order_E: Tensor | None = None
        if bits <= TABLE_BITS:
            self.same = len(levels) == 1
            self.table = _tables(torch.tensor(levels), bits)
            self.first_H11 = 65536 * torch.arange(len(levels), dtype=torch.int32)[:, None, None]
        if bits == 3:
            order_C32 = torch.arange(self.width).view(-1, 32)
            self.order_E = torch.cat((order_C32[:, :24].flatten(), order_C32[:, 24:].flatten()))

    def read(self, words_HNW: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels of ``dtype`` (H, N, E); padding has any level."""
        if self.bits == 8:
            return words_HNW.view(torch.uint8).to(dtype) - 127.5
        if self.bits > TABLE_BITS:
            codes_HNE = unpack_kv(words_HNW, self.bits, self.width)
            return codes_HNE.to(dtype) - (2**self.bits - 1) / 2
        if self.bits != 3:
            return self._look_up(words_HNW).to(dtype)
        level_HNE = torch.empty(*words_HNW.shape[:2], self.width, dtype=dtype)
        nibbles = self.width // 4 * 3
        # without spare bits only 32 KiB of the table are touched, which stay in the first cache
        level_HNE[..., :nibbles] = self._look_up(words_HNW & 0x77777777)
        level_HNE[..., nibbles:] = self._look_up(_spare_bits(words_HNW))
        return level_HNE

    def stored(self, x_HMD: Tensor) -> Tensor:
        """Rows that meet levels, in their order; zeros where there is padding."""
        if x_HMD.shape[-1] < self.width:
            x_HMD = torch.nn.functional.pad(x_HMD, (0, self.width - x_HMD.shape[-1]))
        return x_HMD if self.order_E is None else x_HMD[..., self.order_E]

    def natural(self, sums_HME: Tensor) -> Tensor:
        """Sums over levels back in the order of the head: (H, M, D)."""
        if self.order_E is not None:
            sums_HME = torch.empty_like(sums_HME).index_copy_(-1, self.order_E, sums_HME)
        return sums_HME[..., : self.head_dim]

    def _look_up(self, words_HNW: Tensor) -> Tensor:
        """int8 levels of the codes in each 16 bits, in order."""
        index = words_HNW.view(torch.uint16).to(torch.int32)
        if not self.same:
            index += self.first_H11
        found = self.table.index_select(0, index.flatten())
        return found.view(torch.int8).view(*words_HNW.shape[:2], -1)


def level_reader(side: SideConstants, bits: int, head_dim: int) -> LevelReader:
    """Of one side of a layer. Layers with the same levels, as a rule all, share one."""
    levels = tuple(map(tuple, side.levels_HL.tolist()))
    return _reader(levels[:1] if len(set(levels)) == 1 else levels, bits, head_dim)


_reader = lru_cache(maxsize=8)(LevelReader)


def signs(words_HNC: Tensor, head_dim: int) -> Tensor:
    """int8 (H, N, D): +1 where the bit is 1, else -1."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    table = (2 * bits - 1).to(torch.int8).view(torch.int64).flatten()
    index = words_HNC.view(torch.uint8).to(torch.int32)
    found = table.index_select(0, index.flatten())
    return found.view(torch.int8).view(*words_HNC.shape[:2], -1)[..., :head_dim]


def _spare_bits(words_HNW: Tensor) -> Tensor:
    """Bits 3 of the nibbles of three words as the nibbles of one, eight codes: (H, N, C)."""
    words_3HNC = words_HNW.unflatten(-1, (-1, 3)).movedim(-1, 0)
    # contiguous() would leave the strides of a single word as they are, and they show in a view
    words_3HNC = words_3HNC.clone(memory_format=torch.contiguous_format)
    bits_3HNC = words_3HNC.bitwise_right_shift_(3).bitwise_and_(0x11111111)
    return bits_3HNC[0].add_(bits_3HNC[1], alpha=2).add_(bits_3HNC[2], alpha=4)


def _tables(levels_HL: Tensor, bits: int) -> Tensor:
    """What 16 bits of codes stand for, head after head: int32 of four int8, or int64 of eight.

    Args:
        levels_HL: int64, each in the range of int8.
        bits: 2 to 4.
    """
    byte_HL = levels_HL & 255
    if bits == 2:
        byte_HL = _pairs(byte_HL, 8)
    # nibbles: bit 3 of a 3-bit code's belongs to another code
    nibble_HL = byte_HL.repeat(1, 2) if bits == 3 else byte_HL
    half = _pairs(nibble_HL, 16 if bits == 2 else 8)
    if bits == 2:
        return _pairs(half, 32).flatten()
    return _pairs(half.to(torch.int32), 16).flatten()


def _pairs(entry_HL: Tensor, shift: int) -> Tensor:
    """Tables of twice as many code bits: the low half's entry, and above it the high half's."""
    return (entry_HL[:, None, :] | (entry_HL[:, :, None] << shift)).flatten(1)
