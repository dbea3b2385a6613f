"""Size of the residual bit of keys, fitted to sampled ones.

    sign:  delta = sum s |r| / sum s^2                       r = y - s L[q]
    qjl:   c = sum g <r, S^T sigma> / sum g^2 |S^T sigma|^2  g = rms(r)

which is least squares; ``unbiased`` takes the textbook's c instead. Where nothing is left it is 0.

Shape suffixes: H KV heads, N sampled tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.kv.calibration.layer_constants import centred_base, unbiased_scale
from rotq.kv.presets import KVSpec
from rotq.ops import KVConstants, SideConstants, decode_norm, level_values, quantize_side


def fit_residual(
    x_HND: Tensor, constants: KVConstants, spec: KVSpec
) -> tuple[Tensor, Tensor | None]:
    """``residual_scale_H`` and ``gamma_base_H`` of keys whose mean has been removed."""
    bits, side = constants.format.k_bits, constants.key
    codes, stored = quantize_side(x_HND[None], side, bits, constants.format.norm)
    scale_HN1 = _scale(stored, side)
    head_H11 = torch.arange(x_HND.shape[0])[:, None, None]
    level_HND = level_values(side.levels_HL, bits)[head_H11, codes[0].int()]
    left_HND = x_HND @ side.matrix_HDD.mT - scale_HN1 * level_HND
    if spec.residual == "sign":
        size_H = _ratio((scale_HN1 * left_HND.abs()).mean((1, 2)), scale_HN1.square().mean((1, 2)))
        return size_H, None
    assert constants.sketch_DD is not None
    rms_HN1 = left_HND.square().mean(-1, keepdim=True).sqrt()
    back_HND = (left_HND @ constants.sketch_DD.mT).sign() @ constants.sketch_DD
    fitted_H = _ratio(
        (rms_HN1 * back_HND * left_HND).sum((1, 2)), (rms_HN1 * back_HND).square().sum((1, 2))
    )
    if spec.residual_scale == "unbiased":
        fitted_H = torch.full_like(fitted_H, unbiased_scale(spec, x_HND.shape[-1]))
    typical_H = rms_HN1[..., 0].median(-1).values
    return fitted_H, centred_base(typical_H, torch.ones_like(typical_H))


def _ratio(part_H: Tensor, whole_H: Tensor) -> Tensor:
    """0 where the whole is."""
    return torch.where(whole_H > 0, part_H / whole_H, 0.0)


def _scale(stored: Tensor | None, side: SideConstants) -> Tensor:
    """s (H, N, 1), or (H, 1, 1) where nothing is stored."""
    if stored is None:
        return side.base_H.exp2()[:, None, None]
    return decode_norm(stored[0], side.base_H[:, None])[..., None]
