"""Experts of a mixture on packed weights of 2 to 8 bits.

vLLM holds all experts of a layer in one tensor each, as a checkpoint has them: words (E, N, W),
scales (E, N, G), zero points (E, W', G); gate and up are one after the other in N. Each expert that
a token was sent to is a product by ``packed_linear``, over the tokens that were sent to it.

On a CPU vLLM has kernels for some such layers, which round inputs to 8 bits. These are not asked.

Shape suffixes: E experts of a rank, T tokens, A experts of a token, R tokens of an expert, N out
features, K in features, G groups of K, W words, D model width, I features between up and down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)

from rotq.errors import RotqError
from rotq.ops import dequantize_weight, packed_linear
from rotq.vllm.settings import read_settings
from rotq.vllm.shards import check_shards

ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
    MoEActivation.SILU_NO_MUL: F.silu,
    MoEActivation.GELU_NO_MUL: F.gelu,
    MoEActivation.GELU_TANH_NO_MUL: partial(F.gelu, approximate="tanh"),
    MoEActivation.RELU2_NO_MUL: lambda x: F.relu(x).square(),
}
"""Those that are run, of the gate or of all that there is."""


class RotqExpertsMethod(wna16.CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """vLLM's layout of packed experts, without its choice among kernels."""

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any, *names: Any) -> None:
        CompressedTensorsMoEMethod.__init__(self, moe)
        self.input_quant = input_quant
        self.weight_quant = weight_quant
        self.symmetric, self.num_bits = weight_quant.symmetric, weight_quant.num_bits
        self.packed_factor = wna16.Fraction(32, self.num_bits)
        self.strategy = weight_quant.strategy
        self.group_size = weight_quant.group_size or -1
        self.is_transposed = False
        settings = read_settings(get_current_vllm_config().additional_config)
        self.unpacks_once = settings.linear == "once"

    def create_weights(self, layer: Any, **sizes: Any) -> None:
        """Allocate the parameters of all experts of the rank.

        Raises:
            RotqError: parts that cannot be placed, or something that is not run here.
        """
        self._check(layer, sizes["hidden_size"], sizes["intermediate_size_per_partition"])
        super().create_weights(layer, **sizes)

    def _check(self, layer: Any, width: int, between: int) -> None:
        gates = 2 if self.moe.is_act_and_mul else 1
        for name, rows, columns in (
            ("gate and up", [between] * gates, width),
            ("down", [width], between),
        ):
            check_shards(
                f"{layer.layer_name}, {name}",
                self.num_bits,
                rows=rows,
                columns=columns,
                all_columns=None,
                group_size=self.group_size,
                has_zeros=not self.symmetric,
            )
        if self.moe.is_lora_enabled:
            raise RotqError(f"{layer.layer_name}: packed experts take no LoRA adapters")
        limit = getattr(layer, "swiglu_limit", None)
        if layer.activation not in ACTIVATIONS or limit is not None:
            kind = layer.activation.value + (" with a limit" if limit is not None else "")
            raise RotqError(
                f"{layer.layer_name}: experts with {kind} are not run on packed weights"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """On a CPU unpack the experts, if that was asked for."""
        self.unpacks_once &= layer.w13_weight_packed.device.type == "cpu"
        if not self.unpacks_once:
            return
        for name in ("w13", "w2"):
            dense_ENK = torch.stack(
                [self._dense(layer, name, expert) for expert in range(layer.local_num_experts)]
            )
            setattr(layer, f"{name}_rotq_dense", nn.Parameter(dense_ENK, requires_grad=False))
            packed = getattr(layer, f"{name}_weight_packed")
            packed.data = packed.data[:0]

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: there is no kernel of vLLM's to configure."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum (T, D) of what the experts of the rank make of ``x``.

        Args:
            topk_weights, topk_ids: (T, A), of all ranks' experts.
            shared_experts, shared_experts_input: Run by vLLM.
        """
        ids_TA = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        out_TD = torch.zeros_like(x)
        for expert in ids_TA.unique().tolist():
            if expert < 0:  # of another rank
                continue
            token_R, choice_R = (ids_TA == expert).nonzero(as_tuple=True)
            share_R1 = topk_weights[token_R, choice_R, None].to(x.dtype)
            x_RD = x[token_R]
            if layer.apply_router_weight_on_input:
                y_RD = self._run(layer, expert, x_RD * share_R1)
            else:
                y_RD = self._run(layer, expert, x_RD) * share_R1
            out_TD.index_add_(0, token_R, y_RD)
        return out_TD

    def _run(self, layer: Any, expert: int, x_RD: Tensor) -> Tensor:
        hidden = self._linear(layer, "w13", expert, x_RD)
        activate = ACTIVATIONS[layer.activation]
        if self.moe.is_act_and_mul:
            gate_RI, up_RI = hidden.chunk(2, dim=-1)
            hidden = activate(gate_RI) * up_RI
        else:
            hidden = activate(hidden)
        return self._linear(layer, "w2", expert, hidden)

    def _linear(self, layer: Any, name: str, expert: int, x: Tensor) -> Tensor:
        bias_EN = getattr(layer, f"{name}_bias", None)
        # what down adds is summed over the ranks
        is_added = name == "w13" or get_tensor_model_parallel_rank() == 0
        bias_N = bias_EN[expert] if bias_EN is not None and is_added else None
        if self.unpacks_once:
            return F.linear(x, getattr(layer, f"{name}_rotq_dense")[expert], bias_N)
        words_NW, scale_NG, zero_WG = self._packed(layer, name, expert)
        return packed_linear(x, words_NW, scale_NG, zero_WG, bias_N, bits=self.num_bits)

    def _packed(self, layer: Any, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = [
            getattr(layer, f"{name}_weight_{part}", None)
            for part in ("packed", "scale", "zero_point")
        ]
        words_NW, scale_NG, zero_WG = (None if part is None else part[expert] for part in parts)
        assert words_NW is not None
        assert scale_NG is not None
        return words_NW, scale_NG, zero_WG

    def _dense(self, layer: Any, name: str, expert: int) -> Tensor:
        words_NW, scale_NG, zero_WG = self._packed(layer, name, expert)
        columns = words_NW.shape[1] * 32 // self.num_bits
        return dequantize_weight(
            words_NW, scale_NG, zero_WG, columns, self.num_bits, self.moe.in_dtype
        )
