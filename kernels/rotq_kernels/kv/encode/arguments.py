"""What ``rotq::encode_side`` takes: keys or values, what turns them into codes, where those go.

``torch.library`` knows tensors, numbers and strings, but no dataclasses: the operator takes the
fields of one, in their order.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, L levels, R rotary pairs, P pages,
S tokens of a page, W words of a token, C words of its signs.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.format import KVConstants, KVPages, SideConstants

SCHEMA = (
    "(Tensor x_BHTD, Tensor position_BT, Tensor slot_BT, Tensor matrix_HDD, Tensor mean_HD, "
    "Tensor levels_HL, Tensor thresholds_HL, Tensor base_H, Tensor unit_H, Tensor? inv_freq_R, "
    "Tensor? sketch_DD, Tensor? gamma_base_H, Tensor? metric_HDD, Tensor(a!) codes_PHSW, "
    "Tensor(b!)? norm_PHS, Tensor(c!)? sign_PHSC, Tensor(d!)? gamma_PHS, int bits, str gain, "
    "float rotary_scale, int search) -> ()"
)

WRITTEN = ("codes_PHSW", "norm_PHS", "sign_PHSC", "gamma_PHS")
"""Modified in place."""


@dataclass
class SideArguments:
    """Keys or values alone; names and meanings as ``SideConstants`` and ``KVPages`` have them."""

    x_BHTD: Tensor
    position_BT: Tensor
    slot_BT: Tensor
    matrix_HDD: Tensor
    mean_HD: Tensor
    levels_HL: Tensor
    thresholds_HL: Tensor
    base_H: Tensor
    unit_H: Tensor
    inv_freq_R: Tensor | None
    """None unless the mean turns."""
    sketch_DD: Tensor | None
    gamma_base_H: Tensor | None
    metric_HDD: Tensor | None
    codes_PHSW: Tensor
    norm_PHS: Tensor | None
    sign_PHSC: Tensor | None
    gamma_PHS: Tensor | None
    bits: int
    gain: str
    rotary_scale: float
    search: int

    def flat(self) -> list[Any]:
        """The fields in their order."""
        return [getattr(self, field.name) for field in fields(self)]


def side_arguments(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    constants: KVConstants,
    pages: KVPages,
) -> tuple[SideArguments, SideArguments]:
    """Of keys and of values, from the arguments of ``encode_kv``."""
    form, key = pages.format, constants.key
    is_turned, has_sketch = constants.mean == "rope", form.residual == "qjl"
    keys = SideArguments(
        x_BHTD=k_BHTD,
        position_BT=position_BT,
        slot_BT=slot_BT,
        mean_HD=torch.zeros_like(key.mean_HD) if constants.mean == "none" else key.mean_HD,
        inv_freq_R=constants.inv_freq_R if is_turned else None,
        rotary_scale=constants.rotary_scale,
        sketch_DD=constants.sketch_DD if has_sketch else None,
        gamma_base_H=constants.gamma_base_H if has_sketch else None,
        codes_PHSW=pages.k_codes,
        norm_PHS=pages.k_norm,
        sign_PHSC=pages.k_sign,
        gamma_PHS=pages.k_gamma,
        bits=form.k_bits,
        **_constants_of(key),
    )
    values = SideArguments(
        x_BHTD=v_BHTD,
        position_BT=position_BT,
        slot_BT=slot_BT,
        mean_HD=constants.value.mean_HD,
        inv_freq_R=None,
        rotary_scale=1.0,
        sketch_DD=None,
        gamma_base_H=None,
        codes_PHSW=pages.v_codes,
        norm_PHS=pages.v_norm,
        sign_PHSC=None,
        gamma_PHS=None,
        bits=form.v_bits,
        **_constants_of(constants.value),
    )
    return keys, values


def _constants_of(side: SideConstants) -> dict[str, Any]:
    names = ("matrix_HDD", "levels_HL", "thresholds_HL", "base_H", "unit_H", "gain", "search")
    found = {name: getattr(side, name) for name in names}
    return found | {"metric_HDD": side.metric_HDD if side.search else None}
