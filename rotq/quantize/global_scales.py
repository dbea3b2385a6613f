"""Global scales of NVFP4: one for the weights that engines run as one, one for each layer's inputs.

weights   448 * 4 / max|w| over the layers of one site: a group's largest may then be at level
          4 as well as at 6
inputs    448 * 6 / max|x| over the calibration windows, of what the layer is given before it
          rounds it; beyond that inputs are clipped
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotq.calibration.streams import Streams
from rotq.formats.float_inputs import FloatInputs
from rotq.formats.floats import E2M1, LARGEST_E4M3, FloatGrid, global_scale
from rotq.job.context import Job
from rotq.job.mixed import together
from rotq.layers.online_linear import OnlineLinear
from rotq.quantize.block_runner import BlockRunner

ROOM = E2M1[-2] / E2M1[-1]
"""Share of E4M3's range that the closed form of local scales takes; the search may go beyond it."""


def weight_scales(job: Job, index: int, block: nn.Module) -> dict[str, Tensor]:
    """(1) fp32 by path inside the block, of planned layers whose grid has one.

    Layers that have it in common have the same tensor.

    Args:
        block: The original one, in the job's basis.
    """
    prefix, grids = job.skeleton.block_name(index), job.plan.grids
    sites = [
        [full for path in site.linears if (full := f"{prefix}.{path}") in grids]
        for site in job.skeleton.adapter.sites(block)
    ]
    scales: dict[str, Tensor] = {}
    for names in together(block, prefix, sites):
        paths = [name.removeprefix(f"{prefix}.") for name in names if _has_one(grids[name])]
        if paths:
            tops = [block.get_parameter(f"{path}.weight").abs().amax() for path in paths]
            shared = global_scale(torch.stack(tops).amax(), local=ROOM * LARGEST_E4M3)
            scales |= dict.fromkeys(paths, shared)
    return scales


def set_input_scales(
    runner: BlockRunner, index: int, block: nn.Module, streams: Streams | None
) -> None:
    """Give each layer of a working block that rounds its inputs so their global scale, in place.

    Args:
        block: Not rounded yet. Its layers round inputs as planned, but not in this.
    """
    inputs = runner.job.plan.inputs
    if not isinstance(inputs, FloatInputs) or not inputs.has_global_scale:
        return
    assert streams is not None, "a recipe that looks for the range of inputs needs data"
    layers = {
        path: layer
        for path, layer in block.named_modules()
        if isinstance(layer, OnlineLinear) and layer.input_grid == inputs
    }
    for layer in layers.values():
        layer.input_grid = None
    tops = runner.input_ranges(index, block, layers, streams.quantized)
    for path, layer in layers.items():
        layer.input_grid = inputs
        layer.input_global_scale = global_scale(tops[path])


def _has_one(grid: object) -> bool:
    return isinstance(grid, FloatGrid) and grid.has_global_scale
