"""Linear layers that change their input at run time, as their weight was changed.

    y = p(x) W^T + b,   p(x) = Q((x * signs) H)

H is an orthonormal Hadamard matrix, and left out without signs; Q rounds each token, and is left
out without a grid.

Shape suffixes: K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.rotations.hadamard import fast_hadamard


def rotate_input(x: Tensor, signs_K: Tensor) -> Tensor:
    """(x * signs) H over the last axis, in fp32 (fp64 for fp64 inputs), cast back to x's dtype."""
    return fast_hadamard(x, len(signs_K), signs_K)


def prepare_input(x: Tensor, signs_K: Tensor | None, grid: ActivationGrid | None) -> Tensor:
    """p(x) of the module; shape and dtype of ``x``."""
    if signs_K is not None:
        x = rotate_input(x, signs_K)
    return x if grid is None else fake_quantize(x, grid)


class OnlineLinear(nn.Linear):
    """A dense linear layer that rotates its input, as its weight was, or rounds it, or both."""

    input_signs: Tensor | None
    input_grid: ActivationGrid | None

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        *,
        signs_K: Tensor | None = None,
        input_grid: ActivationGrid | None = None,
    ) -> OnlineLinear:
        """Take over the weight and bias of ``linear``.

        Args:
            linear: Its parameters are shared, not copied. Of an OnlineLinear the rotation is kept.
            signs_K: +1 and -1, any dtype: the weight was rotated with them on its input side.
            input_grid: What inputs are rounded to.
        """
        online = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        online.weight, online.bias = linear.weight, linear.bias
        if isinstance(linear, OnlineLinear) and signs_K is None:
            signs_K = linear.input_signs
        if signs_K is not None:
            signs_K = signs_K.to(device=linear.weight.device, dtype=torch.int8)
        online.register_buffer("input_signs", signs_K)
        online.input_grid = input_grid
        return online.train(linear.training)

    def prepare_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with; in x's dtype."""
        return prepare_input(x, self.input_signs, self.input_grid)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.prepare_input(input), self.weight, self.bias)


def prepared_input(linear: nn.Module, x: Tensor) -> Tensor:
    """What the weight of a dense layer multiplies, given its input."""
    return linear.prepare_input(x) if isinstance(linear, OnlineLinear) else x
