"""The hooks that tell a packed cache what a forward pass will add.

They sit on the decoder, the module that receives the attention mask and the positions together with
the cache. They are put there once, do nothing for other caches, and know the cache they meet by its
class only.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rotq.kv.cache import attention
from rotq.models.attention import dispatch
from rotq.models.multimodal import text_model


class WatchingCache(ABC):
    """A cache that is told of every forward pass of its decoder."""

    @abstractmethod
    def begin(self, decoder: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Before a pass with the arguments ``given``; returns those to use."""

    @abstractmethod
    def finish(self) -> None:
        """After a pass that did not fail."""


def attach(model: Any, trial: Callable[[nn.Module], None], name: str = attention.NAME) -> nn.Module:
    """Set the model's attention and put the hooks on its decoder, once; returns the decoder.

    Args:
        model: Of transformers.
        trial: Called with the decoder when it has just got its hooks; if it raises, the model is
            left as it was.
        name: Of an attention that reads what the cache hands out.

    Raises:
        RotqError: the model does not dispatch its attention by name, or the trial's.
    """
    attention.register()
    before, decoder = dispatch.names(model), _decoder_of(model)
    try:
        dispatch.use(text_model(model), name)
        if _before not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
            decoder.register_forward_hook(_after, with_kwargs=True)
            trial(decoder)
    except BaseException:
        dispatch.put_back(before)
        _detach(decoder)
        raise
    return decoder


def _decoder_of(model: Any) -> nn.Module:
    """What receives mask, positions and cache; some models have another module called decoder."""
    decoder: nn.Module = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def _detach(decoder: nn.Module) -> None:
    for hooks, own in ((decoder._forward_pre_hooks, _before), (decoder._forward_hooks, _after)):
        for number in [number for number, hook in hooks.items() if hook is own]:
            del hooks[number]


def attention_name(decoder: Any) -> str:
    """The attention that a decoder dispatches to."""
    name: str = decoder.config._attn_implementation
    return name


def _before(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    given = _by_name(decoder.forward, args, kwargs)
    cache = given.get("past_key_values")
    if not isinstance(cache, WatchingCache):
        return None
    return (), cache.begin(decoder, given)


def _after(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    cache = _by_name(decoder.forward, args, kwargs).get("past_key_values")
    if isinstance(cache, WatchingCache):
        cache.finish()


def _by_name(forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(forward).parameters) if args else []
    return dict(zip(names, args, strict=False)) | kwargs
