"""Rounding with a gradient that knows the scale: y = s (rint(x / s + z) - z), s from x's range.

    dL/dx = dL/dy + (dL/ds) ds/dx,    dL/ds = sum_k dL/dy_k (y_k - x_k) / s

rint counts as the identity, the scale as a function of the token's largest and smallest feature.
Without the second term (the usual straight-through gradient) a rotation's gradient carries no
signal: the error of rounding is isotropic, so that turning it changes nothing in the mean, and
what a rotation can improve is the range alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rotq.formats.activations import ActivationGrid, fake_quantize


def round_through(x: Tensor, grid: ActivationGrid, *, group_size: int = -1) -> Tensor:
    """``fake_quantize``, differentiable in the values and in the range they span.

    Args:
        x: (..., K), floating point.
        grid: What it is rounded to.
        group_size: Features that share a scale; -1 for all K.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: ``group_size`` does not divide K.
    """
    if group_size == -1 or group_size == x.shape[-1]:
        return cast(Tensor, _RoundThrough.apply(x, grid))
    if x.shape[-1] % group_size:
        raise ValueError(f"group size {group_size} does not divide {x.shape[-1]} features")
    return cast(Tensor, _RoundThrough.apply(x.unflatten(-1, (-1, group_size)), grid)).flatten(-2)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ActivationGrid) -> Tensor:
        y = fake_quantize(x, grid)
        ctx.save_for_backward(x, y)
        ctx.symmetric = grid.symmetric
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        # dL/ds ds/d(hi - lo) = sum dL/dy (y - x) / (hi - lo): the number of levels cancels
        change = (slopes[0] * (y - x)).sum(-1, keepdim=True)
        slope = slopes[0].clone()
        if ctx.symmetric:
            high, at = x.abs().max(-1, keepdim=True)
            sign = x.gather(-1, at).sign()
            return slope.scatter_add_(-1, at, sign * change / _positive(high)), None
        (high, at_high), (low, at_low) = x.max(-1, keepdim=True), x.min(-1, keepdim=True)
        change = change / _positive(high.clamp(min=0) - low.clamp(max=0))
        slope.scatter_add_(-1, at_high, change * (high > 0))
        return slope.scatter_add_(-1, at_low, -change * (low < 0)), None


def _positive(reach: Tensor) -> Tensor:
    return torch.where(reach > 0, reach, torch.ones_like(reach))
