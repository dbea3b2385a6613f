"""Attention that rotates and rounds its heads at run time, in any family.

What an attention module is to do is an attribute of it; a module without the attribute computes
what sdpa computes. Keys come from a cache as they went in, so that rounding them at each step is
rounding them once.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotq.errors import RotqError
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.models.attention import dispatch
from rotq.models.multimodal import text_model

ATTRIBUTE = "online_heads"

_ROUNDING = (dispatch.ONLINE, dispatch.OBSERVED, dispatch.ROWS, dispatch.MAPS, dispatch.POOLED)
"""Attentions that do what ``heads_of`` says."""


def heads_of(module: nn.Module) -> OnlineHeads:
    """What ``set_heads`` gave an attention module; nothing to do where it gave none."""
    return cast(OnlineHeads, getattr(module, ATTRIBUTE, UNTOUCHED))


def set_heads(attention: nn.Module, heads: OnlineHeads) -> None:
    """Let ``attention`` do this from now on; its model must ``use_online_attention``."""
    if not hasattr(attention, ATTRIBUTE):
        attention.register_forward_pre_hook(_check_dispatch)
    setattr(attention, ATTRIBUTE, heads)


def rounds_heads(model: nn.Module) -> bool:
    """Whether any attention of the model rounds its keys and values."""
    return any(heads_of(module).grid is not None for module in model.modules())


def use_online_attention(model: Any) -> None:
    """Direct a model's attention here; where no heads are set it computes what it did before.

    Args:
        model: Of transformers; with sdpa attention, parameters may be on meta. Of one of several
            parts the text decoder is directed.

    Raises:
        RotqError: another attention is wanted, or the model does not dispatch by name.
    """
    text: Any = text_model(model)
    wanted = text.config._attn_implementation
    if wanted not in ("sdpa", dispatch.ONLINE):
        raise RotqError(
            f"{type(model).__name__} uses {wanted} attention; rotating or rounding heads at run "
            "time works with sdpa attention only"
        )
    dispatch.register(dispatch.ONLINE, _attention)
    dispatch.use(text, dispatch.ONLINE)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    heads = heads_of(module).apply(query, key, value)
    return cast(tuple[Tensor, Tensor | None], sdpa(module, *heads, mask, **kw))


def _check_dispatch(module: nn.Module, _: Any) -> None:
    """Another attention would leave keys and values alone without a word; R3 it may leave out."""
    used = cast(Any, module.config)._attn_implementation
    if heads_of(module).grid is not None and used not in _ROUNDING:
        raise RotqError(
            f"the model rounds its keys and values (kv_cache.bits), which {used} attention does not"
        )
