"""The attention that reads packed keys and values, under transformers' own dispatch.

``Cache.update`` must return keys and values as tensors. A packed cache returns a handle instead: a
tensor without storage that has the logical shape and carries what the attention needs. The
attention registered here recognises it and reads codes; any operation on the handle itself is an
error, so that no other attention can take it for a dense cache. Without a handle, that is for all
other caches and for none, this is sdpa.

Shape suffixes: B sequences, M query heads, T query tokens, N dense tokens, H KV heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotq.autocast import lowered, switched_off
from rotq.errors import RotqError
from rotq.kv.cache.layout import Layout
from rotq.ops import KVHistory, packed_attention

NAME = "rotq_packed"
"""In ``config._attn_implementation``."""


class Readable(Protocol):
    """What a handle carries: keys and values that the attention here can read."""

    @property
    def window(self) -> int:
        """Of sliding attention in tokens; 0 for none."""

    def attend(self, query_BMTD: Tensor, scale: float) -> Tensor:
        """Attention of the fresh tokens."""


@dataclass(kw_only=True)
class Visible:
    """What the queries of one layer can see in one forward pass."""

    history: KVHistory
    """Its dense tokens are sinks, the recent window and the fresh tokens."""
    layout: Layout
    was_read: bool = False

    @property
    def window(self) -> int:
        """Of sliding attention in tokens; 0 for none."""
        return self.history.window

    def attend(self, query_BMTD: Tensor, scale: float) -> Tensor:
        """Attention of the fresh tokens; zeros for padding."""
        self.was_read = True
        position_BT = self.layout.query_position_BT
        return packed_attention(query_BMTD, position_BT, self.history, scale=scale)


class PackedKV(torch.Tensor):
    """The handle: a tensor without content, (B, H, columns, D) in the model's dtype."""

    visible: Readable | None

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], like: Tensor, visible: Readable | None = None
    ) -> PackedKV:
        """A handle of ``shape``, with the dtype and on the device of ``like``.

        Args:
            visible: None for one that has a shape only.
        """
        handle: PackedKV = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        handle.visible = visible
        return handle

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise RotqError(
            f"packed keys and values met {func}: they can only be read by the attention "
            f"{NAME!r}, which PackedCache sets; this model changes keys after the cache"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedKV{tuple(self.shape)}"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (B, M, T, D) to (B, T, M, D), no weights.

    A model that knows no cache, as ESM, hands one on to its attention among the keywords.

    Raises:
        RotqError: the model asks for what packed attention does not do.
    """
    cache = kwargs.pop("past_key_values", None)
    if cache is not None and not isinstance(key, PackedKV):
        key, value = cache.update(key, value, module.layer_idx)
    if not isinstance(key, PackedKV):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        result: tuple[Tensor, Tensor | None] = sdpa(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    visible = key.visible
    if visible is None:
        raise RotqError("keys of a PackedCache's layer have a shape only; pass the cache itself")
    _check(module, visible, kwargs)
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = lowered(query)
    with switched_off(query.device):
        out_BMTD = visible.attend(query, scale)
    return out_BMTD.transpose(1, 2).contiguous(), None


def _check(module: nn.Module, visible: Readable, kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise RotqError(f"packed attention has no {name}; this model cannot use PackedCache")
    if module.training and kwargs.get("dropout"):
        raise RotqError("PackedCache is for inference; call model.eval()")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise RotqError("packed attention is causal; this model's is not")
    window = kwargs.get("sliding_window")
    if window is not None and window != visible.window:
        raise RotqError(
            f"layer {getattr(module, 'layer_idx', '?')} attends to {window} tokens, its packed "
            f"layer was made for {visible.window or 'all'}"
        )


def register() -> None:
    """Make ``NAME`` known to transformers; may be repeated."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
