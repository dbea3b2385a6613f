"""Grids for activations: a scale, and for asymmetric grids a zero point, found anew per token.

    lo = min(0, min_k x_k),  hi = max(0, max_k x_k)         k over one token's features, or a group
    asymmetric   s = (hi - lo) / (2^bits - 1),        z = rint(q_min - lo / s)
    symmetric    s = 2 max(hi, -lo) / (2^bits - 1),   z = 0
    q_k = rint(clamp(x_k / s + z, q_min, q_max)),     y_k = (q_k - z) s
    q_min = -2^(bits-1),  q_max = 2^(bits-1) - 1

rint rounds halves to even. Zero is always on the grid, and a token of zeros stays one. This is what
compressed-tensors calls a dynamic ``token`` (or ``group``) strategy.

The gradient takes rint for the identity and the scale for what it is, a function of lo and hi:

    dL/dx = dL/dy + (dL/ds) ds/dx,    dL/ds = sum_k dL/dy_k (y_k - x_k) / s

Without the second term (the usual straight-through gradient) a rotation in front has no gradient at
all: a rounding error that is uniform in every feature is as large in any basis, and what a rotation
can improve is the range alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rotq.formats.integer import Codes


@dataclass(frozen=True, kw_only=True)
class ActivationGrid(Codes):
    """The kind of numbers activations are rounded to at run time."""


def fake_quantize(x: Tensor, grid: ActivationGrid, *, group_size: int = -1) -> Tensor:
    """Round every token to ``grid`` and back.

    Differentiable in the values and in the range they span.

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
        y = _round_trip(groups, grid).flatten(-2).to(x.dtype)
        ctx.save_for_backward(x, y)
        ctx.group_size, ctx.symmetric = group_size, grid.symmetric
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        groups = (tensor.unflatten(-1, (-1, ctx.group_size)) for tensor in ctx.saved_tensors)
        slope = slopes[0].unflatten(-1, (-1, ctx.group_size)).clone()
        return _add_range_slope(slope, *groups, symmetric=ctx.symmetric).flatten(-2), None, None


def _add_range_slope(slope: Tensor, x: Tensor, y: Tensor, *, symmetric: bool) -> Tensor:
    """Add (dL/ds) ds/dx to dL/dy over the last axis, in place."""
    # dL/ds ds/d(hi - lo) = sum dL/dy (y - x) / (hi - lo): the number of levels cancels
    change = (slope * (y - x)).sum(-1, keepdim=True)
    if symmetric:
        high, at = x.abs().max(-1, keepdim=True)
        return slope.scatter_add_(-1, at, x.gather(-1, at).sign() * change / _positive(high))
    (high, at_high), (low, at_low) = x.max(-1, keepdim=True), x.min(-1, keepdim=True)
    change = change / _positive(high.clamp(min=0) - low.clamp(max=0))
    slope.scatter_add_(-1, at_high, change * (high > 0))
    return slope.scatter_add_(-1, at_low, -change * (low < 0))


def _positive(reach: Tensor) -> Tensor:
    return torch.where(reach > 0, reach, torch.ones_like(reach))


def token_codes(x: Tensor, grid: ActivationGrid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of each token, int8, its scale and its zero point (..., 1), as in ``fake_quantize``.

    Args:
        x: (..., K), fp32.
    """
    q, scale, zero = _codes(x, grid)
    return q.to(torch.int8), scale, zero


def _round_trip(x: Tensor, grid: ActivationGrid) -> Tensor:
    """The definition above over the last axis."""
    q, scale, zero = _codes(x, grid)
    return q.mul_(scale) if zero is None else q.sub_(zero).mul_(scale)


def _codes(x: Tensor, grid: ActivationGrid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes in the dtype of ``x``, scales and zero points; the latter None on a symmetric grid."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    reach = 2 * torch.maximum(high, -low) if grid.symmetric else high - low
    scale = reach / (grid.q_max - grid.q_min)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if grid.symmetric:
        return (x / scale).clamp_(grid.q_min, grid.q_max).round_(), scale, None
    zero = (grid.q_min - low / scale).round()
    return (x / scale).add_(zero).clamp_(grid.q_min, grid.q_max).round_(), scale, zero
