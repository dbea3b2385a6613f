"""Linear layers that change their input at run time, as their weight was changed.

    y = p(x) W^T + b,   p(x) = Q((x * signs) H)

H is an orthonormal Hadamard matrix, or a butterfly where there are angles, and left out without
signs; Q rounds each token, and is left out without a grid.

Shape suffixes: K in features; A stages, M runs, Q pairs of a run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.rotations.butterfly import fast_butterfly
from rotq.rotations.hadamard import fast_hadamard

ROTATIONS = ("hadamard", "butterfly")
"""Kinds of online rotations of inputs."""


def rotate_input(x: Tensor, signs_K: Tensor, angles_AMQ: Tensor | None = None) -> Tensor:
    """(x * signs) H over the last axis, in fp32 (fp64 for fp64 inputs), cast back to x's dtype.

    Args:
        angles_AMQ: Of the butterfly that stands in for H, as stored or in radians.
    """
    if angles_AMQ is None:
        return fast_hadamard(x, len(signs_K), signs_K)
    return fast_butterfly(x, angles_AMQ, signs_K)


def prepare_input(
    x: Tensor,
    signs_K: Tensor | None,
    grid: ActivationGrid | None,
    angles_AMQ: Tensor | None = None,
) -> Tensor:
    """p(x) of the module; shape and dtype of ``x``."""
    if signs_K is not None:
        x = rotate_input(x, signs_K, angles_AMQ)
    return x if grid is None else fake_quantize(x, grid)


class OnlineLinear(nn.Linear):
    """A dense linear layer that rotates its input, as its weight was, or rounds it, or both."""

    input_signs: Tensor | None
    input_angles: Tensor | None
    input_grid: ActivationGrid | None

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        *,
        signs_K: Tensor | None = None,
        angles_AMQ: Tensor | None = None,
        input_grid: ActivationGrid | None = None,
    ) -> OnlineLinear:
        """Take over the weight and bias of ``linear``.

        Args:
            linear: Its parameters are shared, not copied. Of an OnlineLinear the rotation is kept.
            signs_K: +1 and -1, any dtype: the weight was rotated with them on its input side.
            angles_AMQ: int16; the weight was rotated by this butterfly behind the signs.
            input_grid: What inputs are rounded to.
        """
        online = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        online.weight, online.bias = linear.weight, linear.bias
        if isinstance(linear, OnlineLinear) and signs_K is None:
            signs_K, angles_AMQ = linear.input_signs, linear.input_angles
        if signs_K is not None:
            signs_K = signs_K.to(device=linear.weight.device, dtype=torch.int8)
        if angles_AMQ is not None:
            angles_AMQ = angles_AMQ.to(linear.weight.device)
        online.register_buffer("input_signs", signs_K)
        online.register_buffer("input_angles", angles_AMQ)
        online.input_grid = input_grid
        return online.train(linear.training)

    def prepare_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with; in x's dtype."""
        return prepare_input(x, self.input_signs, self.input_grid, self.input_angles)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.prepare_input(input), self.weight, self.bias)


def prepared_input(linear: nn.Module, x: Tensor) -> Tensor:
    """What the weight of a dense layer multiplies, given its input."""
    return linear.prepare_input(x) if isinstance(linear, OnlineLinear) else x
