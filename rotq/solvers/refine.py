"""After GPTQ: lower the same objective by scales and codes in turn. It never rises.

    L(q, s) = tr (W^ - T) H (W^ - T)^T,     W^_ng = s_ng (q_ng - z_ng),   T the target weights

Scales: coordinate descent over groups, each step exact (two-stage refinement, arXiv 2602.02126):
    s_g <- s_g - v_g [H_g: (W^ - T)^T] / (v_g H_gg v_g^T),       v = q - z
Codes: coordinate descent over columns (QuantEase, arXiv 2309.01885): with the others fixed, the
best code of column k is the rounding of q_k - [(W^ - T) H]_k / (H_kk s_k).
Shape suffixes: N out features, K in features, G groups, B columns of one block.
"""

import torch
from torch import Tensor

from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid
from rotq.ops import refine_block, rounds_natively
from rotq.phases import phase
from rotq.solvers.gptq import BLOCK
from rotq.solvers.scales import storable


@phase("sweeps")
def refine(
    target_NK: Tensor,
    hessian_KK: Tensor,
    codes: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    *,
    sweeps: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Alternate scales and codes ``sweeps`` times and end with scales.

    Args:
        target_NK: fp32, not modified.
        hessian_KK: Damped Hessian, fp32.
        codes: q_NK, scale_NG, zero_NG as fp32; not modified.
        grid: Bits and symmetry.
        sweeps: Alternations; 0 returns what was given.
        scale_dtype: Scales are rounded to it; a rounded scale that raises L is not taken.

    Returns:
        q_NK, scale_NG: fp32.
    """
    q_NK, scale_NG, zero_NG = codes
    for _ in range(sweeps):
        scale_NG = refine_scales(
            target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), scale_dtype=scale_dtype
        )
        q_NK = refine_codes(target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), grid)
    if sweeps:
        scale_NG = refine_scales(
            target_NK, hessian_KK, (q_NK, scale_NG, zero_NG), scale_dtype=scale_dtype
        )
    return q_NK, scale_NG


def refine_scales(
    target_NK: Tensor,
    hessian_KK: Tensor,
    codes: tuple[Tensor, Tensor, Tensor],
    *,
    scale_dtype: torch.dtype,
) -> Tensor:
    """One sweep over the groups; each takes its best storable scale. Returns scale_NG, fp32."""
    q_NK, scale_NG, zero_NG = codes
    (N, K), G = q_NK.shape, scale_NG.shape[1]
    v_NGg = q_NK.view(N, G, -1) - zero_NG[..., None]
    scale_NG = scale_NG.clone()
    error_NK = (v_NGg * scale_NG[..., None]).view(N, K) - target_NK
    gradient_NK = error_NK @ hessian_KK
    for group, columns in enumerate(torch.arange(K, device=q_NK.device).view(G, -1)):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        v_Ng = v_NGg[:, group]
        vH_NK = v_Ng @ hessian_KK[part]
        curvature_N = (vH_NK[:, part] * v_Ng).sum(-1)
        slope_N = (gradient_NK[:, part] * v_Ng).sum(-1)
        change_N = _storable_change(scale_NG[:, group], slope_N, curvature_N, scale_dtype)
        scale_NG[:, group] += change_N
        gradient_NK.addcmul_(vH_NK, change_N[:, None])
    return scale_NG


def refine_codes(
    target_NK: Tensor, hessian_KK: Tensor, codes: tuple[Tensor, Tensor, Tensor], grid: Grid
) -> Tensor:
    """One sweep over the columns; each takes its best code. Returns q_NK, fp32 levels."""
    q_NK, scale_NG, zero_NG = codes
    (N, K), G = q_NK.shape, scale_NG.shape[1]
    error_NK = ((q_NK.view(N, G, -1) - zero_NG[..., None]) * scale_NG[..., None]).view(N, K)
    gradient_KN = hessian_KK @ (error_NK - target_NK).T
    q_KN, scale_GN = q_NK.T.contiguous(), scale_NG.T.contiguous()
    step_GN = 1.0 / scale_GN
    is_native = not isinstance(grid, FloatGrid) and rounds_natively(target_NK)
    changes = _native_changes if is_native else _changes
    for start in range(0, K, BLOCK):
        block, rest = slice(start, min(start + BLOCK, K)), slice(start + BLOCK, K)
        group_B = torch.arange(block.start, block.stop, device=q_KN.device) // (K // G)
        scale_BN, step_BN = scale_GN[group_B], step_GN[group_B]
        hessian_BB = hessian_KK[block, block]
        change_BN = changes(gradient_KN[block], hessian_BB, scale_BN, step_BN, grid, q_KN[block])
        gradient_KN[rest].addmm_(hessian_KK[rest, block], change_BN)
    return q_KN.T.contiguous()


def _changes(
    gradient_BN: Tensor,
    hessian_BB: Tensor,
    scale_BN: Tensor,
    step_BN: Tensor,
    grid: Grid,
    q_BN: Tensor,
) -> Tensor:
    """Best codes of one block of columns, put into ``q_BN``; what changed, (B, N)."""
    change_BN, diagonal = torch.empty_like(q_BN), hessian_BB.diagonal().tolist()
    for k in range(len(q_BN)):
        step_N = gradient_BN[k] * step_BN[k]
        best_N = grid.nearest_(torch.add(q_BN[k], step_N, alpha=-1.0 / diagonal[k]))
        change_BN[k] = torch.sub(best_N, q_BN[k]).mul_(scale_BN[k])
        q_BN[k] = best_N
        gradient_BN[k + 1 :].addr_(hessian_BB[k, k + 1 :], change_BN[k])
    return change_BN


def _native_changes(
    gradient_BN: Tensor,
    hessian_BB: Tensor,
    scale_BN: Tensor,
    step_BN: Tensor,
    grid: Grid,
    q_BN: Tensor,
) -> Tensor:
    bounds = grid.q_min, grid.q_max
    return refine_block(gradient_BN, hessian_BB, scale_BN, step_BN, bounds, q_BN)


def _storable_change(
    scale_N: Tensor, slope_N: Tensor, curvature_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Step to the rounded optimum, or 0 where that is not lower or not positive.

    Along s the objective is  slope d + curvature d^2 / 2  (times 2): it falls iff
    d (2 slope + curvature d) < 0.
    """
    best_N = scale_N - slope_N / curvature_N.clamp(min=1e-30)
    change_N = storable(best_N, dtype) - scale_N
    falls_N = change_N * (2 * slope_N + curvature_N * change_N) < 0
    return torch.where(falls_N & (best_N > 0) & (curvature_N > 0), change_N, 0.0)
