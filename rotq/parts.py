"""Parts of a job on disk: a finished block written, and read back when the job is resumed."""

from __future__ import annotations

import copy
from dataclasses import asdict

from torch import Tensor, nn

from rotq.blocks import Outcome
from rotq.checkpoint.export import packed_tensors
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensor
from rotq.job import Job, block_part
from rotq.layers import QuantLinear
from rotq.models.skeleton import Skeleton
from rotq.plan import Plan
from rotq.report import peak_rss


def save_block(job: Job, skeleton: Skeleton, index: int, outcome: Outcome, seconds: float) -> None:
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
            "seconds": seconds,
            "peak_rss": peak_rss(),
        },
    )


def restored_block(
    job: Job, skeleton: Skeleton, index: int, block: nn.Module, plan: Plan
) -> nn.Module:
    """The finished block of an earlier run: its rounded weights in a copy of ``block``."""
    prefix = skeleton.block_name(index)
    entries = read_entries(job.part(block_part(index)))
    tensors = {entry.name: read_tensor(entry) for entry in entries}
    restored = copy.deepcopy(block)
    for path, module in restored.named_modules():
        full = f"{prefix}.{path}"
        if full in plan.grids:
            assert isinstance(module, nn.Linear), f"{full} is planned, so it is a linear layer"
            packed = _packed_layer(plan, full, tensors)
            module.weight.copy_(packed.dequantize(module.weight.dtype))
    return restored


def _packed_layer(plan: Plan, full: str, tensors: dict[str, Tensor]) -> QuantLinear:
    out_features, in_features = plan.shapes[full]
    layer = QuantLinear(
        in_features, out_features, plan.grids[full], scale_dtype=plan.scale_dtype, device="meta"
    )
    layer.load_state_dict(
        {name: tensors[f"{full}.{name}"] for name in layer.state_dict()}, assign=True
    )
    return layer
