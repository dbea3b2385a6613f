"""Weights as closed paths through a trellis: few bits, and the distortion of many levels.

    w_nk ~ level(state_nk) * s_ng,      g = k // group_size

Of each weight a symbol of ``bits`` bits is stored; its state overlaps those of the rows after it in
the column, so that a weight has one of 2^state_bits levels (``rotq_kernels.trellis.code``). Paths
are only as good as levels fit: weights that are near to normal, as rotations make them.

Shape suffixes: N out features, K in features, G groups of K.
"""

from dataclasses import dataclass

from torch import Tensor

from rotq.formats.integer import Grid
from rotq.ops import check_ring, path_levels, ring_rows


@dataclass(frozen=True, kw_only=True)
class Trellis(Grid):
    """The code of one linear layer's weight; codes of the grid are symbols, from -2^(bits-1)."""

    symmetric: bool = True
    state_bits: int
    """L: bits that say a weight's level."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if not 8 <= self.state_bits <= 16:
            raise ValueError(f"state_bits must be 8 to 16, got {self.state_bits}")
        if not self.symmetric:
            raise ValueError("a trellis has no zero points")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be -1 or positive, got {self.group_size}")

    def ring_rows(self, out_features: int) -> int:
        """Rows of each ring of a layer's columns.

        Raises:
            ValueError: the layer has too few rows for a ring.
        """
        rows = ring_rows(out_features)
        check_ring(rows, self.bits, self.state_bits)
        return rows

    def levels(self, q_NK: Tensor) -> Tensor:
        """fp32 (N, K): what the symbols of a whole layer stand for, before scales."""
        return path_levels(q_NK, self.bits, self.state_bits)
