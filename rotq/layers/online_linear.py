"""Linear layers that change their input at run time, as their weight was changed.

    y = p(x) W^T + b,   p(x) = Q((x * signs) H)

H is an orthonormal Hadamard matrix, and left out without signs; it has their order, and works on
each run of so many features where there are more of them (a block-diagonal rotation). Q rounds each
token, and is left out without a grid.

Shape suffixes: R features that are rotated together, of which the in features are a multiple.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.formats.float_inputs import FloatInputs, round_floats
from rotq.rotations.hadamard import fast_hadamard


def rotate_input(x: Tensor, signs_R: Tensor) -> Tensor:
    """(x * signs) H over runs of R features, in fp32 (fp64 for fp64), cast back to x's dtype."""
    return fast_hadamard(x, len(signs_R), signs_R)


def prepare_input(
    x: Tensor,
    signs_R: Tensor | None,
    grid: ActivationGrid | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """p(x) of the module; shape and dtype of ``x``.

    Args:
        global_scale: (1) fp32, of a grid that has one.
    """
    if signs_R is not None:
        x = rotate_input(x, signs_R)
    if isinstance(grid, FloatInputs):
        return round_floats(x, grid, global_scale)
    return x if grid is None else fake_quantize(x, grid)


def unit_scale(grid: ActivationGrid | None, device: torch.device | str | None) -> Tensor | None:
    """Room for the global scale of inputs, (1) fp32; None where their grid has none."""
    has_one = isinstance(grid, FloatInputs) and grid.has_global_scale
    return torch.ones(1, device=device) if has_one else None


class OnlineLinear(nn.Linear):
    """A dense linear layer that rotates its input, as its weight was, or rounds it, or both."""

    input_signs: Tensor | None
    input_global_scale: Tensor | None
    input_grid: ActivationGrid | None

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        *,
        signs_R: Tensor | None = None,
        input_grid: ActivationGrid | None = None,
    ) -> OnlineLinear:
        """Take over the weight and bias of ``linear``.

        Args:
            linear: Its parameters are shared, not copied. Of an OnlineLinear the rotation is kept.
            signs_R: +1 and -1, any dtype: the weight was rotated with them on its input side.
            input_grid: What inputs are rounded to.
        """
        online = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        online.weight, online.bias = linear.weight, linear.bias
        if isinstance(linear, OnlineLinear) and signs_R is None:
            signs_R = linear.input_signs
        if signs_R is not None:
            signs_R = signs_R.to(device=linear.weight.device, dtype=torch.int8)
        online.register_buffer("input_signs", signs_R)
        global_scale = getattr(linear, "input_global_scale", None)
        if global_scale is None:
            global_scale = unit_scale(input_grid, linear.weight.device)
        online.register_buffer("input_global_scale", global_scale)
        online.input_grid = input_grid
        return online.train(linear.training)

    def prepare_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with; in x's dtype."""
        return prepare_input(x, self.input_signs, self.input_grid, self.input_global_scale)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.prepare_input(input), self.weight, self.bias)


def prepared_input(linear: nn.Module, x: Tensor) -> Tensor:
    """What the weight of a dense layer multiplies, given its input."""
    return linear.prepare_input(x) if isinstance(linear, OnlineLinear) else x
