"""What the numbers of a layer's constants must be for codes to mean anything.

Calibration makes such constants by construction; a file that was damaged, or made by somebody
else, need not. Each check is of something that the code that reads codes relies on.

Shape suffixes: H KV heads, D head width, L levels, E thresholds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.kv.calibration.boost import LARGEST
from rotq.kv.presets import KVSpec
from rotq.ops import KVConstants, SideConstants, level_values

_LARGEST = 1e15
"""Of a key or value: its square, summed, is still finite in fp32."""
_LARGEST_INVERSE = 1e6
"""rms of a row of A^-1 where those of A have 1: what an error may grow by."""
_BASE = (-128.0, 96.0)
"""Of log2 norms; 16 octaves above the upper one are still finite in fp32."""
_LARGEST_SCALE = 1e4
"""Of the residual, in levels."""
_TOLERANCE = 1e-2


def check_constants(constants: KVConstants, spec: KVSpec) -> None:
    """Refuse constants that a scheme cannot have, whatever the model.

    Raises:
        ValueError: begins with the tensor's name.
    """
    form = constants.format
    free_key = spec.alpha != 0 or spec.beta != 0
    _check_side("key", constants.key, form.k_bits, spec, orthogonal=not free_key)
    _check_side("value", constants.value, form.v_bits, spec, orthogonal=not spec.value_metric)
    if constants.sketch_DD is not None:
        _check_sketch(constants.sketch_DD, orthogonal=spec.sketch == "orthogonal")
    if constants.residual_scale_H is not None:
        _check_range("residual_scale_H", constants.residual_scale_H, 0, _LARGEST_SCALE)
    if constants.gamma_base_H is not None:
        _check_range("gamma_base_H", constants.gamma_base_H, *_BASE)


def _check_side(
    name: str, side: SideConstants, bits: int, spec: KVSpec, *, orthogonal: bool
) -> None:
    try:
        if side.boost_HC is not None:
            _check_range("boost_HC", side.boost_HC, 1.0, LARGEST)
        _check_matrix(side, orthogonal=orthogonal)
        _check_codebook(side, bits, normal=spec.codebook == "gaussian")
        _check_range("mean_HD", side.mean_HD, -_LARGEST, _LARGEST)
        _check_range("base_H", side.base_H, *_BASE)
        if side.metric_HDD is not None:
            _check_metric(side.metric_HDD)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _check_matrix(side: SideConstants, *, orthogonal: bool) -> None:
    """A is invertible, and its rows have norm 1 in the mean; see ``metric.balanced_metric``."""
    A_HDD, inverse_HDD = side.matrix_HDD, side.inverse_HDD
    size_H = A_HDD.double().square().sum(-1).mean(-1)
    _check("matrix_HDD", bool((size_H - 1).abs().max() <= _TOLERANCE), "has rows of another norm")
    growth_H = inverse_HDD.double().square().sum(-1).mean(-1).sqrt()
    _check("matrix_HDD", bool(growth_H.max() <= _LARGEST_INVERSE), "has no inverse")
    if orthogonal:
        away = (A_HDD @ A_HDD.mT - torch.eye(A_HDD.shape[-1])).abs().max()
        _check("matrix_HDD", bool(away <= _TOLERANCE), "is not orthogonal")


def _check_codebook(side: SideConstants, bits: int, *, normal: bool) -> None:
    """Levels ascend, and thresholds are half-way between; see ``codebook.integer_codebook``.

    Args:
        normal: For the unit normal; of fitted levels, some may be equal.
    """
    _check_range("unit_H", side.unit_H, 1e-37, 1.0 if normal else _LARGEST)
    levels_HL = level_values(side.levels_HL, bits)
    step_HE = levels_HL.diff(dim=-1)
    ascending = bool((step_HE > 0 if normal else step_HE >= 0).all())
    _check("levels_HL", ascending, "does not ascend")
    middle_HE = (levels_HL[:, 1:] + levels_HL[:, :-1]) / 2
    away_HE = side.thresholds_HL / side.unit_H[:, None] - middle_HE
    half_way = bool(away_HE.abs().max() <= _TOLERANCE)
    _check("thresholds_HL", half_way, "is not half-way between the levels")


def _check_metric(W_HDD: Tensor) -> None:
    """Symmetric, its diagonal positive with a mean of 1; see ``metric.coded_metric``."""
    diagonal_HD = W_HDD.diagonal(dim1=-2, dim2=-1)
    positive = bool((diagonal_HD > 0).all())
    size = bool((diagonal_HD.mean(-1) - 1).abs().max() <= _TOLERANCE)
    symmetric = bool((W_HDD - W_HDD.mT).abs().max() <= _TOLERANCE)
    _check("metric_HDD", symmetric and positive and size, "is no metric of mean diagonal 1")
    _check_range("metric_HDD", W_HDD, -2 * W_HDD.shape[-1], 2 * W_HDD.shape[-1])


def _check_sketch(S_DD: Tensor, *, orthogonal: bool) -> None:
    """Orthogonal, or normal numbers, whose rms is near 1 in the smallest head, too."""
    _check_range("sketch_DD", S_DD, -16, 16)
    if orthogonal:
        away = (S_DD @ S_DD.mT - torch.eye(S_DD.shape[0])).abs().max()
        _check("sketch_DD", bool(away <= _TOLERANCE), "is not orthogonal")
    else:
        normal = 0.5 < float(S_DD.square().mean()) < 2
        _check("sketch_DD", normal, "does not hold unit normal numbers")


def _check_range(name: str, tensor: Tensor, low: float, high: float) -> None:
    inside = bool(((tensor >= low) & (tensor <= high)).all())
    _check(name, inside, f"is not between {low:g} and {high:g}")


def _check(name: str, holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"{name} {problem}")
