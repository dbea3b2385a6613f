"""What attention does to its heads at run time, behind RoPE.

    R3   q <- q H,  k <- k H       H orthonormal Hadamard of the head's width;
                                   scores stay as they are, (q H)(k H)^T = q k^T
    KV   k <- Q(k),  v <- Q(v)     rounded per head and token, with dynamic scales

Shape suffixes: B windows, T positions, H query heads, K KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.rotations.hadamard import fast_hadamard


@dataclass(frozen=True, kw_only=True)
class OnlineHeads:
    """The settings of one attention."""

    rotated: bool = False
    """R3 on queries and keys."""
    grid: ActivationGrid | None = None
    """Of keys and values; None leaves them as they are."""

    def apply(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the products of attention see them; dtypes as given."""
        if self.rotated:
            q_BHTD, k_BKTD = fast_hadamard(q_BHTD), fast_hadamard(k_BKTD)
        if self.grid is not None:
            k_BKTD, v_BKTD = fake_quantize(k_BKTD, self.grid), fake_quantize(v_BKTD, self.grid)
        return q_BHTD, k_BKTD, v_BKTD


UNTOUCHED = OnlineHeads()
"""Nothing is done."""
