"""A block once it is quantized, and the part of the job that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from rotq.checkpoint.shards import save_tensors
from rotq.devices import double
from rotq.evaluation.flatness import FlatnessChange
from rotq.formats.exl3 import TiledWeight
from rotq.job.context import Job
from rotq.job.part_names import block_part
from rotq.layers.quant_linear import QuantLinear
from rotq.layers.tiled_linear import TiledLinear
from rotq.phases import phase
from rotq.report import LayerResult, peak_rss
from rotq.solvers.solution import Solution


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """What became of one block."""

    block: nn.Module
    """Dense, with the rounded weights in the model's dtype; rounds at run time as planned."""
    packed: Mapping[str, QuantLinear | TiledLinear]
    """By path inside the block."""
    layers: tuple[LayerResult, ...]
    effective_share: float
    """Effective sample size over tokens; 1 without importance."""
    training: Mapping[str, float]
    """Loss of the training of codes; empty without."""
    routed: Mapping[str, list[int]]
    """Calibration tokens that were routed to each expert, by path of the mixture."""


def layer_result(job: Job, full: str, solution: Solution, seconds: float) -> LayerResult:
    """What became of one weight, by its full name."""
    grid, shape = job.plan.grid(full), job.plan.shapes[full]
    loss = double(solution.loss_N).sum().item()
    bits_per_weight = grid.bits_per_weight(shape[1], job.plan.scale_dtype.itemsize * 8)
    if isinstance(solution.quantized, TiledWeight):
        bits_per_weight = solution.quantized.bits_per_weight()
    return LayerResult(
        name=full,
        shape=shape,
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        loss=loss,
        relative_error=loss / max(double(solution.energy_N).sum().item(), 1e-30),
        damping=solution.damping,
        seconds=seconds,
        bits_per_weight=bits_per_weight,
    )


@phase("packing")
def save_block(
    job: Job,
    index: int,
    quantized: QuantizedBlock,
    flatness: Mapping[str, FlatnessChange],
    seconds: float,
) -> None:
    """Write the block's part: packed layers, and the rest as the plan stores it."""
    prefix = job.skeleton.block_name(index)
    tensors: dict[str, Tensor] = {}
    for name, tensor in quantized.block.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path not in quantized.packed or leaf != "weight":
            tensors[f"{prefix}.{name}"] = tensor
    tensors = job.as_stored(tensors)
    for path, layer in quantized.packed.items():
        state = layer.state_dict()
        tensors |= {f"{prefix}.{path}.{key}": tensor for key, tensor in state.items()}
        bias = f"{prefix}.{path}.bias"
        if isinstance(layer, TiledLinear) and bias in tensors:
            tensors[bias] = tensors[bias].half()
    save_tensors(job.folder.part(block_part(index)), tensors)
    job.folder.record(
        block_part(index),
        {
            "layers": [asdict(layer) for layer in quantized.layers],
            "effective_share": quantized.effective_share,
            "training": dict(quantized.training),
            "routed": dict(quantized.routed),
            "flatness": {site: asdict(change) for site, change in flatness.items()},
            "seconds": seconds,
            "peak_rss": peak_rss(),
        },
    )
