"""Linear layers that run on packed weights.

    y = p(x) W^T + b,   W = (q - z) * s, from its codes at each call

p rotates and rounds the input as in ``online_linear``. Buffers have the names and dtypes they have
in the checkpoint.

Shape suffixes: N out features, K in features, G groups of K, R features rotated together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotq.autocast import lowered
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid, Quantized
from rotq.layers.online_linear import OnlineLinear, prepare_input
from rotq.ops import pack, packed_linear, packed_words, unpack


class QuantLinear(nn.Module):
    """A linear layer that keeps its weight packed.

    On a CUDA device a kernel multiplies with the codes and no dense weight is ever made. Elsewhere,
    and for fp64, which the kernel does not have, the weight is unpacked at each call. Gradients
    reach the input, through its rotation and rounding, and the bias; codes and scales have none.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    input_signs: Tensor | None
    bias: nn.Parameter | None

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
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.input_grid = input_grid
        self.dtype = dtype or torch.float32
        groups = in_features // grid.columns_per_group(in_features)
        self._allocate(
            "weight_packed", (out_features, packed_words(in_features, grid.bits)), device
        )
        scale_NG = torch.ones(out_features, groups, dtype=scale_dtype, device=device)
        self.register_buffer("weight_scale", scale_NG)
        shape = torch.tensor([out_features, in_features], dtype=torch.int64, device=device)
        self.register_buffer("weight_shape", shape)
        if grid.symmetric:
            self.register_buffer("weight_zero_point", None)
        else:
            zero_words = packed_words(out_features, grid.bits)
            self._allocate("weight_zero_point", (zero_words, groups), device)
        signs_R = None
        if rotation_size is not None:
            signs_R = torch.ones(rotation_size, dtype=torch.int8, device=device)
        self.register_buffer("input_signs", signs_R)
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
        bits, device = quantized.grid.bits, quantized.q_NK.device
        layer.weight_packed = pack(quantized.q_NK, bits)
        layer.weight_scale = quantized.scale_NG.contiguous()
        layer.weight_shape = torch.tensor([N, K], dtype=torch.int64, device=device)
        if quantized.zero_NG is not None:
            layer.weight_zero_point = pack(quantized.zero_NG, bits, dim=0)
        if signs_R is not None:
            layer.input_signs = signs_R.to(device=device, dtype=torch.int8)
        if bias_N is not None:
            layer.bias = nn.Parameter(bias_N, requires_grad=False)
        return layer

    def quantized(self) -> Quantized:
        """Codes, scales and zero points, unpacked."""
        zero_NG = None
        if self.weight_zero_point is not None:
            zero_NG = unpack(self.weight_zero_point, self.grid.bits, self.out_features, dim=0)
        q_NK = unpack(self.weight_packed, self.grid.bits, self.in_features)
        return Quantized(q_NK=q_NK, scale_NG=self.weight_scale, zero_NG=zero_NG, grid=self.grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) dense weight, computed in fp32, then cast to ``dtype``."""
        return self.quantized().dequantize(dtype)

    @property
    def weight(self) -> Tensor:
        """(N, K) dense, made at each access, for models that look at it; nothing is written back.

        It counts as loaded: transformers initializes what does not.
        """
        weight_NK = self.dequantize(self.dtype)
        weight_NK._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight_NK

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with a dense weight of ``dtype``."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        if self.input_signs is None and self.input_grid is None:
            return linear
        return OnlineLinear.wrap(linear, signs_R=self.input_signs, input_grid=self.input_grid)

    def prepare_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with; in x's dtype."""
        return prepare_input(x, self.input_signs, self.input_grid)

    def forward(self, input: Tensor) -> Tensor:
        x = self.prepare_input(input)
        # for the backward pass the operator keeps the codes, F.linear would keep the dense weight
        is_differentiated = x.requires_grad and torch.is_grad_enabled()
        if x.dtype == torch.float64 or not (x.is_cuda or is_differentiated):
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        return packed_linear(
            lowered(x),
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            bits=self.grid.bits,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Scales keep the dtype that they are stored in: another would be another weight."""
        scale_NG = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale_NG.dtype:
            self.weight_scale = scale_NG.to(self.weight_scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale_NG.device)).dtype
        return self

    def extra_repr(self) -> str:
        inputs = "" if self.input_grid is None else f", inputs {self.input_grid}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}{inputs}"
        )

    def _allocate(
        self, name: str, shape: tuple[int, int], device: torch.device | str | None
    ) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))
