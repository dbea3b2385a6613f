"""A layer's constants from its statistics.

Everything comes from the sampled tokens and from second moments; see ``metric`` for A.

Shape suffixes: H KV heads, N sampled tokens, D head width, L levels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rotq.kv.calibration.boost import KEY_POWER, VALUE_POWER, boosted
from rotq.kv.calibration.codebook import (
    Codebook,
    fitted_centres,
    gaussian_codebook,
    integer_codebook,
)
from rotq.kv.calibration.evidence import shrunk
from rotq.kv.calibration.layer_constants import (
    centred_base,
    hadamard_basis,
    layer_constants,
    search_steps,
    side_constants,
)
from rotq.kv.calibration.metric import balanced_metric, coded_metric, symmetric_power
from rotq.kv.calibration.residual import fit_residual
from rotq.kv.calibration.statistics import LayerStatistics
from rotq.kv.presets import KVSpec
from rotq.ops import (
    KVConstants,
    KVFormat,
    SideConstants,
    dequantize_side,
    quantize_side,
)

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Tried for values, and for keys where the scheme leaves alpha open."""

_TRIED_ROWS = 1024
"""That they are tried on, of all samples."""


def fit_layer(statistics: LayerStatistics, spec: KVSpec, format: KVFormat) -> KVConstants:
    """Constants of one layer under a scheme."""
    rotary = statistics.rotary
    key = fit_key(statistics, spec, format)
    centred_HND = centred_keys(statistics, spec)
    constants = layer_constants(
        spec,
        statistics.shape,
        format,
        key=key,
        value=fit_value(statistics, spec, format),
        rotary=rotary,
    )
    if spec.residual != "none":
        scales = fit_residual(centred_HND, constants, spec)
        constants.residual_scale_H, constants.gamma_base_H = scales
    return constants


def centred_keys(statistics: LayerStatistics, spec: KVSpec) -> Tensor:
    """Sampled keys without what the scheme removes, fp32 (H, N, D)."""
    mean_HD, turned = _key_mean(statistics, spec)
    mean_HND = mean_HD[:, None].float()
    if turned:
        assert statistics.rotary is not None
        mean_HND = statistics.rotary.turn(mean_HND, statistics.position_N)
    return statistics.k_HND - mean_HND


def fit_key(statistics: LayerStatistics, spec: KVSpec, format: KVFormat) -> SideConstants:
    """The key side; where the scheme leaves alpha open, each head takes what errs least.

    The error is mean e M e over sampled keys, M the weighted second moment of the queries.
    """
    x_HND = centred_keys(statistics, spec)
    mean_HD, _ = _key_mean(statistics, spec)
    C_HDD = _second_moment(x_HND, statistics.weight)
    basis_HDD = _basis(spec.basis, C_HDD)
    metric_HDD = statistics.query_moment_HDD
    alphas = ALPHAS if spec.alpha is None else (spec.alpha,)
    matrices = [balanced(basis_HDD, C_HDD, metric_HDD, alpha, spec.beta) for alpha in alphas]
    side = _best_side(matrices, x_HND, mean_HD, metric_HDD, spec, format.k_bits)
    if not spec.boosts:
        return side
    weight, bits = statistics.weight, format.k_bits
    return boosted(side, x_HND, metric_HDD, bits=bits, power=KEY_POWER, weight=weight)


def fit_value(statistics: LayerStatistics, spec: KVSpec, format: KVFormat) -> SideConstants:
    """The value side; with a metric, each head takes what errs least."""
    mean_HD = statistics.value_mean_HD
    if not spec.value_mean:
        mean_HD = torch.zeros_like(mean_HD)
    x_HND = statistics.v_HND - mean_HD[:, None].float()
    C_HDD = _second_moment(x_HND, statistics.weight)
    matrices = [_basis(spec.value_basis, C_HDD)]
    metric_HDD = statistics.output_moment_HDD
    if spec.value_metric and metric_HDD is not None:
        matrices = [balanced(matrices[0], C_HDD, metric_HDD, alpha, 1.0) for alpha in ALPHAS]
    side = _best_side(matrices, x_HND, mean_HD, metric_HDD, spec, format.v_bits)
    if not spec.boosts:
        return side
    weight, bits = statistics.weight, format.v_bits
    return boosted(side, x_HND, metric_HDD, bits=bits, power=VALUE_POWER, weight=weight)


def balanced(
    basis_HDD: Tensor, C_HDD: Tensor, metric_HDD: Tensor, alpha: float, beta: float
) -> Tensor:
    """A = basis x P^(1/2), fp64."""
    if alpha == 0 and beta == 0:
        return basis_HDD
    P_HDD = balanced_metric(C_HDD, metric_HDD, alpha=alpha, beta=beta)
    return basis_HDD @ symmetric_power(P_HDD, 0.5)


