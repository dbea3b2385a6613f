"""Parts of a job read back from the disk: packed layers, and whole parts made dense."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor, read_tensors
from rotq.job.context import Job
from rotq.job.part_names import OUTER
from rotq.job.plan import Plan
from rotq.job.rest import rest_in
from rotq.layers.quant_linear import QuantLinear
from rotq.layers.tiled_linear import TiledLinear


def restored_block(job: Job, part: Path, index: int, block: nn.Module) -> nn.Module:
    """A finished block: the part's tensors, packed ones made dense, in a copy of ``block``.

    Args:
        part: As the quantizer has saved it, or what tuning made of it.
        index: Of the block in the model.
        block: Has the structure; its parameters may be on meta.
    """
    prefix = job.skeleton.block_name(index)
    restored = copy.deepcopy(block, _noted(block))
    job.plan.round_online(restored, prefix, job.skeleton.adapter)
    tensors = dense_tensors(job.plan, read_tensors(part), next(block.parameters()).dtype)
    state = {name: tensors[f"{prefix}.{name}"] for name in restored.state_dict()}
    restored.load_state_dict(state, assign=True)
    return restored.to(job.device).requires_grad_(False)


def _noted(block: nn.Module) -> dict[int, Any]:
    """What modules have noted down in a run with gradients, as a memo of copies without a graph.

    RecurrentGemma keeps its last states so.
    """
    values = (value for module in block.modules() for value in vars(module).values())
    tensors = (value for value in values if isinstance(value, Tensor) and not value.is_leaf)
    return {id(tensor): tensor.detach() for tensor in tensors}


def restored_outer(
    job: Job, part: Path | None = None, *, without: str = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors outside the blocks, packed ones made dense.

    Args:
        part: None: as they were before tuning.
        without: Name of a weight that is not read.
        dtype: None: the job's.
    """
    layer = without.removesuffix("weight")
    stored = {
        entry.name: read_tensor(entry)
        for entry in read_entries(part or job.folder.part(OUTER))
        if not without or not entry.name.startswith(f"{layer}weight")
    }
    return dense_tensors(job.plan, stored, dtype or job.dtype)


def dense_tensors(
    plan: Plan, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A part's tensors as a job computes with them: weights dense, matrices in ``dtype``."""
    layers: dict[str, QuantLinear | TiledLinear] = {**packed_layers(plan, tensors)}
    layers |= tiled_layers(plan, tensors)
    packed = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in packed}
    weights = {f"{name}.weight": layer.dequantize(dtype) for name, layer in layers.items()}
    return rest_in(rest, dtype, {plan.dtype: dtype}) | weights


def packed_layers(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, QuantLinear]:
    """The packed layers among a part's tensors, by full name."""
    suffix = ".weight_packed"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {name: _packed_layer(plan, name, tensors) for name in names}


def tiled_layers(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, TiledLinear]:
    """The layers in tiles among a part's tensors, by full name."""
    suffix = ".trellis"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {name: _tiled_layer(plan, name, tensors) for name in names}


def _tiled_layer(plan: Plan, full: str, tensors: Mapping[str, Tensor]) -> TiledLinear:
    out_features, in_features = plan.shapes[full]
    layer = TiledLinear(in_features, out_features, plan.grid(full).bits, device="meta")
    layer.load_state_dict(
        {name: tensors[f"{full}.{name}"] for name in layer.state_dict()}, assign=True
    )
    return layer


def _packed_layer(plan: Plan, full: str, tensors: Mapping[str, Tensor]) -> QuantLinear:
    out_features, in_features = plan.shapes[full]
    layer = QuantLinear(
        in_features, out_features, plan.grid(full), scale_dtype=plan.scale_dtype, device="meta"
    )
    layer.load_state_dict(
        {name: tensors[f"{full}.{name}"] for name in layer.state_dict()}, assign=True
    )
    return layer
