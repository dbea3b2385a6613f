"""Activations rounded to small floats at run time, each group with a scale of its own.

    nvfp4   groups of 16, s = E4M3(global max|x| / 6) / global, global = 448 * 6 / the largest
            magnitude that calibration saw: one for each layer, stored
    mxfp4   groups of 32, s the power of two of ``power_of_two_scale``
    fp8     a whole token, s = max|x| / 448; in groups of 128 where weights are fp8_block

    y_k = level(x_k / s) s

These are compressed-tensors' dynamic ``tensor_group``, ``group`` and ``token`` strategies, computed
in fp32. A group of zeros stays one. The gradient takes the rounding for the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rotq.formats.activations import ActivationGrid
from rotq.formats.floats import LARGEST_E4M3, FloatGrid, float_grid

LEAST_LOCAL = 0.125
"""Local scale of a group that would have none."""


@dataclass(frozen=True, kw_only=True)
class FloatInputs(ActivationGrid):
    """The floats that activations are rounded to; see ``float_inputs``."""

    kind: str
    """nvfp4, mxfp4, fp8 or fp8_block."""

    @property
    def grid(self) -> FloatGrid:
        """The same of a weight."""
        return float_grid(self.kind)

    @property
    def has_global_scale(self) -> bool:
        return self.grid.has_global_scale


def float_inputs(kind: str) -> FloatInputs:
    """What the inputs of layers on ``float_grid(kind)`` are rounded to."""
    return FloatInputs(kind=kind, bits=float_grid(kind).bits, symmetric=True)


def round_floats(x: Tensor, inputs: FloatInputs, global_scale: Tensor | None = None) -> Tensor:
    """Round every group of every token and back; slopes pass unchanged.

    Args:
        x: (..., K), floating point; computed in fp32.
        inputs: What it is rounded to.
        global_scale: (1) fp32 of nvfp4.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: groups do not divide K, or a global scale is missing.
    """
    if inputs.has_global_scale and global_scale is None:
        raise ValueError(f"{inputs.kind} needs a global scale")
    return cast(Tensor, _Rounded.apply(x, inputs, global_scale))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: FloatInputs, global_scale: Tensor | None) -> Tensor:
        grid = inputs.grid
        groups = x.float().unflatten(-1, (-1, grid.columns_per_group(x.shape[-1])))
        scale = group_scales(groups.abs().amax(-1, keepdim=True), grid, global_scale)
        return grid.nearest_(groups / scale).mul_(scale).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0], None, None


def group_scales(top: Tensor, grid: FloatGrid, global_scale: Tensor | None) -> Tensor:
    """fp32 scales, found as at run time, from the largest magnitudes of groups."""
    scale = grid.scales(top)
    if global_scale is None:
        return torch.where(scale == 0, 1.0, scale)
    local = (scale * global_scale).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).float()
    return torch.where(local == 0, LEAST_LOCAL, local) / global_scale
