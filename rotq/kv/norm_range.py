"""How far stored norms reach, and constants whose reach holds the tokens that are to be coded.

A ``log8`` norm spans 16 octaves from 2^base on, an fp16 one those of fp16. Constants put typical
tokens near the middle, as a normal model or the calibration text has them; but a factor moved from
one weight to another (o_proj to v_proj, say) changes nothing about a model and everything about
its norms. So the first tokens that are coded decide, by head: where their largest norm lies too
near to an end, A is multiplied by a power of two and A^-1 divided by it. That moves the reach and
changes no bit of a result that was in reach before. What outgrows it later is refused.

Shape suffixes: B sequences, E columns to be coded, H KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotq.ops import KVConstants, SideConstants, key_mean

KEPT = {"log8": (5, 12), "float16": (-10, 8)}
"""Octaves, above 2^base or 1, in which the largest norm may lie without being moved."""

MIDDLE = {"log8": 8, "float16": 0}
"""Where it is moved to."""

_FURTHEST = 96
"""Octaves by which a head is moved at most, as A is fp32."""

_LEAST_SHARE = 2.0**-10
"""Of a token's own rms: a token that equals the removed mean but for roundings has no smaller
norm, as roundings say nothing about tokens to come."""


class NormReach:
    """A layer's constants, moved to where its tokens are.

    Args:
        given: Constants of the layer, which are not changed.
    """

    def __init__(self, given: KVConstants) -> None:
        self.given = self.constants = given
        """The same object while nothing has to move."""
        shape, device = (2, given.key.base_H.numel()), given.key.base_H.device
        self._octaves_2H = torch.zeros(shape, dtype=torch.int64, device=device)
        self._settled_2H = torch.zeros(shape, dtype=torch.bool, device=device)
        self.is_settled = given.format.norm == "none"
        """Whether all heads have seen tokens other than zeros, or nothing is stored."""

    def settle(
        self,
        k_BHED: Tensor,
        v_BHED: Tensor,
        position_BE: Tensor,
        there_BE: Tensor | None = None,
    ) -> None:
        """Move the reach of heads that are not settled to where these tokens are.

        Args:
            k_BHED: Keys after RoPE.
            v_BHED: Values.
            position_BE: RoPE positions.
            there_BE: bool, columns that count; None for all.
        """
        if self.is_settled or not k_BHED.shape[2]:
            return
        given, norm = self.given, self.given.format.norm
        k_mean = key_mean(given, position_BE, torch.float64)
        v_mean = given.value.mean_HD[:, None].double()
        sides, largest, moved = (given.key, given.value), [], []
        for side, x_BHED, mean in zip(sides, (k_BHED, v_BHED), (k_mean, v_mean), strict=True):
            largest.append(_largest_rms(x_BHED, mean, side, there_BE))
            moved.append(_octaves(largest[-1], side, norm))
        before_2H = self._settled_2H
        self._octaves_2H = self._octaves_2H.where(before_2H, torch.stack(moved))
        self._settled_2H = before_2H | (torch.stack(largest) > 0)
        self.is_settled = bool(self._settled_2H.all())
        if self.is_settled and not self._octaves_2H.any():
            self.constants = given
        elif not torch.equal(before_2H, self._settled_2H) or self.constants is given:
            factor_2H = self._octaves_2H.double().exp2()
            pairs = zip(sides, factor_2H, self._settled_2H, strict=True)
            key, value = (_moved(*pair) for pair in pairs)
            self.constants = replace(given, key=key, value=value)


def outgrown(norm_BHE: Tensor, there_BE: Tensor) -> Tensor:
    """bool (): whether the norm of a token is the largest that can be stored.

    Args:
        norm_BHE: As stored, uint8 or fp16.
        there_BE: bool, columns that count.
    """
    top = 255 if norm_BHE.dtype == torch.uint8 else torch.inf
    return (norm_BHE.where(there_BE[:, None], 0) == top).any()


def _largest_rms(
    x_BHED: Tensor, mean: Tensor, side: SideConstants, there_BE: Tensor | None
) -> Tensor:
    """fp64 (H,) of y over the tokens that count."""
    x_BHED, matrix_HDD = x_BHED.double(), side.matrix_HDD.double()
    own_BHE, centred_BHE = (
        (rows @ matrix_HDD.mT).square().mean(-1).sqrt() for rows in (x_BHED, x_BHED - mean)
    )
    rms_BHE = torch.maximum(centred_BHE, _LEAST_SHARE * own_BHE)
    if there_BE is not None:
        rms_BHE = rms_BHE.where(there_BE[:, None], 0)
    return rms_BHE.amax((0, 2))


def _octaves(largest_H: Tensor, side: SideConstants, norm: str) -> Tensor:
    """int64 (H,): powers of two that bring the largest norm to the middle; 0 where it can stay."""
    low, high = KEPT[norm]
    start_H = side.base_H.double() if norm == "log8" else 0
    at_H = (largest_H * side.unit_H).log2() - start_H
    octaves_H = (MIDDLE[norm] - at_H).round().where((at_H < low) | (at_H > high), 0)
    return octaves_H.where(largest_H > 0, 0).clamp(-_FURTHEST, _FURTHEST).long()


def _moved(side: SideConstants, factor_H: Tensor, settled_H: Tensor) -> SideConstants:
    """A times the factor; a head that has been zero so far is coded, and read, as zeros."""
    factor_H11, settled_H11 = factor_H[:, None, None], settled_H[:, None, None]
    return replace(
        side,
        matrix_HDD=(side.matrix_HDD * factor_H11).where(settled_H11, 0).float(),
        inverse_HDD=(side.inverse_HDD / factor_H11).where(settled_H11, 0).float(),
    )
