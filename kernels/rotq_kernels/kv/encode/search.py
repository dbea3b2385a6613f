"""Codes that are better together than each rounded to its nearest level.

Rounding makes |e| small, e = s L[q] - y. What counts is e W e with W = A^-T M A^-1, M what an error
of x costs: for keys the second moment of the queries. From the nearest codes on, each step moves
the one element that gains most to the level that suits it best:

    g = e W,   t_d = L_d - g_d / (s W_dd),   L'_d = nearest level to t_d,   delta_d = s (L'_d - L_d)
    d* = argmin_d delta_d (2 g_d + W_dd delta_d),      g <- g + delta_d* W_d*

for a fixed number of steps, those that gain nothing left out; then s = <y, L>_W / <L, L>_W.
Decoding is not touched. A step is O(D) for a token, and all tokens take it at once. Moving many
elements of a token at once diverges.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, E thresholds.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Coder = Callable[[Tensor], Tensor]
"""uint8 codes of (B, H, T, D) numbers in units of rms(y)."""

Levels = Callable[[Tensor], Tensor]
"""fp32 levels of codes."""


def search_codes(
    y_BHTD: Tensor,
    codes_BHTD: Tensor,
    metric_HDD: Tensor,
    unit_H: Tensor,
    steps: int,
    code: Coder,
    levels: Levels,
) -> tuple[Tensor, Tensor]:
    """Better codes and their scale.

    Args:
        y_BHTD: fp32.
        codes_BHTD: uint8, nearest ones.
        metric_HDD: W, symmetric, positive on its diagonal.
        unit_H: What a level of 1 is worth in units of what ``code`` takes.
        steps: Elements of a token that may move.
        code: Gives the codes of numbers.
        levels: Gives the levels of codes.

    Returns:
        uint8 (B, H, T, D) and fp32 scales (B, H, T), 0 where y is 0.
    """
    level_BHTD = levels(codes_BHTD)
    diagonal_H1D = metric_HDD.diagonal(dim1=-2, dim2=-1)[:, None]
    scale_BHT1 = _ratio(y_BHTD, level_BHTD, level_BHTD)
    g_BHTD = (scale_BHT1 * level_BHTD - y_BHTD) @ metric_HDD
    damped_BHTD = scale_BHT1.clamp(min=torch.finfo(torch.float32).tiny) * diagonal_H1D
    unit_H11 = unit_H[:, None, None]
    head_BHT = torch.arange(y_BHTD.shape[1], device=y_BHTD.device)[:, None].expand(
        y_BHTD.shape[:-1]
    )
    codes_BHTD = codes_BHTD.clone()
    for _ in range(steps):
        other_BHTD = code((level_BHTD - g_BHTD / damped_BHTD) * unit_H11)
        delta_BHTD = scale_BHT1 * (levels(other_BHTD) - level_BHTD)
        change_BHTD = delta_BHTD * (2 * g_BHTD + diagonal_H1D * delta_BHTD)
        best = change_BHTD.argmin(-1, keepdim=True)
        gains = change_BHTD.gather(-1, best) < 0
        moved = torch.where(gains, other_BHTD.gather(-1, best), codes_BHTD.gather(-1, best))
        codes_BHTD.scatter_(-1, best, moved)
        level_BHTD = levels(codes_BHTD)
        step_BHT1 = delta_BHTD.gather(-1, best) * gains
        g_BHTD = g_BHTD + step_BHT1 * metric_HDD[head_BHT, best[..., 0]]
    weighted_BHTD = level_BHTD @ metric_HDD
    return codes_BHTD, _ratio(y_BHTD, weighted_BHTD, level_BHTD)[..., 0]


def _ratio(y_BHTD: Tensor, along_BHTD: Tensor, level_BHTD: Tensor) -> Tensor:
    """<y, along> / <level, along>, (B, H, T, 1), not negative."""
    energy = (level_BHTD * along_BHTD).sum(-1, keepdim=True)
    return ((y_BHTD * along_BHTD).sum(-1, keepdim=True) / energy).clamp(min=0)
