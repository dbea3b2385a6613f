"""Linear layers as EXL3's files hold them.

Shape suffixes: N out features, K in features, n and k the same padded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotq.formats.exl3 import MARKS, TiledWeight, padded


class TiledLinear(nn.Module):
    """A place to load a layer's tensors into; ``dense`` is what computes.

    Buffers have the names and dtypes that they have in the checkpoint.
    """

    trellis: Tensor
    suh: Tensor
    svh: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        code: str = "mul1",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate buffers of the checkpoint's shapes; their values come from the checkpoint.

        Args:
            bits: Of a symbol, 1 to 8.
            code: A key of ``MARKS``.
            dtype: Of the bias; None is fp32.
        """
        super().__init__()
        self.in_features, self.out_features, self.code = in_features, out_features, code
        k, n = padded(in_features), padded(out_features)
        tiles = torch.empty(k // 16, n // 16, 16 * bits, dtype=torch.int16, device=device)
        self.register_buffer("trellis", tiles)
        self.register_buffer("suh", torch.empty(k, dtype=torch.float16, device=device))
        self.register_buffer("svh", torch.empty(n, dtype=torch.float16, device=device))
        if code in MARKS:
            self.register_buffer(code, torch.empty((), dtype=torch.int32, device=device))
        self.bias = None
        if bias:
            bias_N = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(bias_N, requires_grad=False)

    @classmethod
    def from_tiled(cls, weight: TiledWeight) -> TiledLinear:
        """The layer of a weight, without a bias."""
        N, K = weight.shape
        layer = cls(K, N, weight.bits, code=weight.code, device="meta")
        layer.trellis, layer.suh, layer.svh = weight.trellis_IJW, weight.suh_k, weight.svh_n
        if weight.code in MARKS:
            mark = torch.tensor(MARKS[weight.code] - 2**32, dtype=torch.int32)
            setattr(layer, weight.code, mark)
        return layer

    def tiled(self) -> TiledWeight:
        """The weight; its scales are fp16 as stored, whatever the model was loaded in."""
        return TiledWeight(
            shape=(self.out_features, self.in_features),
            trellis_IJW=self.trellis,
            suh_k=self.suh.half(),
            svh_n=self.svh.half(),
            code=self.code,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) dense weight, computed in fp32, then cast to ``dtype``."""
        return self.tiled().dequantize(dtype)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with a dense weight of ``dtype``."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear
