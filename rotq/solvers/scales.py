"""Scales and zero points of a grid, searched over shrink factors of the weights' range.

    s = p (hi - lo) / (2^bits - 1),    z in {floor, ceil}(q_min - p lo / s)        asymmetric
    s = p max|w| / (2^(bits-1) - 1/2), z = 0                                       symmetric

or, on grids of floats with scales of 8 bits, over the neighbours of the closed form. For each group
of each row the candidate with the least error e = w - dequantize(quantize(w)) wins:

    mse        sum |e|^2.4                          (GPTQ's released code)
    diagonal   e diag(H_gg) e^T
    hessian    e H_gg e^T, H_gg the group's block   (TurboBoA, arXiv 2602.04929, stage 1)

Shape suffixes: N out features, K in features, G groups, g columns of one group.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rotq.formats.floats import LARGEST_E4M3, FloatGrid
from rotq.formats.integer import Grid
from rotq.ops import best_candidates, searches_natively
from rotq.phases import phase

SHRINK_FACTORS, SMALLEST_SHRINK = 24, 0.5
"""Tried by all judges but ``minmax``: evenly spaced from 1 down to the smallest."""

NEIGHBOURS = {torch.float8_e4m3fn: 6, torch.float8_e8m0fnu: 1}
"""Scales that are tried on each side of the closed form: from about 0.6 to 1.6 times it."""

LARGEST_BLOCK = 256
"""Above this many columns per group, ``hessian`` is judged by the diagonal: the block costs g^2."""

ErrorMeasure = Callable[[Tensor], Tensor]


@phase("scales")
def search_scales(
    weight_NK: Tensor,
    hessian_KK: Tensor | None,
    grid: Grid,
    *,
    judge: str,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Find one scale and zero point per row and group.

    Args:
        weight_NK: fp32, not modified.
        hessian_KK: fp32; None stands for I.
        grid: Bits, group size, symmetry.
        judge: "minmax", "mse", "diagonal" or "hessian".
        scale_dtype: Scales are rounded to it, so that what is judged is what is stored.

    Returns:
        scale_NG: fp32, representable in ``scale_dtype``, positive.
        zero_NG: fp32 integers in [q_min, q_max]; zeros on a symmetric grid.

    Raises:
        ValueError: the group size does not divide K.
    """
    N, K = weight_NK.shape
    w_NGg = weight_NK.view(N, -1, grid.columns_per_group(K))
    if isinstance(grid, FloatGrid):
        candidates = _float_candidates(w_NGg, grid, judge != "minmax", scale_dtype)
    else:
        steps = 1 if judge == "minmax" else SHRINK_FACTORS
        candidates = _candidates(w_NGg, grid, steps, scale_dtype)
        if judge == "hessian" and searches_natively(w_NGg) and w_NGg.shape[-1] <= LARGEST_BLOCK:
            return _native_search(w_NGg, hessian_KK, grid, candidates)
    measure = _measure(judge, hessian_KK, w_NGg)
    best_scale_NG, best_zero_NG = next(candidates)
    least_NG = measure(round_to_grid(w_NGg, best_scale_NG, best_zero_NG, grid) - w_NGg)
    for scale_NG, zero_NG in candidates:
        error_NG = measure(round_to_grid(w_NGg, scale_NG, zero_NG, grid) - w_NGg)
        better_NG = error_NG < least_NG
        least_NG = torch.where(better_NG, error_NG, least_NG)
        best_scale_NG = torch.where(better_NG, scale_NG, best_scale_NG)
        best_zero_NG = torch.where(better_NG, zero_NG, best_zero_NG)
    return best_scale_NG, best_zero_NG


