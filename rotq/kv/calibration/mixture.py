"""How much larger coded values are to be, because attention averages over them.

Least squares makes what comes back of a value c smaller: c^ = a c + n, a < 1, n of another token's
independent. For one token that is best. A mean with weights p takes from n and leaves a:

    E|sum p c - g sum p c^|^2 = (1 - g a)^2 S + g^2 N Q,    S = E|sum p c|^2,  Q = E sum p^2
    g = a S / (a^2 S + N Q)                                 N = E|n|^2

with sums over earlier tokens that are no sinks, c less its mean, and |.| of what the output
projection makes of it. g is 1.07 at 2 bits where attention is wide, 1 where it rests on one token.

Shape suffixes: B windows, H KV heads, G query heads per KV head, Q queries of a chunk, S keys,
D head width, N sampled tokens, C bits that have a factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotq.devices import double
from rotq.kv.calibration.layer_constants import (
    BOOSTED_BITS,
    boost_of,
    recoded_side,
    stored_inverse,
)
from rotq.ops import SideConstants, dequantize_side, quantize_side

_SAMPLES = 1024
"""Rows that the distortion of codes is measured on."""
_LARGEST = 1.25


@dataclass(kw_only=True)
class Mixture:
    """Sums over queries of what attention makes of earlier tokens; fp64, on the CPU."""

    moment_HDD: Tensor
    """Of m = sum p v."""
    massed_HD: Tensor
    """Of m sum p."""
    mass_H: Tensor
    """Of (sum p)^2."""
    spread_H: Tensor
    """Of sum p^2."""

    @classmethod
    def empty(cls, heads: int, width: int) -> Mixture:
        """Of no queries."""
        sizes = {"moment_HDD": (width, width), "massed_HD": (width,), "mass_H": (), "spread_H": ()}
        held = {n: torch.zeros(heads, *rest, dtype=torch.float64) for n, rest in sizes.items()}
        return cls(**held)

    def add(self, p_BHGQS: Tensor, v_BHSD: Tensor, first: int, sinks: int) -> None:
        """Queries from ``first`` on, with all their probabilities."""
        p_BHGQS = p_BHGQS.tril(first - 1)[..., sinks:]
        m_HND = double((p_BHGQS @ v_BHSD[:, :, None, sinks:])[0].flatten(1, 2))
        mass_HN = double(p_BHGQS.sum(-1)[0].flatten(1))
        self.moment_HDD += (m_HND.mT @ m_HND).cpu()
        self.massed_HD += (m_HND * mass_HN[..., None]).sum(1).cpu()
        self.mass_H += mass_HN.square().sum(1).cpu()
        self.spread_H += double(p_BHGQS.square().sum((0, 2, 3, 4))).cpu()

    def width(self, mean_HD: Tensor, metric_HDD: Tensor) -> Tensor:
        """(H,) S / Q, by tr(M E[.]) of values less ``mean_HD``."""
        mean_HD = mean_HD.double()
        cross_HDD = self.massed_HD[..., None] * mean_HD[:, None]
        square_HDD = mean_HD[..., None] * mean_HD[:, None] * self.mass_H[:, None, None]
        centred_HDD = self.moment_HDD - cross_HDD - cross_HDD.mT + square_HDD
        size_H = (centred_HDD * metric_HDD).sum((-1, -2)).clamp(min=0)
        return size_H / self.spread_H.clamp(min=1e-300)


def boosted(
    side: SideConstants,
    x_HND: Tensor,
    mean_HD: Tensor,
    metric_HDD: Tensor | None,
    mixture: Mixture,
    bits: int,
    weight: float,
) -> SideConstants:
    """The value side with the factors of its heads.

    Args:
        side: Without.
        x_HND: Sampled values less their mean.
        mean_HD: That mean.
        metric_HDD: What the output projection makes of errors; None counts all alike.
        mixture: Of the same layer.
        bits: That ``side`` is for.
        weight: What the text says, see ``evidence``; the rest is a factor of 1.
    """
    if metric_HDD is None:
        metric_HDD = torch.eye(x_HND.shape[-1], dtype=torch.float64).expand(len(x_HND), -1, -1)
    width_H = mixture.width(mean_HD, metric_HDD)
    x_HND = x_HND[:, :_SAMPLES]
    factors = [
        _factor(recoded_side(side, bits, other), x_HND, metric_HDD, width_H, other)
        for other in BOOSTED_BITS
    ]
    boost_HC = (1 + weight * (torch.stack(factors, dim=-1) - 1)).float()
    return with_boost(side, boost_HC, bits)


def with_boost(side: SideConstants, boost_HC: Tensor, bits: int) -> SideConstants:
    """A side without factors, with some."""
    inverse_HDD = stored_inverse(side.matrix_HDD) * boost_of(boost_HC, bits)[:, None, None]
    return replace(side, boost_HC=boost_HC, inverse_HDD=inverse_HDD.contiguous())


def _factor(
    side: SideConstants, x_HND: Tensor, metric_HDD: Tensor, width_H: Tensor, bits: int
) -> Tensor:
    """fp64 (H,) g of codes of so many bits; 1 where values are zero."""
    codes, stored = quantize_side(x_HND[None], side, bits, "log8")
    back_HND = dequantize_side(codes, stored, side, bits)[0].double()
    x_HND = x_HND.double()
    own_H = ((x_HND @ metric_HDD) * x_HND).sum(-1).mean(-1)
    a_H = ((x_HND @ metric_HDD) * back_HND).sum(-1).mean(-1) / own_H.clamp(min=1e-300)
    back_H = ((back_HND @ metric_HDD) * back_HND).sum(-1).mean(-1)
    noise_H = (back_H - a_H.square() * own_H).clamp(min=0)
    least_H = a_H.square() * width_H + noise_H
    return torch.where(least_H > 0, a_H * width_H / least_H, 1.0).clamp(1.0, _LARGEST)
