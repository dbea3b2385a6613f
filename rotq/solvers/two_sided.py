"""GPTQ whose rows feel each other's errors, too: feedback on both sides of the weight.

    L(W^) = tr H_O (W^ - T) H_I (W^ - T)^T      H_I of the inputs, H_O of the slopes at the outputs

(YAQA, arXiv 2505.22988.) The column loop is GPTQ's own: what is best for the columns to come does
not depend on H_O. Inside a column the rows are rounded in order, each with the errors of those
before it taken back through H_O, as columns are through H_I. Sweeps over scales and codes lower L
itself; they are those of ``refine`` with H_O in them.

Shape suffixes: N out features, K in features, G groups, g columns of a group, B columns of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.devices import double
from rotq.formats.integer import Grid
from rotq.ops import refine_column, round_column
from rotq.phases import phase
from rotq.solvers.gptq import BLOCK, Elimination, feed_back, in_place_of
from rotq.solvers.scales import storable


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How much the loss feels of errors in a layer's rows together."""

    hessian_NN: Tensor
    """H_O, fp32, positive definite, mean diagonal 1."""
    visit_N: Tensor
    """Rows in the order they are rounded."""
    factor_NN: Tensor
    """U, upper, of H_O^-1 = U^T U in that order, each row over its diagonal."""


def eliminate_rows(moment_NN: Tensor, damping: float) -> Rows:
    """Damp, bring to mean one, factor.

    Args:
        moment_NN: Sums of g g^T over tokens, fp32, not modified; zeros stand for I.
        damping: Share of the mean diagonal that is added to it.
    """
    moment_NN = (moment_NN + moment_NN.T) / (2 * moment_NN.diagonal().mean().clamp(min=1e-30))
    moment_NN.diagonal().add_(damping)
    hessian_NN = moment_NN / moment_NN.diagonal().mean()
    visit_N = torch.argsort(hessian_NN.diagonal(), descending=True, stable=True)
    factor_NN = _inverse_factor(hessian_NN[visit_N[:, None], visit_N])
    return Rows(
        hessian_NN=hessian_NN,
        visit_N=visit_N,
        factor_NN=(factor_NN / factor_NN.diagonal()[:, None]).contiguous(),
    )


def ring_spreads(hessian_NN: Tensor, rows: int) -> list[Tensor]:
    """How an error of each ring's rows is taken back by the rows after it: (R, N - end) each.

    Args:
        hessian_NN: H_O, fp32, positive definite.
        rows: R, which divides N.
    """
    factor_NN = double(_inverse_factor(hessian_NN))
    spreads = []
    for end in range(rows, len(hessian_NN) + 1, rows):
        ring = slice(end - rows, end)
        # with H^-1 = U^T U those after a ring r are w - e U_rr^-1 U_r,rest
        own_RR, rest_RN = factor_NN[ring, ring], factor_NN[ring, end:]
        spreads.append(-torch.linalg.solve_triangular(own_RR, rest_RN, upper=True).float())
    return spreads


def _inverse_factor(hessian_NN: Tensor) -> Tensor:
    """U, upper, with H^-1 = U^T U; computed in fp64, returned in fp32."""
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(double(hessian_NN)))
    return torch.linalg.cholesky(inverse_NN, upper=True).float()


@phase("columns")
def round_both(
    weight_NK: Tensor,
    elimination: Elimination,
    rows: Rows,
    scale_NG: Tensor,
    zero_NG: Tensor,
    grid: Grid,
) -> Tensor:
    """The column loop with fixed scales; q_NK, fp32 levels."""
    (N, K), G = weight_NK.shape, scale_NG.shape[1]
    visit_N = rows.visit_N
    group_K = elimination.visit_K // (K // G)
    scale_GN, zero_GN = (each.T[:, visit_N].contiguous() for each in (scale_NG, zero_NG))
    bounds_2N = _bounds(grid, N)
    q_KN = torch.empty(K, N)
    code_N = torch.empty(N)
    groups = group_K.tolist()

    def nearest(k: int, w_N: Tensor) -> Tensor:
        group = groups[k]
        round_column(
            w_N[visit_N], rows.factor_NN, scale_GN[group], zero_GN[group], bounds_2N, code_N
        )
        q_KN[k, visit_N] = code_N
        rounded_N = torch.empty(N)
        rounded_N[visit_N] = (code_N - zero_GN[group]) * scale_GN[group]
        return rounded_N

    feed_back(weight_NK, elimination, nearest)
    return in_place_of(q_KN, elimination.visit_K)


