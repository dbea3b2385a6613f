"""What a solver found for one weight, or for several that are stacked along their rows.

Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotq.formats.exl3 import TiledWeight
from rotq.formats.integer import Quantized


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found for one weight."""

    quantized: Quantized | TiledWeight
    loss_N: Tensor
    """Per row (W^ - T) H (W^ - T)^T with undamped H: squared output error per token."""
    energy_N: Tensor
    """Per row T H T^T: squared output per token."""
    damping: float
    """Share of the mean diagonal that made H positive definite."""

    def to(self, device: torch.device) -> Solution:
        """The same there."""
        assert isinstance(self.quantized, Quantized), "tiles stay where they were found"
        return replace(
            self,
            quantized=self.quantized.to(device),
            loss_N=self.loss_N.to(device),
            energy_N=self.energy_N.to(device),
        )

    def divided(self, global_scale: Tensor) -> Solution:
        """The solution for the weight, from that for the weight times a global scale."""
        assert isinstance(self.quantized, Quantized), "tiles have none"
        return Solution(
            quantized=replace(self.quantized, global_scale=global_scale),
            loss_N=self.loss_N / global_scale.square(),
            energy_N=self.energy_N / global_scale.square(),
            damping=self.damping,
        )


def _joined(parts: list[Quantized]) -> Quantized:
    """Weights of one grid, stacked along N."""
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return Quantized(
        q_NK=torch.cat([part.q_NK for part in parts]),
        scale_NG=torch.cat([part.scale_NG for part in parts]),
        zero_NG=torch.cat(zeros) if zeros else None,
        grid=parts[0].grid,
        global_scale=parts[0].global_scale,
    )


def join_rows(solutions: list[Solution]) -> Solution:
    """Stack along N what was solved apart, on one grid; the damping is the largest."""
    if len(solutions) == 1:
        return solutions[0]
    parts = [each.quantized for each in solutions if isinstance(each.quantized, Quantized)]
    assert len(parts) == len(solutions), "a weight in tiles is solved whole"
    return Solution(
        quantized=_joined(parts),
        loss_N=torch.cat([solution.loss_N for solution in solutions]),
        energy_N=torch.cat([solution.energy_N for solution in solutions]),
        damping=max(solution.damping for solution in solutions),
    )


def split_rows(solution: Solution, sizes: list[int]) -> list[Solution]:
    """Undo stacking along N: one solution per entry of ``sizes``."""
    quantized = solution.quantized
    if isinstance(quantized, TiledWeight):
        assert len(sizes) == 1, "a weight in tiles is solved alone"
        return [solution]
    parts = zip(
        quantized.q_NK.split(sizes),
        quantized.scale_NG.split(sizes),
        [None] * len(sizes) if quantized.zero_NG is None else quantized.zero_NG.split(sizes),
        solution.loss_N.split(sizes),
        solution.energy_N.split(sizes),
        strict=True,
    )
    return [
        Solution(
            quantized=replace(quantized, q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG),
            loss_N=loss_N,
            energy_N=energy_N,
            damping=solution.damping,
        )
        for q_NK, scale_NG, zero_NG, loss_N, energy_N in parts
    ]
