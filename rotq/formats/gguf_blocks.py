"""Codes of a grid as blocks of 32 columns, in the types of GGUF that hold them.

    q4_0    d (q - 8)        d fp16, q 0 to 15
    q4_1    d q + m          d, m fp16, q 0 to 15
    q8_0    d q              d fp16, q -127 to 127
    mxfp4   level(q) 2^e     E2M1, e one byte
    bf16    the number

A group's scale is repeated for each of its blocks. With fp16 scales q4_0, q8_0 and mxfp4 hold what
the codes stand for exactly; of q4_1 the offset m = (q_min - z) s is rounded to fp16. Where a block
has 4-bit codes, byte i has element i in its low half and element i + 16 in its high one.

Shape suffixes: N out features, K in features, B blocks of 32 along K.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid, Quantized
from rotq.formats.trellis import Trellis

WIDTH = 32
TYPES = ("q4_0", "q4_1", "q8_0", "mxfp4", "bf16")
"""From the fewest bits to the most."""


def type_for(grid: Grid, columns: int) -> str:
    """The type with the fewest bits that holds what is on a grid; bf16 holds all, rounded."""
    return next(name for name in TYPES if obstacle(name, grid, columns) is None)


def obstacle(name: str, grid: Grid, columns: int) -> str | None:
    """Why a type does not hold what is on a grid; None where it does."""
    if name == "bf16":
        return None
    width = grid.columns_per_group(columns)
    if width % WIDTH:
        return f"it has blocks of {WIDTH} columns, of which groups of {width} are no multiple"
    if isinstance(grid, Trellis):
        return "it has no paths through a trellis"
    if isinstance(grid, FloatGrid):
        fits = name == grid.kind
        return None if fits else f"its levels are not those of {grid.kind}"
    if name == "mxfp4":
        return "its levels are not integers"
    if name == "q8_0":
        return None if grid.bits < 8 or grid.symmetric else "8 bits with zero points are too wide"
    if grid.bits > 4:
        return f"it has codes of 4 bits, of {grid.bits}"
    return "it has no zero points" if name == "q4_0" and not grid.symmetric else None


def blocks(quantized: Quantized, name: str) -> np.ndarray:
    """uint8 (N, bytes of a row), as the file has them.

    Args:
        name: A type without an obstacle, and not bf16.
    """
    grid, (N, K) = quantized.grid, quantized.q_NK.shape
    repeats = grid.columns_per_group(K) // WIDTH
    if isinstance(grid, FloatGrid):
        exponent_NB1 = _repeated(quantized.scale_NG.view(torch.uint8), repeats)
        return _joined(exponent_NB1, _halves(quantized.q_NK.view(torch.uint8)))
    scale_NB1 = _repeated(quantized.scale_NG.float(), repeats)
    if name == "q8_0":
        codes = quantized.levels().view(N, -1, WIDTH).to(torch.int8)
        return _joined(_half_bytes(scale_NB1), codes.view(torch.uint8))
    offset = 8 if name == "q4_0" else -grid.q_min
    nibbles = _halves((quantized.q_NK + offset).view(torch.uint8))
    if name == "q4_0":
        return _joined(_half_bytes(scale_NB1), nibbles)
    zero_NG = quantized.zero_NG
    zero_NB1 = _repeated(torch.zeros(N, 1) if zero_NG is None else zero_NG.float(), repeats)
    if zero_NG is None:
        zero_NB1 = torch.zeros_like(scale_NB1)
    least_NB1 = (grid.q_min - zero_NB1) * scale_NB1
    return _joined(_half_bytes(scale_NB1), _half_bytes(least_NB1), nibbles)


def _repeated(values_NG: Tensor, times: int) -> Tensor:
    """(N, B, 1)."""
    return values_NG.repeat_interleave(times, dim=1)[..., None]


def _half_bytes(values_NB1: Tensor) -> Tensor:
    """The two bytes of each value in fp16, (N, B, 2)."""
    return values_NB1.to(torch.float16).view(torch.uint8)


def _halves(code_NK: Tensor) -> Tensor:
    """Codes 0 to 15, uint8, as 16 bytes a block, (N, B, 16)."""
    first, second = code_NK.view(len(code_NK), -1, 2, WIDTH // 2).unbind(2)
    return first | (second << 4)


def _joined(*parts: Tensor) -> np.ndarray:
    joined: np.ndarray = torch.cat(parts, dim=-1).flatten(1).cpu().numpy()
    return joined
