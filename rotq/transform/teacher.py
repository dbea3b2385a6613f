"""What the training aims at: likely tokens of the original model, and the loss against them.

KL-Top (OSTQuant, arXiv 2501.13987, eq. 9, the released code's ``post_attn`` form): with I the k
most likely tokens of the original model, and both distributions over the whole vocabulary,

    loss = mean_t sum_{j in I} p_j (log p_j - log q_j),
    d loss / d logit_j = (m q_j - p_j 1[j in I]) / T,     m = sum_{j in I} p_j

log p_j of I is all that is kept of the original model. Cross-entropy to the text's own tokens is
the case of one token with p = 1.

Shape suffixes: B windows, T positions, C positions of a chunk, D hidden size, V vocabulary,
k likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.devices import double
from rotq.models.streaming import through_head

TRAINED_POSITIONS = 128
"""Positions whose logits the training of a basis holds at a time."""

Logits = Callable[[Tensor], Tensor]
"""Hidden states behind the last block, (B, C, D), to logits (B, C, V)."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Of one window."""

    token_Tk: Tensor
    """int32."""
    log_p_Tk: Tensor
    """fp32."""


def likely_tokens(logits_TV: Tensor, k: int) -> Targets:
    """The k most likely tokens of every position (all, if the vocabulary has fewer)."""
    logits_TV = logits_TV.float()
    top = logits_TV.topk(min(k, logits_TV.shape[-1]), dim=-1)
    log_p_Tk = top.values - logits_TV.logsumexp(-1, keepdim=True)
    return Targets(token_Tk=top.indices.int(), log_p_Tk=log_p_Tk)


def likely_from(logits: Logits, hidden_BTD: Tensor, k: int) -> Targets:
    """``likely_tokens`` of one window (1, T, D), some positions at a time."""
    chunks = hidden_BTD.split(TRAINED_POSITIONS, dim=1)
    parts = [likely_tokens(logits(chunk_BCD)[0], k) for chunk_BCD in chunks]
    return Targets(
        token_Tk=torch.cat([part.token_Tk for part in parts]).cpu(),
        log_p_Tk=torch.cat([part.log_p_Tk for part in parts]).cpu(),
    )


def next_tokens(ids_T: Tensor) -> Targets:
    """The text itself; the last position has no next token and gets probability zero."""
    log_p_T1 = torch.zeros(len(ids_T), 1)
    log_p_T1[-1] = -torch.inf
    return Targets(token_Tk=ids_T.roll(-1)[:, None].int(), log_p_Tk=log_p_T1)


def loss_and_slope(logits_CV: Tensor, targets: Targets) -> tuple[float, Tensor]:
    """KL-Top summed over positions in nats, and its slope at the logits, fp32."""
    log_q_CV = logits_CV.float().log_softmax(-1)
    token_Ck = targets.token_Tk.to(logits_CV.device).long()
    log_p_Ck = targets.log_p_Tk.to(logits_CV.device)
    p_Ck = log_p_Ck.exp()
    log_q_Ck = log_q_CV.gather(-1, token_Ck)
    total = float(double(torch.where(p_Ck > 0, p_Ck * (log_p_Ck - log_q_Ck), 0.0)).sum())
    slope_CV = log_q_CV.exp_().mul_(p_Ck.sum(-1, keepdim=True))
    return total, slope_CV.scatter_add_(-1, token_Ck, -p_Ck)


def head_loss(logits: Logits, hidden_BTD: Tensor, targets: Targets) -> tuple[float, Tensor]:
    """Mean loss of one window in nats per token, and its slope at the last block's output.

    Gradients of what ``logits`` is made of are added to it.
    """
    positions = hidden_BTD.shape[1]
    losses: list[float] = []

    def slope(logits_BCV: Tensor, some: slice) -> Tensor:
        part = Targets(token_Tk=targets.token_Tk[some], log_p_Tk=targets.log_p_Tk[some])
        loss, slope_CV = loss_and_slope(logits_BCV[0], part)
        losses.append(loss / positions)
        return (slope_CV / positions)[None]

    slope_BTD = through_head(logits, hidden_BTD, TRAINED_POSITIONS, slope)
    return sum(losses), slope_BTD
