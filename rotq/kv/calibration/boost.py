"""How much larger decoded keys and values are to be: least squares makes them smaller.

What comes back of a token's x is near to a x + n with a < 1, n independent of x and of other
tokens. For one token that is best. Attention averages over many, and layer follows layer: n
averages out, a does not. So decoded rows are multiplied by a^-p, p = 1 without bias,

    a = mean x M x^ / mean x M x

over calibration tokens, M what an error costs; by head, side and bits. Of keys half of the bias is
taken out, of values half as much again as there is: that had the least KL on SmolLM2 (docs/log.md).

Shape suffixes: H KV heads, D head width, N sampled tokens, C bits that have a factor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotq.kv.calibration.layer_constants import (
    BOOSTED_BITS,
    boost_of,
    recoded_side,
    stored_inverse,
)
from rotq.ops import SideConstants, dequantize_side, quantize_side

KEY_POWER, VALUE_POWER = 0.5, 1.5
"""p."""
_SAMPLES = 512
"""Rows that a is measured on."""
LARGEST = 1.5


def boosted(
    side: SideConstants,
    x_HND: Tensor,
    metric_HDD: Tensor | None,
    *,
    bits: int,
    power: float,
    weight: float,
) -> SideConstants:
    """A side with the factors of its heads.

    Args:
        side: Without.
        x_HND: Sampled keys or values less their mean.
        metric_HDD: M; None counts all directions alike.
        bits: That ``side`` is for.
        power: p.
        weight: What the text says, see ``evidence``; the rest is a factor of 1.
    """
    if metric_HDD is None:
        metric_HDD = torch.eye(x_HND.shape[-1], dtype=torch.float64).expand(len(x_HND), -1, -1)
    x_HND = x_HND[:, :: -(-x_HND.shape[1] // _SAMPLES)]
    slopes = [
        _slope(recoded_side(side, bits, other), x_HND, metric_HDD, other) for other in BOOSTED_BITS
    ]
    factor_HC = torch.stack(slopes, dim=-1) ** -power
    boost_HC = 1 + weight * (factor_HC.clamp(1.0, LARGEST) - 1)
    return with_boost(side, boost_HC.float(), bits)


def with_boost(side: SideConstants, boost_HC: Tensor, bits: int) -> SideConstants:
    """A side without factors, with some."""
    inverse_HDD = stored_inverse(side.matrix_HDD) * boost_of(boost_HC, bits)[:, None, None]
    return replace(side, boost_HC=boost_HC, inverse_HDD=inverse_HDD.contiguous())


def _slope(side: SideConstants, x_HND: Tensor, metric_HDD: Tensor, bits: int) -> Tensor:
    """fp64 (H,) a of codes of so many bits; 1 where there is nothing."""
    codes, stored = quantize_side(x_HND[None], side, bits, "log8")
    back_HND = dequantize_side(codes, stored, side, bits)[0].double()
    weighed_HND = x_HND.double() @ metric_HDD
    own_H = (weighed_HND * x_HND.double()).sum((-1, -2))
    along_H = (weighed_HND * back_HND).sum((-1, -2))
    return torch.where((own_H > 0) & (along_H > 0), along_H / own_H, 1.0)
