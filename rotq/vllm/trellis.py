"""Linear layers on a trellis in vLLM: paths stay packed as the checkpoint has them.

A path goes down the rows of one layer of the checkpoint, so the parts of a layer that vLLM fuses
are multiplied one by one. On a CPU ``rotq_linear`` says when paths become numbers, as for integers;
in vLLM's processes there is no native code, so "once" is much faster.

Shape suffixes: N out features, K in features, G groups of K, W words of packed symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase

from rotq.errors import RotqError
from rotq.formats.trellis import Trellis
from rotq.ops import dequantize_paths, packed_words, trellis_linear
from rotq.vllm.settings import read_settings

SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}
"""Places of a fused layer's parts; those that vLLM counts are their own."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer of the checkpoint inside one of vLLM's."""

    grid: Trellis
    words: slice
    rows: slice


def make_parts(sizes: Sequence[int], grids: Sequence[Trellis]) -> list[Part]:
    """Where each part has its words and its rows.

    Args:
        sizes: Out features of each.
    """
    parts: list[Part] = []
    word = row = 0
    for size, grid in zip(sizes, grids, strict=True):
        words = packed_words(size, grid.bits)
        parts.append(Part(grid=grid, words=slice(word, word + words), rows=slice(row, row + size)))
        word, row = word + words, row + size
    return parts


class TrellisMethod(LinearMethodBase):
    """Multiplies with packed paths.

    Args:
        prefix: Of the layer, for errors.
        grids: Of its parts, in order.
    """

    def __init__(self, prefix: str, grids: Sequence[Trellis]) -> None:
        self.prefix, self.grids = prefix, grids
        self.parts: list[Part] = []
        self.unpacks_once = read_settings(get_current_vllm_config().additional_config).linear == (
            "once"
        )

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Allocate words (W, K) and scales (N, G) of all parts, one behind the other.

        Raises:
            RotqError: the layer is cut across ranks, or its parts have other groups.
        """
        if get_tensor_model_parallel_world_size() > 1:
            raise RotqError(
                f"{self.prefix}: paths through a trellis cannot be cut; run vLLM with "
                "--tensor-parallel-size 1"
            )
        whole = len(self.grids) == 1
        sizes = [sum(output_partition_sizes)] if whole else output_partition_sizes
        self.parts = make_parts(sizes, self.grids)
        groups = {input_size // grid.columns_per_group(input_size) for grid in self.grids}
        if len(groups) > 1:
            raise RotqError(f"{self.prefix}: its parts have groups of several sizes")
        last = self.parts[-1]
        words_WK = torch.zeros(last.words.stop, input_size, dtype=torch.int32)
        scale_NG = torch.zeros(last.rows.stop, groups.pop())
        self._register(layer, "weight_packed", words_WK, [part.words for part in self.parts])
        self._register(layer, "weight_scale", scale_NG, [part.rows for part in self.parts])
        self._register(
            layer,
            "weight_shape",
            torch.zeros(2 * len(sizes), dtype=torch.int64),
            [slice(2 * index, 2 * index + 2) for index in range(len(sizes))],
        )

    def _register(self, layer: nn.Module, name: str, data: Tensor, places: list[slice]) -> None:
        parameter = nn.Parameter(data, requires_grad=False)

        def load(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            place = places[shard if isinstance(shard, int) else SHARDS[shard]]
            parameter.data[place].copy_(loaded)

        parameter.weight_loader = load  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """On a CPU make the weight dense, if that was asked for."""
        if not self.unpacks_once or layer.weight_packed.is_cuda:
            return
        dense = [
            dequantize_paths(
                layer.weight_packed[part.words],
                layer.weight_scale[part.rows],
                part.grid.bits,
                part.grid.state_bits,
                layer.params_dtype,
            )
            for part in self.parts
        ]
        layer.rotq_dense = nn.Parameter(torch.cat(dense), requires_grad=False)
        layer.weight_packed = nn.Parameter(layer.weight_packed[:0], requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b over the last axis."""
        if self.unpacks_once and not x.is_cuda:
            return F.linear(x, layer.rotq_dense, bias)
        y = [
            trellis_linear(
                x,
                layer.weight_packed[part.words],
                layer.weight_scale[part.rows],
                None if bias is None else bias[part.rows],
                bits=part.grid.bits,
                state_bits=part.grid.state_bits,
            )
            for part in self.parts
        ]
        return y[0] if len(y) == 1 else torch.cat(y, dim=-1)
