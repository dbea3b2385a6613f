"""Linear layers that run on packed weights.

    y = p(x) W^T + b,   W = (q - z) * s, from its codes at each call

p rotates and rounds the input as in ``online_linear``.

Shape suffixes: N out features, K in features, G groups of K, R features rotated together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid, Quantized
from rotq.layers.integer_product import (
    can_multiply_integers,
    integer_linear,
    is_in_bytes,
    multiplies_exactly,
)
from rotq.layers.online_linear import OnlineLinear, prepare_input, unit_scale
from rotq.layers.packed_weight import PackedWeight


class QuantLinear(PackedWeight):
    """A linear layer that keeps its weight packed.

    On a CUDA device a kernel multiplies with the codes and no dense weight is ever made. Elsewhere,
    and for fp64, which the kernel does not have, the weight is unpacked at each call, or codes are
    multiplied as integers where ``multiply_integers`` said so. Gradients
    reach the input, through its rotation and rounding, and the bias; codes and scales have none.
    """

    input_signs: Tensor | None
    input_global_scale: Tensor | None
    bias: nn.Parameter | None
    in_integers = False
    """Where possible, see ``integer_product``; results are not a dense layer's to the last bit."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        *,
        bias: bool = False,
        rotation_size: int | None = None,
        input_grid: ActivationGrid | None = None,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate buffers of the checkpoint's shapes; their values come from the checkpoint.

        Args:
            grid: Its group size must divide ``in_features``.
            rotation_size: R, rotate runs of so many input features online, by ``input_signs``;
                None does not.
            input_grid: What inputs are rounded to at run time; None leaves them.
            scale_dtype: As stored.
            dtype: Of the bias, and of ``weight``; None is fp32.

        Raises:
            ValueError: the group size does not divide ``in_features``.
        """
        super().__init__(
            (out_features, in_features), grid, scale_dtype=scale_dtype, dtype=dtype, device=device
        )
        self.in_features, self.out_features = in_features, out_features
        self.input_grid = input_grid
        signs_R = None
        if rotation_size is not None:
            signs_R = torch.ones(rotation_size, dtype=torch.int8, device=device)
        self.register_buffer("input_signs", signs_R)
        self.register_buffer("input_global_scale", unit_scale(input_grid, device))
        self.bias = None
        if bias:
            bias_N = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(bias_N, requires_grad=False)

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        bias_N: Tensor | None = None,
        signs_R: Tensor | None = None,
        input_grid: ActivationGrid | None = None,
    ) -> QuantLinear:
        """Pack ``quantized``; the bias is shared, not copied.

        Args:
            signs_R: +1 and -1 of the online rotation that the weight already carries.
            input_grid: What inputs are rounded to at run time; None leaves them.
        """
        N, K = quantized.q_NK.shape
        layer = cls(
            K,
            N,
            quantized.grid,
            bias=bias_N is not None,
            input_grid=input_grid,
            scale_dtype=quantized.scale_NG.dtype,
            dtype=None if bias_N is None else bias_N.dtype,
            device="meta",
        )
        layer.pack(quantized)
        if signs_R is not None:
            layer.input_signs = signs_R.to(device=quantized.q_NK.device, dtype=torch.int8)
        if bias_N is not None:
            layer.bias = nn.Parameter(bias_N, requires_grad=False)
        return layer

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with a dense weight of ``dtype``."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        if self.input_signs is None and self.input_grid is None:
            return linear
        online = OnlineLinear.wrap(linear, signs_R=self.input_signs, input_grid=self.input_grid)
        online.input_global_scale = self.input_global_scale
        return online

    def prepare_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with; in x's dtype."""
        return prepare_input(x, self.input_signs, self.input_grid, self.input_global_scale)

    def forward(self, input: Tensor) -> Tensor:
        fast = self.in_integers and can_multiply_integers(input, self.grid, self.input_grid)
        if fast and self.input_grid is not None:
            rotated = prepare_input(input, self.input_signs)
            return integer_linear(rotated, self.quantized(), self.bias, self.input_grid)
        return self.product(self.prepare_input(input), self.bias)

    def restore_dtypes(self) -> None:
        """Global scales as they are stored, fp32; transformers loads them in the model's dtype."""
        for name in ("weight_global_scale", "input_global_scale"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).float())

    def extra_repr(self) -> str:
        inputs = "" if self.input_grid is None else f", inputs {self.input_grid}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}{inputs}"
        )


def multiply_integers(model: nn.Module) -> bool:
    """Let a model's linear layers multiply codes as integers from now on, where they can.

    Returns:
        Whether one is on a CPU that has no products of 8-bit integers, and stays as it is.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.in_integers = True
    return (
        any(
            layer.weight_packed.device.type == "cpu" and is_in_bytes(layer.grid, layer.input_grid)
            for layer in layers
        )
        and not multiplies_exactly()
    )
