"""The attention mask of a forward pass as a packed cache needs it: which columns are tokens.

As a rule a decoder is given that. Some multimodal models build the mask in front of their decoder,
one for each kind of layer, and may let the tokens of an image see each other. A causal mask says in
its last row which columns are tokens; packed attention can do no other.

Shape suffixes: B sequences, T new tokens, N columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError


def plain_mask(mask: Any, length: int) -> Tensor | None:
    """The mask (B, N) over all columns, the new ones last; None if all are tokens.

    Args:
        mask: What a decoder is given: that, one (B, 1, T, N), bool, or a dictionary of such.
        length: T.

    Raises:
        RotqError: it is something else, or not causal.
    """
    if isinstance(mask, dict):
        # without padding and images there is none to build
        whole = mask.get("full_attention", mask)
        mask = None if all(one is None for one in mask.values()) else whole
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 4:
        raise RotqError("PackedCache needs a plain 2-D attention mask")
    mask_BTN, there_BN = mask[:, 0], mask[:, 0, -1]
    before = there_BN.shape[1] - length
    causal_TN = torch.ones(mask_BTN.shape[1:], dtype=torch.bool, device=mask.device).tril(before)
    is_query_BT = there_BN[:, before:]
    differs_BTN = (mask_BTN != (causal_TN & there_BN[:, None])) & is_query_BT[..., None]
    if bool(differs_BTN.any()):
        raise RotqError(
            "packed attention is causal, and in this pass tokens see later ones, as those of an "
            "image do"
        )
    return there_BN
