"""Rounded weights of a block: made dense of their codes, and given up for a while.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from rotq.formats.exl3 import TiledWeight, TileGrid
from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid, Quantized
from rotq.formats.trellis import Trellis
from rotq.layers.quant_linear import QuantLinear
from rotq.layers.tiled_linear import TiledLinear

ROWS_AT_ONCE = 1024
"""Rows of a weight that are in fp32 at a time when it is made dense."""

LARGE_HESSIAN = 1 << 30
"""Bytes from which on a Hessian is made and solved without the block's other weights beside it."""


def is_large(features: int) -> bool:
    """Whether that holds for an fp32 Hessian of so many features."""
    return 4 * features**2 >= LARGE_HESSIAN


def linear_at(block: nn.Module, name: str) -> nn.Linear:
    """The planned layer of that path."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is planned, so it is a linear layer"
    return module


def is_whole(grid: Grid) -> bool:
    """Whether a layer's rows know of each other."""
    return isinstance(grid, Trellis | TileGrid) or (
        isinstance(grid, FloatGrid) and grid.block_rows > 1
    )


def put_rounded(
    block: nn.Module, name: str, quantized: Quantized | TiledWeight, device: torch.device
) -> None:
    """Give a layer its rounded weight, in the dtype that it has, some rows at a time.

    Beside a weight in tiles the bias is rounded to fp16, as EXL3's files have it.
    """
    linear = linear_at(block, name)
    weight_NK = torch.empty_like(linear.weight, device=device)
    if isinstance(quantized, TiledWeight) or is_whole(quantized.grid):
        weight_NK.copy_(quantized.dequantize(weight_NK.dtype))
    else:
        for start in range(0, len(weight_NK), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            weight_NK[rows] = quantized.some(rows).dequantize(weight_NK.dtype)
    linear.weight = nn.Parameter(weight_NK, requires_grad=False)
    if isinstance(quantized, TiledWeight) and linear.bias is not None:
        # a parameter of its own: the original block may share this one
        linear.bias = nn.Parameter(linear.bias.half().to(linear.bias), requires_grad=False)


@contextmanager
def given_up(
    block: nn.Module,
    packed: Mapping[str, QuantLinear | TiledLinear],
    features: int,
    device: torch.device,
) -> Iterator[None]:
    """Rounded weights are their codes alone inside, if a Hessian is large; the same ones after it.

    Args:
        block: Not run inside.
        packed: What is rounded so far, by path.
        features: K of the Hessian.
        device: Of the block.
    """
    parked = packed if is_large(features) else {}
    for name in parked:
        linear = linear_at(block, name)
        linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    yield
    for name, layer in parked.items():
        codes = layer.tiled() if isinstance(layer, TiledLinear) else layer.quantized()
        put_rounded(block, name, codes, device)
