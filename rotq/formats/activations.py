"""Grids for activations: a scale, and for asymmetric grids a zero point, found anew per token.

    lo = min(0, min_k x_k),  hi = max(0, max_k x_k)         k over one token's features, or a group
    asymmetric   s = (hi - lo) / (2^bits - 1),        z = rint(q_min - lo / s)
    symmetric    s = 2 max(hi, -lo) / (2^bits - 1),   z = 0
    q_k = rint(clamp(x_k / s + z, q_min, q_max)),     y_k = (q_k - z) s
    q_min = -2^(bits-1),  q_max = 2^(bits-1) - 1

rint rounds halves to even. Zero is always on the grid, and a token of zeros stays one. This is what
compressed-tensors calls a dynamic ``token`` (or ``group``) strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """The kind of numbers activations are rounded to at run time."""

    bits: int
    """Bits per code, 2 to 8."""
    symmetric: bool
    """No zero point."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")

    @property
    def q_min(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1


def fake_quantize(x: Tensor, grid: ActivationGrid, *, group_size: int = -1) -> Tensor:
    """Round every token to ``grid`` and back.

    The gradient passes as if nothing were rounded (straight-through): a scale that covers the
    token's range clips nothing.

    Args:
        x: (..., K), floating point; computed in fp32, fp64 in fp64.
        grid: What it is rounded to.
        group_size: Features that share a scale; -1 for all K of a token.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: ``group_size`` does not divide K.
    """
    K = x.shape[-1]
    if group_size != -1 and (group_size < 1 or K % group_size):
        raise ValueError(f"group size {group_size} does not divide {K} features")
    return cast(Tensor, _Rounded.apply(x, grid, K if group_size == -1 else group_size))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ActivationGrid, group_size: int) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        groups = wide.unflatten(-1, (-1, group_size))  # [..., G, K / G]
        return _round_trip(groups, grid).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _round_trip(x: Tensor, grid: ActivationGrid) -> Tensor:
    """The definition above over the last axis."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    reach = 2 * torch.maximum(high, -low) if grid.symmetric else high - low
    scale = reach / (grid.q_max - grid.q_min)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if grid.symmetric:
        return (x / scale).clamp_(grid.q_min, grid.q_max).round_().mul_(scale)
    zero = (grid.q_min - low / scale).round()
    q = (x / scale).add_(zero).clamp_(grid.q_min, grid.q_max).round_()
    return q.sub_(zero).mul_(scale)
