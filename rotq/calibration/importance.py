"""How much each calibration token counts in a block's Hessians.

Scores (RSQ, arXiv 2503.01820, section 4), larger is more important:

    attention              a_j = sum over heads and queries i of A[i, j], divided by the number of
                           queries that can see key j
    first_n                1 for the first share of the window, else 0
    token_frequency        - count of the token in the calibration set
    activation_norm        |x_j|
    activation_difference  - |x_j - block(x)_j|
    token_similarity       mean_i |x_j - x_i|^2 over the window: unlike the others is important

Weights: r = floor + (1 - floor) (score - low) / (high - low), clamped, to the power p, then divided
by the window's mean so that every window keeps the same mass. low and high are the window's minimum
and maximum (minmax), its 1 % and 99 % quantiles (quantile), or minimum and maximum of the tokens
below the 99 % quantile (sink): one attention sink would otherwise push all others to the floor.
Padding has weight 0 and is not looked at. Special tokens, the sinks of protein models, keep
weight 1 and leave low and high to the others.
Shape suffixes: B windows, T positions, D hidden size, H heads, d head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rotq.calibration.batches import Batch
from rotq.recipe import Importance

QUERY_BLOCK = 128


def weights_from_scores(
    score_BT: Tensor, importance: Importance, batch: Batch | None = None
) -> Tensor:
    """Scale scores to weights with mean 1 over the tokens of every window; (B, T) fp32.

    A window whose scores are all equal gets all ones.

    Args:
        batch: Where padding and special tokens are; None where there are none.
    """
    score_BT = score_BT.float()
    mask_BT = special_BT = None
    if batch is not None:
        mask_BT, special_BT = batch.mask_BT, batch.special_BT
    ranked_BT = torch.ones_like(score_BT, dtype=torch.bool)
    real_BT = ranked_BT if mask_BT is None else mask_BT.to(score_BT.device).bool()
    if special_BT is not None:
        ranked_BT = ~special_BT.to(score_BT.device)
    low_B1, high_B1 = _range(score_BT, ranked_BT & real_BT, importance.scaling)
    unit_BT = ((score_BT - low_B1) / (high_B1 - low_B1).clamp(min=1e-30)).clamp(0, 1)
    unit_BT = torch.where(ranked_BT & (high_B1 > low_B1), unit_BT, 1.0)
    weight_BT = (importance.floor + (1 - importance.floor) * unit_BT) ** importance.power
    weight_BT = weight_BT * real_BT
    return weight_BT / (weight_BT.sum(-1, keepdim=True) / real_BT.sum(-1, keepdim=True))


def _range(score_BT: Tensor, ranked_BT: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    low_B1 = score_BT.masked_fill(~ranked_BT, torch.inf).amin(-1, keepdim=True)
    if scaling == "minmax":
        return low_B1, score_BT.masked_fill(~ranked_BT, -torch.inf).amax(-1, keepdim=True)
    known_BT = score_BT.masked_fill(~ranked_BT, torch.nan)
    top_B1 = known_BT.nanquantile(0.99, dim=-1, keepdim=True)
    if scaling == "quantile":
        return known_BT.nanquantile(0.01, dim=-1, keepdim=True), top_B1
    if scaling == "sink":
        kept_BT = torch.where(known_BT <= top_B1, score_BT, -torch.inf)
        return low_B1, kept_BT.amax(-1, keepdim=True)
    raise ValueError(f"unknown scaling {scaling!r}; known: minmax, quantile, sink")


def hidden_score(
    strategy: str, hidden_BTD: Tensor, output: Callable[[], Tensor], first_n: float
) -> Tensor:
    """Scores that only need hidden states; (B, T) fp32.

    Args:
        strategy: "first_n", "activation_norm", "activation_difference" or "token_similarity".
        hidden_BTD: Input of the block.
        output: Gives the block's output, (B, T, D); called only if needed.
        first_n: Share of the window that "first_n" favours.

    Raises:
        ValueError: unknown strategy.
    """
    hidden_BTD = hidden_BTD.float()
    if strategy == "first_n":
        B, T, _ = hidden_BTD.shape
        return (torch.arange(T, device=hidden_BTD.device) < first_n * T).float().expand(B, T)
    if strategy == "activation_norm":
        return hidden_BTD.norm(dim=-1)
    if strategy == "activation_difference":
        return -(hidden_BTD - output().float()).norm(dim=-1)
    if strategy == "token_similarity":
        # mean_i |x_j - x_i|^2 = |x_j|^2 - 2 x_j . mean(x) + mean |x|^2
        square_BT = hidden_BTD.square().sum(-1)
        dot_BT = (hidden_BTD * hidden_BTD.mean(1, keepdim=True)).sum(-1)
        return square_BT - 2 * dot_BT + square_BT.mean(-1, keepdim=True)
    raise ValueError(f"unknown strategy {strategy!r}")


def frequency_score(ids_BT: Tensor, counts_V: Tensor) -> Tensor:
    """Minus the count of each token in the calibration set; (B, T) fp32."""
    return -counts_V[ids_BT].float()


def attention_received(
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    real_BT: Tensor | None = None,
) -> Tensor:
    """Attention mass each key receives, per query that can see it; (B, T) fp32, summed over heads.

    Column sums of the softmax in blocks of queries: no T x T matrix is kept.

    Args:
        query_BHTd: After rotary embedding.
        key_BHTd: The same number of heads as the queries, or a divisor of it (GQA).
        scale: Of the dot products.
        mask: Boolean (True is seen) or additive, broadcast to (B, H, T, T); None is none.
        causal: Apply the causal mask; use with ``mask=None``.
        real_BT: True where a query counts; others are padding.
    """
    B, H, T, _ = query_BHTd.shape
    key_BHTd = key_BHTd.repeat_interleave(H // key_BHTd.shape[1], dim=1)
    received_BT = torch.zeros(B, T, device=query_BHTd.device)
    seen_BT = torch.zeros(B, T, device=query_BHTd.device)
    position_T = torch.arange(T, device=query_BHTd.device)
    for start in range(0, T, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, T))
        logits = (query_BHTd[:, :, rows] @ key_BHTd.transpose(-1, -2)).float() * scale
        visible = torch.ones(B, 1, logits.shape[2], T, dtype=torch.bool, device=logits.device)
        if mask is not None:
            part = mask[..., rows, :T]
            visible = visible & (part if part.dtype == torch.bool else part > -1e4)
        elif causal:
            visible = visible & (position_T[None, :] <= position_T[rows, None])
        if real_BT is not None:
            visible = visible & real_BT[:, None, rows, None]
        logits = logits.masked_fill(~visible, -torch.inf)
        attention = logits.softmax(-1).nan_to_num(0.0)  # a fully masked row attends to nothing
        received_BT += attention.sum((1, 2))
        seen_BT += visible.sum((1, 2))
    return received_BT / seen_BT.clamp(min=1)