@phase("sweeps")
def refine_both(
    target_NK: Tensor,
    hessian_KK: Tensor,
    rows: Rows,
    codes: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    *,
    sweeps: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Alternate scales and codes ``sweeps`` times and end with scales; q_NK and scale_NG, fp32."""
    q_NK, scale_NG, zero_NG = codes
    for _ in range(sweeps):
        codes = (q_NK, scale_NG, zero_NG)
        scale_NG = refine_scales_both(target_NK, hessian_KK, rows, codes, scale_dtype=scale_dtype)
        q_NK = _refined_codes(target_NK, hessian_KK, rows, (q_NK, scale_NG, zero_NG), grid)
    if sweeps:
        codes = (q_NK, scale_NG, zero_NG)
        scale_NG = refine_scales_both(target_NK, hessian_KK, rows, codes, scale_dtype=scale_dtype)
    return q_NK, scale_NG


def refine_scales_both(
    target_NK: Tensor,
    hessian_KK: Tensor,
    rows: Rows,
    codes: tuple[Tensor, Tensor, Tensor],
    *,
    scale_dtype: torch.dtype,
) -> Tensor:
    """One sweep over the groups: the scales of all rows of one are solved for together.

    (H_O o V H_gg V^T) d = - diag(H_O (W^ - T) H_I,:g V^T),     V = q - z of the group
    """
    q_NK, scale_NG, zero_NG = codes
    (N, K), G = q_NK.shape, scale_NG.shape[1]
    v_NGg = q_NK.view(N, G, -1) - zero_NG[..., None]
    scale_NG = scale_NG.clone()
    half_NK = ((v_NGg * scale_NG[..., None]).view(N, K) - target_NK) @ hessian_KK
    for group in range(G):
        part = slice(group * (K // G), (group + 1) * (K // G))
        v_Ng = v_NGg[:, group]
        vH_NK = v_Ng @ hessian_KK[part]
        system_NN = double((vH_NK[:, part] @ v_Ng.T).mul_(rows.hessian_NN))
        diagonal_N = system_NN.diagonal()
        # a row whose codes are all zero points has no scale to find
        diagonal_N.add_(torch.where(diagonal_N > 0, 1e-6 * diagonal_N.mean(), 1.0))
        slope_N = ((rows.hessian_NN @ half_NK[:, part]) * v_Ng).sum(-1)
        factor_NN = torch.linalg.cholesky(system_NN)
        change_N = torch.cholesky_solve(-double(slope_N)[:, None], factor_NN)[:, 0].float()
        best_N = scale_NG[:, group] + change_N
        old_N = scale_NG[:, group].clone()
        taken_N = torch.where(best_N > 0, storable(best_N, scale_dtype), old_N)
        half_NK.addcmul_(vH_NK, (taken_N - old_N)[:, None])
        scale_NG[:, group] = taken_N
    return scale_NG


def _refined_codes(
    target_NK: Tensor,
    hessian_KK: Tensor,
    rows: Rows,
    codes: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
) -> Tensor:
    """One sweep over the columns, in each over the rows; q_NK, fp32 levels."""
    q_NK, scale_NG, zero_NG = codes
    (N, K), G = q_NK.shape, scale_NG.shape[1]
    error_NK = ((q_NK.view(N, G, -1) - zero_NG[..., None]) * scale_NG[..., None]).view(N, K)
    half_KN = hessian_KK @ (error_NK - target_NK).T
    q_KN, scale_GN, bounds_2N = q_NK.T.contiguous(), scale_NG.T.contiguous(), _bounds(grid, N)
    diagonal = hessian_KK.diagonal().tolist()
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        change_BN = torch.empty(end - start, N)
        for k in range(start, end):
            gradient_N = rows.hessian_NN @ half_KN[k]
            change_N = refine_column(
                gradient_N,
                rows.hessian_NN,
                diagonal[k],
                scale_GN[k // (K // G)],
                bounds_2N,
                q_KN[k],
            )
            change_BN[k - start] = change_N
            half_KN[k + 1 : end].addr_(hessian_KK[k, k + 1 : end], change_N)
        half_KN[end:].addmm_(hessian_KK[end:, start:end], change_BN)
    return q_KN.T.contiguous()


def _bounds(grid: Grid, rows: int) -> Tensor:
    return (
        torch.tensor([[grid.q_min], [grid.q_max]], dtype=torch.float32).expand(2, rows).contiguous()
    )
