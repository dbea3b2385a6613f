"""Integer grids with one scale, and for asymmetric grids one zero point, per group of columns.

    w_nk ~ (q_nk - z_ng) * s_ng,        g = k // group_size,   q_min <= q, z <= q_max
    q_min = -2^(bits-1),  q_max = 2^(bits-1) - 1

Codes are signed, as compressed-tensors defines them; the packed bitstream stores q - q_min.
A symmetric grid has z = 0 and uses all 2^bits levels.

Shape suffixes: N out features, K in features, G groups of K.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Signed integers of a few bits."""

    bits: int
    """Bits per code, 2 to 8."""
    symmetric: bool
    """Whether z = 0 for all groups, so that no zero point is stored."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")

    @property
    def q_min(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True, kw_only=True)
class Grid(Codes):
    """The kind of numbers one linear layer's weight is rounded to."""

    group_size: int
    """Columns that share a scale; -1 is one group per output channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be -1 or positive, got {self.group_size}")

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share a scale in a layer of ``in_features``.

        Raises:
            ValueError: the group size does not divide ``in_features``; names the legal sizes, or
                where there is none of the usual ones all that divide.
        """
        if self.group_size == -1:
            return in_features
        if in_features % self.group_size:
            usual = legal_group_sizes(in_features)
            sizes = usual or [size for size in range(2, in_features) if in_features % size == 0]
            legal = f"{', '.join(map(str, sizes))}, or -1" if sizes else "only -1,"
            raise ValueError(
                f"group size {self.group_size} does not divide {in_features} columns; "
                f"legal sizes: {legal} for one group per channel"
            )
        return self.group_size

    def nearest_(self, x: Tensor) -> Tensor:
        """Round fp32, in units of scales and with zero points added, to levels, in place."""
        return x.round_().clamp_(self.q_min, self.q_max)

    def codes(self, level: Tensor) -> Tensor:
        """int8 codes of levels as ``nearest_`` gives them."""
        return level.to(torch.int8)

    def levels(self, q_NK: Tensor) -> Tensor:
        """fp32 (N, K): what codes stand for, before zero points and scales."""
        return q_NK.to(torch.float32)

    def bits_per_weight(self, in_features: int, scale_bits: float = 16) -> float:
        """Stored bits per weight, codes, scales and zero points counted."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group / self.columns_per_group(in_features)


@dataclass(frozen=True, kw_only=True)
class PlainGrid(Grid):
    """Symmetric integers of 8 bits that files hold as int8, and not packed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 8 or not self.symmetric:
            raise ValueError("plain integers are symmetric, of 8 bits")


def legal_group_sizes(in_features: int) -> list[int]:
    """Divisors of ``in_features`` from 16 to 1024 that are multiples of 8, ascending."""
    return [size for size in range(16, min(in_features, 1024) + 1, 8) if in_features % size == 0]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Codes, scales and zero points of one weight."""

    q_NK: Tensor
    """int8 codes in [q_min, q_max]."""
    scale_NG: Tensor
    """Storage dtype (fp16, bf16 or fp32), positive, in units of the weight per code step."""
    zero_NG: Tensor | None
    """int8, in [q_min, q_max]; None on a symmetric grid."""
    grid: Grid
    global_scale: Tensor | None = None
    """(1) fp32, what stored scales are divided by; None on grids that have none."""

    def steps(self) -> Tensor:
        """fp32 (N, G): the scales, the global one counted."""
        return true_scales(self.scale_NG, self.global_scale)

    def levels(self) -> Tensor:
        """fp32 (N, G, columns of a group): the weight in units of its scales."""
        level_NGg = self.grid.levels(self.q_NK).unflatten(1, (self.scale_NG.shape[1], -1))
        if self.zero_NG is not None:
            level_NGg.sub_(self.zero_NG.to(torch.float32)[..., None])
        return level_NGg

    def some(self, rows: slice) -> "Quantized":
        """Some rows, where no row knows of another."""
        zero_NG = None if self.zero_NG is None else self.zero_NG[rows]
        return replace(self, q_NK=self.q_NK[rows], scale_NG=self.scale_NG[rows], zero_NG=zero_NG)

    def to(self, device: torch.device) -> "Quantized":
        """The same there."""
        tensors = (self.q_NK, self.scale_NG, self.zero_NG, self.global_scale)
        q_NK, scale_NG, zero_NG, top = (x if x is None else x.to(device) for x in tensors)
        assert q_NK is not None, "a weight has codes"
        assert scale_NG is not None, "and scales"
        return Quantized(
            q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG, grid=self.grid, global_scale=top
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) weight; computed in fp32, then cast to ``dtype``."""
        return self.levels().mul_(self.steps()[..., None]).flatten(1).to(dtype)


def true_scales(scale_NG: Tensor, global_scale: Tensor | None) -> Tensor:
    """fp32 scales from stored ones, and the global one where there is one."""
    scale_NG = scale_NG.to(torch.float32)
    return scale_NG if global_scale is None else scale_NG / global_scale
