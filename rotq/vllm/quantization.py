"""``quant_method: rotq`` in vLLM: compressed-tensors, and what happens to inputs at run time.

Weights are those of compressed-tensors, so vLLM's own class does fused layers, targets, ignore
lists and tensor parallelism; the rotation and rounding of inputs is added here, and weights on a
trellis, which compressed-tensors does not know (``trellis``). Both need the whole
row of an input, but for a rotation in blocks: a layer that has a rank's share of it gathers the
row, and gives the weight its share of the result; where the share is whole blocks, it rotates them.

Shape suffixes: R features that are rotated together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import BasevLLMParameter

from rotq.checkpoint.scheme import Scheme, read_scheme
from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.formats.floats import FloatGrid
from rotq.formats.trellis import Trellis
from rotq.layers.online_linear import prepare_input
from rotq.vllm.targets import in_vllm
from rotq.vllm.trellis import TrellisMethod


class RotqConfig(CompressedTensorsConfig):
    """The ``quantization_config`` of a checkpoint in the rotq format."""

    scheme: Scheme

    def get_name(self) -> str:
        """Its name in vLLM."""
        return "rotq"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RotqConfig:
        """Read what a checkpoint says.

        Raises:
            RotqError: it says something that is not run here.
        """
        scheme = read_scheme(config)
        if any(isinstance(group.grid, FloatGrid) for group in scheme.groups):
            raise RotqError(
                "floats of 4 bits in the rotq format are not run in vLLM; quantize with "
                "output.format=compressed-tensors, which vLLM runs itself"
            )
        if scheme.turns_residual:
            raise RotqError(
                "the checkpoint turns its residual stream at run time (rotation.residual_ends="
                "online), which is not run in vLLM; rotq serve-kv runs it"
            )
        # with input_activations vLLM would look for kernels of integer products; paths it knows not
        groups = {
            name: {**group, "input_activations": None}
            for (name, group), read in zip(
                config["config_groups"].items(), scheme.groups, strict=True
            )
            if not isinstance(read.grid, Trellis)
        }
        made = super().from_config({**config, "config_groups": groups})
        made.scheme = scheme
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Bring targets to vLLM's names."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)

        def mapped(targets: tuple[str, ...]) -> tuple[str, ...]:
            is_path = [("." in target and not target.startswith("re:")) for target in targets]
            names = [
                hf_to_vllm_mapper._map_name(target) if path else target
                for target, path in zip(targets, is_path, strict=True)
            ]
            substrings = hf_to_vllm_mapper.orig_to_new_substr
            patterns = [in_vllm(target, substrings) for target in targets]
            found = [name for name in (*names, *patterns) if name is not None]
            return tuple(dict.fromkeys(found))

        scheme = self.scheme
        groups = tuple(replace(group, targets=mapped(group.targets)) for group in scheme.groups)
        self.scheme = replace(
            scheme, groups=groups, ignore=mapped(scheme.ignore), rotated=mapped(scheme.rotated)
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM runs a layer.

        Raises:
            RotqError: the layer's parts treat their inputs differently, it holds experts that
                rotate or round them, or it is an embedding or a head that is packed.
        """
        if isinstance(layer, VocabParallelEmbedding) and self.scheme.names(prefix):
            raise RotqError(
                f"{prefix}: packed embeddings and heads are not run in vLLM; quantize with "
                "weights.embedding=16 and weights.head=16"
            )
        if isinstance(layer, RoutedExperts):
            self._check_experts(layer, prefix)
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        before, _, last = prefix.rpartition(".")
        parts = [f"{before}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        method = self._trellis_method(prefix, parts) or super().get_quant_method(layer, prefix)
        found = {
            (self.scheme.rotation_size(part, layer.input_size), self._input_grid(part))
            for part in parts
        }
        if len(found) > 1:
            raise RotqError(f"{prefix}: {', '.join(parts)} treat their input differently")
        ((rotation_size, grid),) = found
        if rotation_size is not None and len(parts) > 1:
            raise RotqError(f"{prefix}: a rotated input of fused layers is not run in vLLM")
        if rotation_size is None and grid is None:
            return method
        return OnlineMethod(method, rotation_size, grid)

    def _trellis_method(self, prefix: str, parts: list[str]) -> TrellisMethod | None:
        """How layers on a trellis are run; None for others.

        Raises:
            RotqError: of the layer's parts some are on a trellis, and some are not.
        """
        grids = [self.scheme.grid(part) for part in parts]
        on_trellis = [grid for grid in grids if isinstance(grid, Trellis)]
        if not on_trellis:
            return None
        if len(on_trellis) < len(grids):
            raise RotqError(f"{prefix}: some of {', '.join(parts)} are on a trellis, some are not")
        return TrellisMethod(prefix, on_trellis)

    def _check_experts(self, layer: Any, prefix: str) -> None:
        projections = (
            layer.ckpt_gate_proj_name,
            layer.ckpt_up_proj_name,
            layer.ckpt_down_proj_name,
        )
        names = [f"{prefix}.0.{name}" for name in projections if name is not None]
        if any(self.scheme.is_rotated(name) or self._input_grid(name) for name in names):
            raise RotqError(
                f"{prefix}: experts whose inputs are rotated or rounded are not run in vLLM"
            )
        if any(isinstance(self.scheme.grid(name), Trellis) for name in names):
            raise RotqError(f"{prefix}: experts on a trellis are not run in vLLM")

    def _input_grid(self, name: str) -> ActivationGrid | None:
        group = self.scheme.group(name)
        return None if group is None else group.input_grid


class OnlineMethod(LinearMethodBase):
    """Rotates and rounds inputs, then does what ``inner`` does.

    Args:
        rotation_size: R; None rotates nothing.
    """

    def __init__(
        self, inner: LinearMethodBase, rotation_size: int | None, grid: ActivationGrid | None
    ) -> None:
        self.inner, self.rotation_size, self.grid = inner, rotation_size, grid

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Allocate the weight's parameters, and the signs (R,), whole on each rank."""
        self.inner.create_weights(layer, *sizes, **more)
        signs = None
        if self.rotation_size is not None:
            signs_R = torch.ones(self.rotation_size, dtype=torch.int8)
            signs = BasevLLMParameter(data=signs_R, weight_loader=_load_whole)
        layer.register_parameter("input_signs", signs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As ``inner`` does."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output; ``x`` is a rank's share of each row where inputs are split."""
        is_gathered = isinstance(layer, RowParallelLinear) and self._needs_row(x.shape[-1], layer)
        if is_gathered:
            x = tensor_model_parallel_all_gather(x)
        x = prepare_input(x, layer.input_signs, self.grid)
        if is_gathered:
            shares = x.chunk(get_tensor_model_parallel_world_size(), dim=-1)
            x = shares[get_tensor_model_parallel_rank()].contiguous()
        return self.inner.apply(layer, x, bias)

    def _needs_row(self, share: int, layer: Any) -> bool:
        """Whether more features are wanted than the ``share`` that a rank has."""
        is_cut = self.rotation_size is not None and share % self.rotation_size != 0
        return share != layer.input_size and (self.grid is not None or is_cut)


def _load_whole(parameter: nn.Parameter, loaded: Tensor, *args: Any, **more: Any) -> None:
    parameter.data.copy_(loaded)
