"""Grids of small floats, and the scales that go with them.

    w_nk ~ level(q_nk) * s_ng,    g = k // group_size

    nvfp4      E2M1 in groups of 16, s = local / global: local E4M3, one global fp32 per weight,
               which layers that engines run as one have in common
    mxfp4      E2M1 in groups of 32, s a power of two (E8M0)
    fp8        E4M3, one s per row
    fp8_block  E4M3, one s for 128 rows and 128 columns; the last rows of a layer may be fewer

E2M1 has 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives; its code is the sign in bit 3 and the place
in this list below. Halves between neighbours go to the even place. The closed forms of s are those
of compressed-tensors: the largest magnitude of a group over the largest level; for a power of two
the magnitude's exponent, one more from 7/4 of it on, less 2 (OCP microscaling formats 1.0).

Shape suffixes: N out features, K in features, G groups of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.formats.integer import Grid, PlainGrid

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KINDS = {"nvfp4": (4, 16), "mxfp4": (4, 32), "fp8": (8, -1), "fp8_block": (8, 128)}
"""Bits and columns of a group of each format."""
BLOCK_ROWS = {"fp8_block": 128}
"""Rows that share a scale, of formats where they do."""
LARGEST_E4M3 = 448.0


@dataclass(frozen=True, kw_only=True)
class FloatGrid(Grid):
    """The floats of one linear layer's weight; see ``float_grid``."""

    kind: str
    """nvfp4, mxfp4, fp8 or fp8_block."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown format {self.kind!r}; known: {', '.join(KINDS)}")
        if (self.bits, self.group_size) != KINDS[self.kind] or not self.symmetric:
            bits, group_size = KINDS[self.kind]
            raise ValueError(
                f"{self.kind} is symmetric, of {bits} bits, with group size {group_size}"
            )

    @property
    def is_e4m3(self) -> bool:
        """Whether levels are those of E4M3, and codes a dtype of torch; otherwise E2M1."""
        return self.bits == 8

    @property
    def block_rows(self) -> int:
        """Rows that share a scale."""
        return BLOCK_ROWS.get(self.kind, 1)

    @property
    def largest(self) -> float:
        """Level of the largest magnitude."""
        return LARGEST_E4M3 if self.is_e4m3 else E2M1[-1]

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Of a stored scale, local where there is a global one; None leaves the choice."""
        dtypes = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.float8_e8m0fnu}
        return dtypes.get(self.kind)

    @property
    def has_global_scale(self) -> bool:
        return self.kind == "nvfp4"

    def nearest_(self, x: Tensor) -> Tensor:
        """Round fp32 to levels, in place."""
        if self.is_e4m3:
            x.clamp_(-LARGEST_E4M3, LARGEST_E4M3)
            return x.copy_(x.to(torch.float8_e4m3fn))
        return nearest_e2m1_(x)

    def codes(self, level: Tensor) -> Tensor:
        """int8 codes of levels."""
        if self.is_e4m3:
            return level.to(torch.float8_e4m3fn).view(torch.int8)
        place = torch.zeros(13, dtype=torch.int8, device=level.device)
        for index, value in enumerate(E2M1):
            place[int(2 * value)] = index
        magnitude = place.index_select(0, (2 * level).abs().int().flatten()).view_as(level)
        return magnitude + 8 * (level < 0).to(torch.int8)

    def levels(self, q_NK: Tensor) -> Tensor:
        """fp32 (N, K): what codes stand for, before scales."""
        if self.is_e4m3:
            return q_NK.view(torch.float8_e4m3fn).float()
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=q_NK.device)
        return values.index_select(0, q_NK.int().flatten()).view_as(q_NK)

    def packed_like(self, N: int, K: int) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype of codes as they are stored."""
        return ((N, K), torch.float8_e4m3fn) if self.is_e4m3 else ((N, K // 2), torch.uint8)

    def pack(self, q_NK: Tensor) -> Tensor:
        """int8 codes as they are stored: E4M3 itself, or two codes of 4 bits in a byte."""
        return q_NK.view(torch.float8_e4m3fn) if self.is_e4m3 else pack_nibbles(q_NK)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of ``pack``."""
        return packed.view(torch.int8) if self.is_e4m3 else unpack_nibbles(packed)

    def stored_scales(self, scale_NG: Tensor) -> Tensor:
        """Scales as files have them: one row for all rows of a block."""
        return scale_NG[:: self.block_rows].contiguous()

    def row_scales(self, stored: Tensor, N: int) -> Tensor:
        """(N, G) from stored scales; the inverse of ``stored_scales``."""
        rows = self.block_rows
        return stored if rows == 1 else stored.repeat_interleave(rows, 0)[:N]

    def shared(self, top_NG: Tensor) -> Tensor:
        """The largest magnitude of each row's groups, over the rows that share a scale."""
        if self.block_rows == 1:
            return top_NG
        blocks = [part.amax(0, keepdim=True) for part in top_NG.split(self.block_rows)]
        return self.row_scales(torch.cat(blocks), len(top_NG))

    def bits_per_weight(self, in_features: int, scale_bits: float = 16) -> float:
        """Stored bits per weight; of a scale that rows share each has its part."""
        return super().bits_per_weight(in_features, scale_bits / self.block_rows)

    def scales(self, top: Tensor) -> Tensor:
        """The closed form of s from the largest magnitudes of groups, fp32; not yet rounded."""
        return power_of_two_scale(top) if self.kind == "mxfp4" else top / self.largest


