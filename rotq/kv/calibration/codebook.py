"""Levels and thresholds of scalar codes: for the unit normal, or fitted to numbers.

    q = number of thresholds below y / rms(y),      y ~ s L[q]

Lloyd-Max: a level is the mean of what it codes, a threshold lies half-way between two levels
(S. Lloyd, Least squares quantization in PCM, 1982; J. Max, 1960). Levels are stored as int8, the
outermost at +-127; the unit gives them back their size. Above ``TABLE_BITS`` levels are uniform,
with the step that is best for the unit normal.

Shape suffixes: H KV heads, N numbers, L levels, E thresholds (L - 1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.ops import TABLE_BITS

_UNIFORM_STEP = {5: 0.18814, 6: 0.10406, 7: 0.05687, 8: 0.03076}
"""Best step of a uniform quantizer for N(0, 1), by bits (Max 1960, extended)."""

_MAX_LEVEL = 127
_SMALLEST = 1e-30
"""Below it, levels count as zero; so that the unit has a logarithm."""
_SWEEPS = 200


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """How the numbers of one head become codes."""

    levels_L: Tensor
    """int8, ascending (equal ones where a head was zero); empty above TABLE_BITS bits."""
    thresholds_E: Tensor
    """fp32, ascending, in the units of what is coded."""
    unit: float
    """What a level of 1 is worth in those units."""


def gaussian_codebook(bits: int) -> Codebook:
    """For numbers of unit variance that are nearly normal, 2 to 8 bits."""
    if bits > TABLE_BITS:
        return uniform_codebook(bits, _UNIFORM_STEP[bits])
    return integer_codebook(normal_centres(bits))


def uniform_codebook(bits: int, step: float) -> Codebook:
    """Half-integer levels times ``step``."""
    edges_E = torch.arange(1, 2**bits, dtype=torch.float32) - 2 ** (bits - 1)
    return Codebook(
        levels_L=torch.empty(0, dtype=torch.int8), thresholds_E=edges_E * step, unit=step
    )


def integer_codebook(centres_L: Tensor) -> Codebook:
    """Round real levels to int8, and put thresholds half-way between what they become.

    Levels of zeros are zeros, so that a head that is nothing comes back as nothing.
    """
    unit = max(float(centres_L.abs().max()), _SMALLEST) / _MAX_LEVEL
    levels_L = (centres_L / unit).round().clamp(-_MAX_LEVEL, _MAX_LEVEL)
    middle_E = (levels_L[1:] + levels_L[:-1]) / 2 * unit
    return Codebook(levels_L=levels_L.to(torch.int8), thresholds_E=middle_E.float(), unit=unit)


@functools.cache
def normal_centres(bits: int) -> Tensor:
    """fp64 Lloyd-Max levels of N(0, 1)."""
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    centres_L = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    infinity = torch.full((1,), torch.inf, dtype=torch.float64)
    for _ in range(20 * _SWEEPS):
        edges = torch.cat((-infinity, (centres_L[1:] + centres_L[:-1]) / 2, infinity))
        density, mass = normal.log_prob(edges).exp(), normal.cdf(edges)
        centres_L = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return centres_L


def fitted_centres(
    y_N: Tensor, bits: int, start_L: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """fp64 Lloyd-Max levels of the numbers themselves.

    Args:
        y_N: Any float dtype.
        bits: 1 to 4.
        start_L: Levels to start from, ascending.
        weight_N: What each number's squared error counts.

    Returns:
        2^bits levels, ascending; one that codes nothing stays where it started.
    """
    order_N = y_N.argsort()
    sorted_N = y_N[order_N].double()
    weight_N = torch.ones_like(sorted_N) if weight_N is None else weight_N[order_N].double()
    sums = _cumulative(sorted_N * weight_N)
    masses = _cumulative(weight_N)
    centres_L = start_L.double().clone()
    for _ in range(_SWEEPS):
        middle_E = (centres_L[1:] + centres_L[:-1]) / 2
        inner = torch.searchsorted(sorted_N, middle_E)
        edges = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), sorted_N.numel())))
        mass_L = masses[edges[1:]] - masses[edges[:-1]]
        mean_L = (sums[edges[1:]] - sums[edges[:-1]]) / mass_L
        moved_L = torch.where(mass_L > 0, mean_L, centres_L)
        if torch.equal(moved_L, centres_L):
            break
        centres_L = moved_L
    return centres_L


def _cumulative(values_N: Tensor) -> Tensor:
    return torch.cat((values_N.new_zeros(1), values_N.cumsum(0)))
