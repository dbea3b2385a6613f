"""Attention of a long chunk over its history made whole once, by torch.

From WHOLE_TOKENS queries on, unpacking a layer's history costs little beside the products, and the
library's attention is several times faster at those than a kernel that unpacks as it goes. Keys and
values of history and chunk lie one behind the other, so that there is one softmax and nothing to
merge. They live as long as a layer's attention: torch gives the next layer the same memory.

Only where queries see all that is before them (``Extent``): with a mask that is no mere diagonal
torch has no fast attention for groups of heads, and ``launch`` needs no mask.

Shape suffixes: B sequences, M query heads, T query tokens, H KV heads, N tokens before and of the
chunk, D head width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from rotq_kernels.kv.dequantize.launch import dequantize_kv
from rotq_kernels.kv.format import KVHistory

WHOLE_TOKENS = 256
"""Queries of a chunk, of all of a sequence's heads each."""


def is_whole(q_BMTD: Tensor, history: KVHistory) -> bool:
    """Whether a chunk's history is made whole: it is long, and torch's fast attention takes it."""
    extent, T = history.extent, q_BMTD.shape[2]
    if extent is None or history.dense is None or T < WHOLE_TOKENS:
        return False
    if history.window and extent.end > history.window:
        return False
    is_fast = q_BMTD.dtype in (torch.float16, torch.bfloat16)
    # what a residual gives to scores is no key
    return is_fast and (not extent.packed or history.pages.format.residual == "none")


def attend_whole(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, *, scale: float
) -> Tensor:
    """``packed_attention`` where ``is_whole``, unchecked; contiguous."""
    dense, extent, T = history.dense, history.extent, q_BMTD.shape[2]
    assert dense is not None
    assert extent is not None
    k_BHND, v_BHND = (
        x[:, :, extent.skipped :].to(q_BMTD.dtype) for x in (dense.k_BHND, dense.v_BHND)
    )
    if extent.packed:
        fresh = k_BHND.shape[2]
        both = dequantize_kv(history, extent.packed, fresh, q_BMTD.dtype)
        for whole, x in zip(both, (k_BHND, v_BHND), strict=True):
            whole[:, :, extent.packed :] = x
        k_BHND, v_BHND = both
    out_BMTD = F.scaled_dot_product_attention(
        q_BMTD,
        k_BHND,
        v_BHND,
        attn_mask=causal_lower_right(T, k_BHND.shape[2]),
        scale=scale,
        enable_gqa=True,
    )
    # padding sees its neighbours, and nobody sees it
    return out_BMTD.where((position_BT >= 0)[:, None, :, None], 0).contiguous()
