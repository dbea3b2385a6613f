"""Parts of a job on disk: a finished block written, and read back when the job is resumed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from rotq.checkpoint.export import packed_tensors
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensor
from rotq.evaluation.flatness import FlatnessChange
from rotq.job.folder import JobFolder, block_part
from rotq.job.plan import Plan
from rotq.layers.quant_linear import QuantLinear
from rotq.models.skeleton import Skeleton
from rotq.quantize.block_quantizer import Outcome
from rotq.report import peak_rss


def save_block(
    job: JobFolder,
    skeleton: Skeleton,
    index: int,
    outcome: Outcome,
    flatness: Mapping[str, FlatnessChange],
    seconds: float,
) -> None:
    """Write the block's part: packed layers, and the rest in the model's dtype."""
    prefix = skeleton.block_name(index)
    tensors: dict[str, Tensor] = {}
    for name, tensor in outcome.block.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path not in outcome.quantized or leaf != "weight":
            tensors[f"{prefix}.{name}"] = tensor
    for path, quantized in outcome.quantized.items():
        tensors |= packed_tensors(f"{prefix}.{path}", quantized)
    save_tensors(job.part(block_part(index)), tensors)
    job.record(
        block_part(index),
        {
            "layers": [asdict(layer) for layer in outcome.layers],
            "effective_share": outcome.effective_share,
            "flatness": {site: asdict(change) for site, change in flatness.items()},
            "seconds": seconds,
            "peak_rss": peak_rss(),
        },
    )


def restored_block(
    part: Path,
    skeleton: Skeleton,
    index: int,
    block: nn.Module,
    plan: Plan,
    device: torch.device,
) -> nn.Module:
    """A finished block: the part's tensors, packed ones made dense, in a copy of ``block``.

    Args:
        part: From ``save_block``, or what tuning made of it.
        block: Has the structure; its parameters may be on meta.
    """
    prefix = skeleton.block_name(index)
    tensors = {entry.name: read_tensor(entry) for entry in read_entries(part)}
    restored = copy.deepcopy(block)
    plan.round_online(restored, prefix, skeleton.adapter)
    dtype = next(block.parameters()).dtype
    state = {
        f"{name}.weight": layer.dequantize(dtype)
        for name, layer in packed_layers(plan, tensors).items()
    }
    state = {name: (tensors | state)[f"{prefix}.{name}"] for name in restored.state_dict()}
    restored.load_state_dict(state, assign=True)
    return restored.to(device).requires_grad_(False)


def packed_layers(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, QuantLinear]:
    """The packed layers among a part's tensors, by full name."""
    suffix = ".weight_packed"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {name: _packed_layer(plan, name, tensors) for name in names}


def _packed_layer(plan: Plan, full: str, tensors: Mapping[str, Tensor]) -> QuantLinear:
    out_features, in_features = plan.shapes[full]
    layer = QuantLinear(
        in_features, out_features, plan.grids[full], scale_dtype=plan.scale_dtype, device="meta"
    )
    layer.load_state_dict(
        {name: tensors[f"{full}.{name}"] for name in layer.state_dict()}, assign=True
    )
    return layer
