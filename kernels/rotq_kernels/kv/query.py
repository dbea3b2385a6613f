"""What a query becomes before it meets packed keys: turned once, so that no key ever is.

Scores are kept in units of log2: the softmax scale and log2 e are folded in here. With x the
scaled query of a head, and A, S, mu, delta, c as in ``kv.format``,

    levels     x A^-1                                       meets s_t L[q]
    residual   delta x A^-1, or c x A^-1 S^T                meets the signs
    mean       see ``kv.rope_mean``

Rows n of a KV head are its query heads by tokens.

Shape suffixes: B sequences, M query heads, T query tokens, H KV heads, N query rows of a KV head,
D head width, R rotary pairs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq_kernels.kv.format import KVConstants
from rotq_kernels.kv.rope_mean import mean_query


@dataclass(kw_only=True)
class TurnedQuery:
    """Queries of one layer, ready for packed keys; fp32, scores in units of log2."""

    levels_BHND: Tensor
    residual_BHND: Tensor | None
    cosine_BHNR: Tensor | None
    """None where the mean does not turn."""
    sine_BHNR: Tensor | None
    constant_BHN: Tensor | None
    """None where no mean is removed."""


def turn_query(q_BMTD: Tensor, constants: KVConstants, *, scale: float) -> TurnedQuery:
    """Turn queries, after RoPE, into the bases of the packed keys.

    Args:
        q_BMTD: Any float dtype; computed in fp32.
        constants: Constants of the layer.
        scale: Of the scores, 1 / sqrt(D) as a rule.
    """
    H, D = constants.key.mean_HD.shape
    x_BHND = q_BMTD.float().reshape(q_BMTD.shape[0], H, -1, D) * (scale * math.log2(math.e))
    levels_BHND = x_BHND @ constants.key.inverse_HDD
    cosine_BHNR, sine_BHNR, constant_BHN = mean_query(x_BHND, constants)
    return TurnedQuery(
        levels_BHND=levels_BHND,
        residual_BHND=_residual_query(levels_BHND, constants),
        cosine_BHNR=cosine_BHNR,
        sine_BHNR=sine_BHNR,
        constant_BHN=constant_BHN,
    )


def _residual_query(levels_BHND: Tensor, constants: KVConstants) -> Tensor | None:
    """What meets the signs; they are multiplied by s_t, by g_t where that is stored."""
    form = constants.format
    if form.residual == "none":
        return None
    assert constants.residual_scale_H is not None
    weight_H11 = constants.residual_scale_H[:, None, None]
    if form.residual == "sign":
        return levels_BHND * weight_H11
    assert constants.sketch_DD is not None
    if form.norm == "none":
        # g_t is one number, and the signs will be multiplied by s_t, which is one number too
        assert constants.gamma_base_H is not None
        ratio_H = torch.exp2(constants.gamma_base_H - constants.key.base_H)
        weight_H11 = weight_H11 * ratio_H[:, None, None]
    return (levels_BHND @ constants.sketch_DD.mT) * weight_H11
