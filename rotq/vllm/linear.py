"""A mixed-precision linear kernel of vLLM that runs on packed weights of 2 to 8 bits.

vLLM holds them as a checkpoint does: words (N, W) packed along the columns, scales (N, G), zero
points (W', G) packed along the rows. That is what ``packed_linear`` takes.

Shape suffixes: N out features, K in features, G groups of K, W words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import (
    CPUWNA16LinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform

from rotq.ops import dequantize_weight, packed_linear
from rotq.vllm.settings import read_settings

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class RotqLinearKernel(MPLinearKernel):
    """Symmetric and asymmetric, by group and by channel, on a CPU, CUDA and ROCm."""

    def __init__(self, c: MPLinearLayerConfig, *names: str | None, **more: str | None) -> None:
        super().__init__(c, *names, **more)
        self.unpacks_once = read_settings(get_current_vllm_config().additional_config).linear == (
            "once"
        )
        self.bits = c.weight_type.size_bits

    @classmethod
    def get_min_capability(cls) -> int:
        """That of Triton's kernels."""
        return 75

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether it runs a layer, else why not."""
        kind = c.weight_type
        if not kind.is_integer() or kind.is_signed() or not 2 <= kind.size_bits <= 8:
            return False, f"rotq runs unsigned codes of 2 to 8 bits, not {kind}"
        if kind.bias != (0 if c.zero_points else 1 << (kind.size_bits - 1)):
            return False, f"rotq runs codes with bias 2^(bits-1) or with zero points, not {kind}"
        columns = c.partition_weight_shape[0]
        if c.group_size != -1 and columns % c.group_size:
            return False, f"groups of {c.group_size} do not divide {columns} columns"
        if c.act_type not in DTYPES:
            return False, f"rotq runs 16 and 32 bit floats, not {c.act_type}"
        if current_platform.is_cpu() and _runs_on_its_own(c):
            return False, "vLLM's own kernel does"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make what was loaded contiguous; on a CPU unpack it, if that was asked for."""
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            self._transform_param(layer, name, lambda parameter: parameter.data.contiguous())
        words_NW, scale_NG, zero_WG = self._get_weight_params(layer)
        if self.unpacks_once and words_NW.device.type == "cpu":
            columns, dtype = self.config.partition_weight_shape[0], self.config.act_type
            dense_NK = dequantize_weight(words_NW, scale_NG, zero_WG, columns, self.bits, dtype)
            layer.rotq_dense = nn.Parameter(dense_NK, requires_grad=False)
            self._transform_param(layer, self.w_q_name, lambda parameter: parameter.data[:0])

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b over the last axis."""
        if self.unpacks_once and not x.is_cuda:
            return F.linear(x, layer.rotq_dense, bias)
        words_NW, scale_NG, zero_WG = self._get_weight_params(layer)
        return packed_linear(x, words_NW, scale_NG, zero_WG, bias, bits=self.bits)


def _runs_on_its_own(c: MPLinearLayerConfig) -> bool:
    """Whether vLLM's kernel for CPUs runs a layer. It says so of all with 4 bits, and fails in the
    first pass where its product was not built (without AVX-512) or the input has 32 bits."""
    kernel = CPUWNA16LinearKernel
    if kernel.__name__ in envs.VLLM_DISABLED_KERNELS or c.act_type == torch.float32:
        return False
    return hasattr(torch.ops._C, "cpu_gemm_wna16") and kernel.can_implement(c)[0]
