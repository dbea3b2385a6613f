"""The attention over the pages of a pool, under transformers' own dispatch.

Over packed pages it is that of ``PackedCache``, and keys and values that the model would round
itself are packed instead. Over dense pages it is the model's own, and refuses less: heads are
rotated and rounded as the model says, scores may be capped, and a head may have a logit that takes
part in the softmax alone (a sink).

Shape suffixes: B sequences, M query heads, H KV heads, T query tokens, N keys, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotq.errors import RotqError
from rotq.kv.cache.attention import PackedKV
from rotq.kv.cache.attention import attention as packed
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.models.attention import dispatch
from rotq.models.attention.online import heads_of

_UNKNOWN = ("position_bias", "head_mask")
"""Arguments that change the result in a way that is not done here."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What one attention does beside the usual."""

    heads: OnlineHeads = UNTOUCHED
    softcap: float | None = None
    """Scores s become softcap tanh(s / softcap)."""
    sink_M: Tensor | None = None
    """A logit of each head, whose share of the softmax goes to nothing."""

    def attend(
        self, q_BMTD: Tensor, k_BHND: Tensor, v_BHND: Tensor, seen_TN: Tensor | None, scale: float
    ) -> Tensor:
        """Attention over whole keys and values, (B, M, T, D).

        Args:
            q_BMTD: As the model made them, like keys and values.
            k_BHND: See above.
            v_BHND: See above.
            seen_TN: Which keys a query sees, or what is added to scores; None for causal.
            scale: On scores.
        """
        q_BMTD, k_BHND, v_BHND = self.heads.apply(q_BMTD, k_BHND, v_BHND)
        if self.softcap is None and self.sink_M is None:
            causal = seen_TN is None and q_BMTD.shape[2] > 1
            return F.scaled_dot_product_attention(
                q_BMTD,
                k_BHND,
                v_BHND,
                attn_mask=seen_TN,
                scale=scale,
                is_causal=causal,
                enable_gqa=True,
            )
        group = q_BMTD.shape[1] // k_BHND.shape[1]
        score = scale * (q_BMTD @ k_BHND.repeat_interleave(group, 1).mT).float()
        if self.softcap is not None:
            score = self.softcap * (score / self.softcap).tanh()
        p_BMTN = self._softmax(_masked(score, seen_TN)).to(v_BHND.dtype)
        return p_BMTN @ v_BHND.repeat_interleave(group, 1)

    def _softmax(self, score_BMTN: Tensor) -> Tensor:
        if self.sink_M is None:
            return score_BMTN.softmax(-1)
        B, _, T, N = score_BMTN.shape
        sink_BMT1 = self.sink_M.float()[None, :, None, None].expand(B, -1, T, 1)
        return torch.cat((score_BMTN, sink_BMT1), dim=-1).softmax(-1)[..., :N]


PLAIN = Extras()


class Whole(ABC):
    """Whole keys and values that a pool hands to the attention."""

    window: int
    """Of sliding attention in tokens; 0 for none."""

    @abstractmethod
    def attend(self, query_BMTD: Tensor, scale: float, extras: Extras = PLAIN) -> Tensor:
        """Attention of the fresh tokens."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface, on handles of a pool and on whole keys and values.

    Raises:
        RotqError: the model asks for what is not done here.
    """
    if isinstance(key, PackedKV) and not isinstance(key.visible, Whole):
        return packed(module, query, key, value, mask, **kw)
    for name in _UNKNOWN:
        if kw.get(name) is not None:
            raise RotqError(f"{type(module).__name__}: attention with {name} is not served")
    if not getattr(module, "is_causal", True) or kw.get("is_causal") is False:
        raise RotqError(f"{type(module).__name__}: its attention is not causal")
    scale = kw.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    extras = Extras(heads=heads_of(module), softcap=kw.get("softcap"), sink_M=kw.get("s_aux"))
    if isinstance(key, PackedKV):
        assert isinstance(key.visible, Whole)
        window = kw.get("sliding_window")
        if window is not None and window != key.visible.window:
            raise RotqError(f"{type(module).__name__}: a layer attends to another window, {window}")
        out = key.visible.attend(query, scale, extras)
    else:
        out = extras.attend(query, key, value, mask, scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make it known to transformers; may be repeated."""
    dispatch.register(dispatch.POOLED, attention)


def _masked(score_BMTN: Tensor, seen_TN: Tensor | None) -> Tensor:
    if seen_TN is None:
        T, N = score_BMTN.shape[-2:]
        seen_TN = torch.ones(T, N, dtype=torch.bool, device=score_BMTN.device).tril(N - T)
    if seen_TN.dtype != torch.bool:
        return score_BMTN + seen_TN
    return score_BMTN.masked_fill(~seen_TN, float("-inf"))
