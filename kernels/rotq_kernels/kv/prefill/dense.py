"""Attention of a chunk of queries to dense tokens alone, by torch: nothing is packed yet.

The library's attention is faster than any kernel of ours where there are no codes to unpack. What a
query sees is a mask, of MASK_ROWS queries at a time.

Shape suffixes: B sequences, M query heads, T query tokens, H KV heads, N dense tokens, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rotq_kernels.kv.format import DenseKV

MASK_ROWS = 2048
"""Queries whose mask is made at a time."""


def attend_dense(
    q_BMTD: Tensor, position_BT: Tensor, dense: DenseKV, *, scale: float, window: int
) -> Tensor:
    """``packed_attention`` of a history without packed tokens, unchecked; contiguous."""
    there_B1N1 = (dense.position_BN >= 0)[:, None, :, None]
    # what is at no position must not be multiplied
    group = q_BMTD.shape[1] // dense.k_BHND.shape[1]
    # of every query head: with a mask, torch's fast attention takes no groups
    k_BMND, v_BMND = (
        x.to(q_BMTD.dtype).masked_fill(~there_B1N1, 0).repeat_interleave(group, dim=1)
        for x in (dense.k_BHND, dense.v_BHND)
    )
    parts = []
    for t in range(0, q_BMTD.shape[2], MASK_ROWS):
        turn = slice(t, t + MASK_ROWS)
        position_BN = dense.position_BN[:, None]
        ahead_BTN = position_BT[:, turn, None] - position_BN
        seen_BTN = (position_BN >= 0) & (ahead_BTN >= 0)
        if window:
            seen_BTN &= ahead_BTN < window
        out_BMTD = F.scaled_dot_product_attention(
            q_BMTD[:, :, turn], k_BMND, v_BMND, attn_mask=seen_BTN[:, None], scale=scale
        )
        # a row that sees nothing may be NaN
        parts.append(out_BMTD.where(seen_BTN.any(-1)[:, None, :, None], 0))
    return torch.cat(parts, dim=2).contiguous()