def coding_error(
    x_HND: Tensor,
    side: SideConstants,
    bits: int,
    norm: Literal["log8", "float16", "none"],
    metric_HDD: Tensor,
) -> Tensor:
    """(H,) mean of e M e over rows, e what coding leaves."""
    codes, stored = quantize_side(x_HND[None], side, bits, norm)
    e_HND = (dequantize_side(codes, stored, side, bits)[0] - x_HND).double()
    return ((e_HND @ metric_HDD) * e_HND).sum(-1).mean(-1)


def _key_mean(statistics: LayerStatistics, spec: KVSpec) -> tuple[Tensor, bool]:
    """Mean (H, D), and whether it is turned to positions."""
    if spec.mean == "rope" and statistics.rotary is not None:
        return statistics.key_mean_HD, True
    if spec.mean == "none":
        return torch.zeros_like(statistics.turned_key_mean_HD), False
    return statistics.turned_key_mean_HD, False


def _basis(kind: Literal["hadamard", "svd", "none"], C_HDD: Tensor) -> Tensor:
    """Orthogonal (H, D, D), fp64, for tokens of this second moment."""
    H, D, _ = C_HDD.shape
    if kind == "hadamard":
        return hadamard_basis(D).expand(H, -1, -1)
    if kind == "none":
        return torch.eye(D, dtype=torch.float64).expand(H, -1, -1)
    return torch.linalg.eigh(C_HDD).eigenvectors.mT.flip(1)


def _second_moment(x_HND: Tensor, weight: float) -> Tensor:
    """Of the samples, as far as the text says it; see ``evidence``."""
    x_HND = x_HND.double()
    return shrunk(x_HND.mT @ x_HND / x_HND.shape[1], weight)


def _fit_side(
    matrix_HDD: Tensor,
    x_HND: Tensor,
    mean_HD: Tensor,
    spec: KVSpec,
    bits: int,
    metric_HDD: Tensor | None,
) -> SideConstants:
    y_HND = x_HND.double() @ matrix_HDD.mT
    rms_HN = y_HND.square().mean(-1).sqrt().clamp(min=1e-30)
    if spec.codebook == "kmeans":
        books = [_kmeans(y_N.flatten(), bits) for y_N in y_HND]
    else:
        books = [gaussian_codebook(bits)] * len(y_HND)
    unit_H = torch.tensor([book.unit for book in books], dtype=torch.float64)
    if spec.norm == "none":
        base_H = unit_H.log2()
    else:
        base_H = centred_base(rms_HN.median(-1).values, unit_H)
    return side_constants(
        matrix_HDD,
        mean_HD,
        books,
        gain=spec.gain,
        base_H=base_H,
        metric_HDD=None if metric_HDD is None else coded_metric(matrix_HDD, metric_HDD),
        search=search_steps(spec.search, bits) if metric_HDD is not None else 0,
    )


def _kmeans(y_N: Tensor, bits: int) -> Codebook:
    """Of raw numbers, started at their quantiles; as TurboESM's code has it."""
    order = torch.linspace(0, 1, 2 ** (bits + 1) + 1, dtype=torch.float64)[1::2]
    sorted_N = y_N.sort().values
    start_L = sorted_N[(order * (sorted_N.numel() - 1)).long()]
    return integer_codebook(fitted_centres(y_N, bits, start_L))


def _best_side(
    matrices: list[Tensor],
    x_HND: Tensor,
    mean_HD: Tensor,
    metric_HDD: Tensor | None,
    spec: KVSpec,
    bits: int,
) -> SideConstants:
    """Of several A, the one whose errors cost least, head by head."""
    sides = [_fit_side(A_HDD, x_HND, mean_HD, spec, bits, metric_HDD) for A_HDD in matrices]
    if len(sides) == 1:
        return sides[0]
    assert metric_HDD is not None
    x_HND = x_HND[:, :: -(-x_HND.shape[1] // _TRIED_ROWS)]
    errors = [coding_error(x_HND, side, bits, spec.norm, metric_HDD) for side in sides]
    return _pick(sides, torch.stack(errors).argmin(0))


def _pick(sides: list[SideConstants], choice_H: Tensor) -> SideConstants:
    """Each head from the side that ``choice_H`` names."""

    def pick(name: str) -> Tensor:
        found = [getattr(side, name) for side in sides]
        return torch.stack([found[int(choice)][head] for head, choice in enumerate(choice_H)])

    return SideConstants(
        matrix_HDD=pick("matrix_HDD"),
        inverse_HDD=pick("inverse_HDD"),
        mean_HD=sides[0].mean_HD,
        levels_HL=pick("levels_HL"),
        thresholds_HL=pick("thresholds_HL"),
        base_H=pick("base_H"),
        gain=sides[0].gain,
        unit_H=pick("unit_H"),
        metric_HDD=None if sides[0].metric_HDD is None else pick("metric_HDD"),
        search=sides[0].search,
    )
