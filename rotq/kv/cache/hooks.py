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

from rotq.errors import RotqError
from rotq.kv.cache import attention


class WatchingCache(ABC):
    """A cache that is told of every forward pass of its decoder."""

    @abstractmethod
    def begin(self, decoder: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Before a pass with the arguments ``given``; returns those to use."""

    @abstractmethod
    def finish(self) -> None:
        """After a pass that did not fail."""


def attach(model: Any, name: str = attention.NAME) -> nn.Module:
    """Set the model's attention and put the hooks on its decoder, once; returns the decoder.

    Args:
        model: Of transformers.
        name: Of an attention that reads what the cache hands out.

    Raises:
        RotqError: the model does not dispatch its attention by name.
    """
    attention.register()
    model.set_attn_implementation(name)
    decoder: nn.Module = model.get_decoder()
    if attention_name(decoder) != name:
        raise RotqError(f"{type(model).__name__} does not let its attention be set")
    if _before not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
        decoder.register_forward_hook(_after, with_kwargs=True)
    return decoder


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
