"""Put another function in the place of a model's attention, for windows without padding.

It is called after RoPE, with the keys and values that a cache would hold. What the replacement
cannot honour is refused.

Shape suffixes: B windows, T positions, H query heads, K KV heads, G query heads per KV head,
Q queries of a chunk, S keys up to the last of them, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.models.attention import dispatch

_MASKED = -1e30

_UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias")
"""Arguments of attention that change its result."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One layer's attention on whole windows; token j is at position j."""

    layer: int
    q_BHTD: Tensor
    """After RoPE."""
    k_BKTD: Tensor
    v_BKTD: Tensor
    scale: float
    window: int
    """Keys that a query sees, itself included; 0 for all."""


Attention = Callable[[AttentionCall], Tensor]
"""Gives (B, T, H, D)."""


@contextmanager
def replaced_attention(model: Any, attention: Attention) -> Iterator[None]:
    """Run ``attention`` for every layer of a decoder inside the context.

    Args:
        model: A causal language model of transformers; called without padding and cache.
        attention: Gets the layers in any order.

    Raises:
        RotqError: the model's attention is not replaceable by name, or takes what an
            ``AttentionCall`` does not hold.
    """

    def run(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        _check(module, query, key, value, kw)
        scale = kw.get("scaling")
        call = AttentionCall(
            layer=int(module.layer_idx),  # type: ignore[arg-type]
            q_BHTD=query,
            k_BKTD=key,
            v_BKTD=value,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            window=int(kw.get("sliding_window") or 0),
        )
        return attention(call).contiguous(), None

    dispatch.register(dispatch.REPLACED, run, mask=_no_mask)
    with dispatch.used(model, dispatch.REPLACED):
        yield


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality and the window are the replacement's to keep."""


def _check(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, kw: dict[str, Any]) -> None:
    name = type(module).__name__
    if getattr(module, "layer_idx", None) is None:
        raise RotqError(f"{name} does not know its layer; only decoders have a KV cache")
    if not getattr(module, "is_causal", True):
        raise RotqError(f"{name} is not causal; only decoders have a KV cache")
    if k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise RotqError(f"{name}: keys {tuple(k.shape)} and values {tuple(v.shape)} differ")
    for key in _UNKNOWN:
        if kw.get(key) is not None:
            raise RotqError(f"{name}: attention with {key} is not supported")


def visible(first: int, num_queries: int, window: int, device: Any = None) -> Tensor:
    """Which keys 0 .. first + Q - 1 the queries from ``first`` on see: bool (Q, S)."""
    key_S = torch.arange(first + num_queries, device=device)
    age_QS = torch.arange(first, first + num_queries, device=device)[:, None] - key_S
    seen_QS = age_QS >= 0
    return seen_QS & (age_QS < window) if window else seen_QS


def probabilities(score_BKGQS: Tensor, visible_QS: Tensor) -> Tensor:
    """Softmax over the visible keys; the scores are overwritten."""
    return score_BKGQS.masked_fill_(~visible_QS, _MASKED).softmax(-1)


def attend(q_BKGQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, visible_QS: Tensor) -> Tensor:
    """(B, K, G, Q, D) of scaled queries."""
    p_BKGQS = probabilities(q_BKGQD @ k_BKSD[:, :, None].mT, visible_QS)
    return p_BKGQS @ v_BKSD[:, :, None]
