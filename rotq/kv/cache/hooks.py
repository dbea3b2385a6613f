"""Which models a packed cache serves, and the hooks that tell it what a forward pass will add.

The hooks sit on the decoder, the module that receives the attention mask and the positions
together with the cache. They are put there once, do nothing for other caches, and know the cache
they meet by its class only.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rotq.errors import RotqError
from rotq.kv.cache import attention
from rotq.kv.calibration.file import KVCalibration, hash_config
from rotq.models.rotary import kv_shapes, rotaries


class WatchingCache(ABC):
    """A cache that is told of every forward pass of its decoder."""

    @abstractmethod
    def begin(self, decoder: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Before a pass with the arguments ``given``; returns those to use."""

    @abstractmethod
    def finish(self) -> None:
        """After a pass that did not fail."""


def windows(config: Any) -> list[int]:
    """Tokens that each layer's queries see, themselves included; 0 for all.

    Raises:
        RotqError: a layer that keeps something else than keys and values, or sees them otherwise.
    """
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise RotqError(f"{config.model_type}: no packed cache for chunked attention")
    found = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            found.append(0)
        elif type(layer) is DynamicSlidingWindowLayer:
            found.append(int(layer.sliding_window))
        else:
            raise RotqError(f"{config.model_type}: no packed cache for {type(layer).__name__}")
    return found


def check_decoder(model: Any) -> Any:
    """Refuse models that are no causal decoders with plain attention; returns the text's config.

    Raises:
        RotqError: this is one.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not getattr(config, "is_causal", True):
        raise RotqError(f"{config.model_type}: a packed cache is for causal decoders")
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise RotqError(f"{config.model_type}: packed attention cannot do {name}")
    return config


def check_served(model: Any, calibration: KVCalibration) -> None:
    """Refuse what a packed cache would serve wrongly.

    Raises:
        RotqError: the model is no causal decoder, its attention does what packed attention does
            not, or the calibration is another model's.
    """
    config = check_decoder(model)
    if calibration.model_hash != hash_config(model.config):
        raise RotqError("the calibration was made for another model; run rotq calibrate-kv")
    if sorted(calibration.layers) != list(range(len(kv_shapes(config)))):
        raise RotqError("the calibration does not hold every layer of the model")
    for index, rotary in enumerate(rotaries(config)):
        inv_freq_R = calibration.layers[index].inv_freq_R
        if inv_freq_R is None:
            continue
        if rotary is None or not torch.allclose(rotary.inv_freq_R, inv_freq_R.cpu(), rtol=1e-6):
            raise RotqError(
                f"{config.model_type}: the calibration removes a mean that turns with RoPE, and "
                f"layer {index} of the model is not known to turn like that"
            )


def attach(model: Any) -> nn.Module:
    """Set the model's attention and put the hooks on its decoder, once; returns the decoder.

    Raises:
        RotqError: the model does not dispatch its attention by name.
    """
    attention.register()
    model.set_attn_implementation(attention.NAME)
    decoder: nn.Module = model.get_decoder()
    if attention_name(decoder) != attention.NAME:
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