def float_grid(kind: str) -> FloatGrid:
    """The grid of a format by its name.

    Raises:
        ValueError: there is no such format.
    """
    bits, group_size = KINDS.get(kind, (4, 16))
    return FloatGrid(kind=kind, bits=bits, group_size=group_size, symmetric=True)


def is_plain(grid: Grid | None) -> bool:
    """Whether files call codes ``weight``: each has a number of its own, of a dtype of torch."""
    return isinstance(grid, PlainGrid) or (isinstance(grid, FloatGrid) and grid.is_e4m3)


def stored_as(grid: Grid) -> torch.dtype | None:
    """The dtype that a grid's format gives stored scales; None leaves the choice."""
    return grid.scale_dtype if isinstance(grid, FloatGrid) else None


def nearest_e2m1_(x: Tensor) -> Tensor:
    """Round to E2M1 in place; what is beyond the largest level goes to it."""
    magnitude = x.abs()
    # spacing of levels: 1/2 below 2, 1 below 4, 2 above
    spacing = (magnitude >= 2).to(x.dtype).add_(1).mul_(0.5)
    spacing.add_((magnitude >= 4).to(x.dtype))
    return x.div_(spacing).round_().mul_(spacing).clamp_(-E2M1[-1], E2M1[-1])


def power_of_two_scale(top: Tensor) -> Tensor:
    """The power of two that MXFP4 gives a group, from its largest magnitude; fp32."""
    mantissa, exponent = torch.frexp(top.float())  # mantissa in [1/2, 1)
    exponent = exponent - 3 + (mantissa >= 0.875).int()
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def global_scale(top: Tensor, *, local: float = LARGEST_E4M3) -> Tensor:
    """fp32 (1): the factor of local scales of NVFP4; a group of ``top`` at level 6 gets ``local``.

    Its value is one that bfloat16 has, to which transformers casts it in such a model.

    Args:
        top: Largest magnitude of all groups; 0 gives 1.
    """
    top = top.float().reshape(1)
    scale = torch.where(top > 0, local * E2M1[-1] / top.clamp(min=1e-30), 1.0)
    return scale.to(torch.bfloat16).float()


def pack_nibbles(code_NK: Tensor) -> Tensor:
    """uint8 (N, K / 2) of int8 codes 0 to 15, K even: element 2i in the low four bits."""
    code_NK = code_NK.view(torch.uint8)
    return code_NK[:, ::2] | (code_NK[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``, int8 (N, K)."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.flatten(1).view(torch.int8)