def _native_search(
    w_NGg: Tensor,
    hessian_KK: Tensor | None,
    grid: Grid,
    candidates: Iterator[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    scale_CNG, zero_CNG = (torch.stack(each) for each in zip(*candidates, strict=True))
    block_Ggg = _blocks(hessian_KK, w_NGg)
    bounds = grid.q_min, grid.q_max
    best_1NG = best_candidates(w_NGg, scale_CNG, zero_CNG, block_Ggg, bounds)[None]
    return scale_CNG.gather(0, best_1NG)[0], zero_CNG.gather(0, best_1NG)[0]


def round_to_grid(w_NGg: Tensor, scale_NG: Tensor, zero_NG: Tensor, grid: Grid) -> Tensor:
    """The nearest grid points, (N, G, g) fp32."""
    zero_NG1, scale_NG1 = zero_NG[..., None], scale_NG[..., None]
    q_NGg = grid.nearest_((w_NGg / scale_NG1).add_(zero_NG1))
    return q_NGg.sub_(zero_NG1).mul_(scale_NG1)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their storage dtype, at least its smallest normal number; fp32."""
    limits = torch.finfo(dtype)
    least = max(limits.tiny, torch.finfo(torch.float32).tiny)
    return scale.clamp(least, limits.max).to(dtype).float()


def _candidates(
    w_NGg: Tensor, grid: Grid, steps: int, scale_dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    low_NG, high_NG = w_NGg.amin(-1).clamp(max=0), w_NGg.amax(-1).clamp(min=0)
    if grid.symmetric:
        high_NG = torch.maximum(-low_NG, high_NG)
        low_NG = -high_NG
    span_NG = (high_NG - low_NG) / (grid.q_max - grid.q_min)
    for shrink in torch.linspace(1.0, SMALLEST_SHRINK, steps).tolist():
        scale_NG = storable(shrink * span_NG, scale_dtype)
        if grid.symmetric:
            yield scale_NG, torch.zeros_like(scale_NG)
            continue
        zero_NG = grid.q_min - shrink * low_NG / scale_NG
        if steps == 1:
            yield scale_NG, zero_NG.round().clamp_(grid.q_min, grid.q_max)
            continue
        for rounded_NG in (zero_NG.floor(), zero_NG.ceil()):
            yield scale_NG, rounded_NG.clamp_(grid.q_min, grid.q_max)


def _float_candidates(
    w_NGg: Tensor, grid: FloatGrid, searched: bool, scale_dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The closed form, and where scales have few bits those below and above it."""
    scale_NG = storable(grid.scales(grid.shared(w_NGg.abs().amax(-1))), scale_dtype)
    zero_NG = torch.zeros_like(scale_NG)
    yield scale_NG, zero_NG
    reach = NEIGHBOURS.get(scale_dtype, 0) if searched else 0
    if not reach:
        return
    # codes of positive floats are in the order of their values
    code_NG = scale_NG.to(scale_dtype).view(torch.uint8).int()
    for offset in (*range(-reach, 0), *range(1, reach + 1)):
        moved_NG = (code_NG + offset).clamp_(1, 254).to(torch.uint8).view(scale_dtype).float()
        yield storable(moved_NG.nan_to_num(LARGEST_E4M3), scale_dtype), zero_NG


def _measure(judge: str, hessian_KK: Tensor | None, w_NGg: Tensor) -> ErrorMeasure:
    g = w_NGg.shape[-1]
    if judge in ("minmax", "mse"):
        return lambda e_NGg: e_NGg.abs_().pow_(2.4).sum(-1)
    if judge == "hessian" and g <= LARGEST_BLOCK:
        block_Ggg = _blocks(hessian_KK, w_NGg)
        return lambda e_NGg: _block_error(e_NGg, block_Ggg)
    if judge in ("diagonal", "hessian"):
        if hessian_KK is None:
            return lambda e_NGg: e_NGg.square_().sum(-1)
        diagonal_Gg = hessian_KK.diagonal().view(-1, g)
        return lambda e_NGg: e_NGg.square_().mul_(diagonal_Gg).sum(-1)
    raise ValueError(f"unknown judge {judge!r}; known: minmax, mse, diagonal, hessian")


def _blocks(hessian_KK: Tensor | None, w_NGg: Tensor) -> Tensor:
    """(G, g, g): each group's part of the Hessian."""
    G, g = w_NGg.shape[1:]
    if hessian_KK is None:
        return torch.eye(g, device=w_NGg.device).repeat(G, 1, 1)
    starts = range(0, hessian_KK.shape[0], g)
    return torch.stack([hessian_KK[k : k + g, k : k + g] for k in starts])


def _block_error(e_NGg: Tensor, block_Ggg: Tensor) -> Tensor:
    e_GNg = e_NGg.transpose(0, 1)
    return torch.bmm(e_GNg, block_Ggg).mul_(e_GNg).sum(-1).T  # [G, N, g] -> [N, G]
