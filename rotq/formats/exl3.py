"""Weights of EXL3 (exllamav3): tiles on a trellis between two Hadamard transforms.

    y = ((x * suh) H Wq) H * svh,       H: orthonormal Hadamard matrices in blocks of 128

Wq, (K, N), has the levels of ``rotq_kernels.trellis.tiles``; suh and svh are scales with random
signs, of input and output features. Both sides of Wq are padded to multiples of 128: inputs with
zeros, and what is behind the last output is left away.

Shape suffixes: N out features, K in features, I and J tiles along K and N, W words of a tile; on
padded sides k and n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.formats.integer import Grid
from rotq.ops import hadamard, hadamard_reference, tile_weight

BLOCK = 128
"""Features that are transformed together; sides are multiples of it."""

MARKS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED}
"""Codes that a tensor of this name marks, and what it holds; without one the code is 3inst."""


@dataclass(frozen=True, kw_only=True)
class TileGrid(Grid):
    """The code of one linear layer's weight: bits of a path through 2^16 states."""

    symmetric: bool = True
    group_size: int = -1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size != -1 or not self.symmetric:
            raise ValueError("tiles have no groups of columns and no zero points")

    def bits_per_weight(self, in_features: int, scale_bits: float = 16) -> float:
        """Stored bits per weight before the out features are known: padding along K is counted."""
        return (self.bits * padded(in_features) + scale_bits) / in_features


@dataclass(frozen=True, kw_only=True)
class TiledWeight:
    """One weight as EXL3 stores it."""

    shape: tuple[int, int]
    """(N, K), without padding."""
    trellis_IJW: Tensor
    """int16."""
    suh_k: Tensor
    """fp16."""
    svh_n: Tensor
    """fp16."""
    code: str = "mul1"
    """Of ``tile_levels``; rotq writes mul1."""

    @property
    def bits(self) -> int:
        """Of a symbol."""
        return self.trellis_IJW.shape[2] // 16

    @property
    def grid(self) -> TileGrid:
        """As planned."""
        return TileGrid(bits=self.bits)

    def bits_per_weight(self) -> float:
        """Stored bits per weight, padding and both scales counted."""
        tensors = (self.trellis_IJW, self.suh_k, self.svh_n)
        return 16 * sum(tensor.numel() for tensor in tensors) / (self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) weight; computed in fp32, then cast to ``dtype``."""
        N, K = self.shape
        weight_kn = tile_weight(self.trellis_IJW, self.bits, self.code)
        weight_nk = unturned(weight_kn.T, self.suh_k.float(), self.svh_n.float())
        return weight_nk[:N, :K].to(dtype).contiguous()


def padded(size: int) -> int:
    """The least multiple of ``BLOCK`` that holds so many features."""
    return -(-size // BLOCK) * BLOCK


def unturned(weight_nk: Tensor, suh_k: Tensor, svh_n: Tensor) -> Tensor:
    """What Wq^T between its transforms multiplies inputs with, transposed as of a linear layer."""
    return in_blocks(in_blocks(weight_nk).mul(suh_k).T).T * svh_n[:, None]


def in_blocks(x: Tensor) -> Tensor:
    """Multiply runs of 128 features, along the last axis, by H; in fp32, or fp64 as it comes."""
    core = torch.ones(1, 1, dtype=torch.int8, device=x.device)
    rows = x.reshape(-1, BLOCK)
    transform = hadamard_reference if x.dtype == torch.float64 else hadamard
    return transform(rows, core).reshape(x.shape)
