"""How a model turns its keys to their positions, and how many keys a layer keeps.

RoPE turns pair i of a key at position t by the angle t theta_i and multiplies by the attention
factor a. Half-split models pair elements i and i + R, and leave elements from 2 R on alone:

    k_t[i]     = a (x[i] cos(t theta_i) - x[i + R] sin(t theta_i))
    k_t[i + R] = a (x[i + R] cos(t theta_i) + x[i] sin(t theta_i))

Shape suffixes: T positions, D head width, R rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotq.errors import RotqError
from rotq.models.sizes import head_dim

HALF_SPLIT = {
    "esm",
    "gemma2",
    "gemma3_text",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "stablelm",
}
"""``model_type`` of families that are known to pair elements i and i + R in every layer."""

POSITIONS_FROM_MASK = {"opt"}
"""``model_type`` of decoders that count tokens in the mask where no positions are given."""

_FIXED_TYPES = {"default", "linear", "llama3", "yarn"}
"""RoPE types whose frequencies do not depend on the length of the sequence."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Half-split RoPE of one layer."""

    inv_freq_R: Tensor
    """fp32, radians per position."""
    scale: float = 1.0
    """Attention factor on cosine and sine; elements that are not turned do not get it."""

    def turn(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn rows to their positions.

        Args:
            x: (..., D), floating point.
            position: Integers that broadcast over the rows of ``x``.
        """
        R = self.inv_freq_R.numel()
        angle = position[..., None].double() * self.inv_freq_R.to(position.device).double()
        cos, sin = (self.scale * angle.cos()).to(x.dtype), (self.scale * angle.sin()).to(x.dtype)
        first, second, rest = x[..., :R], x[..., R : 2 * R], x[..., 2 * R :]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        if not rest.shape[-1]:
            return turned
        return torch.cat((turned, rest.expand(*turned.shape[:-1], -1)), dim=-1)

    def turn_back(self, x: Tensor, position: Tensor) -> Tensor:
        """The inverse of ``turn``."""
        return Rotary(inv_freq_R=self.inv_freq_R, scale=1 / self.scale).turn(x, -position)


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What one layer keeps per token."""

    num_heads: int
    """KV heads."""
    head_dim: int
    group: int
    """Query heads per KV head."""


def kv_shapes(config: Any, *, packed: bool = True) -> list[KVShape]:
    """Of every layer, from the configuration of a text decoder.

    Args:
        config: transformers' configuration.
        packed: Only widths that can be packed.

    Raises:
        RotqError: the configuration does not say, or heads do not divide.
    """
    config = _text(config)
    try:
        return [_kv_shape(layer, packed) for layer in layer_configs(config)]
    except AttributeError as error:
        raise RotqError(f"{config.model_type}: not a decoder with a KV cache ({error})") from None


def _kv_shape(config: Any, packed: bool) -> KVShape:
    """Of a layer with this configuration."""
    num_queries, width = config.num_attention_heads, head_dim(config)
    num_heads = getattr(config, "num_key_value_heads", None) or num_queries
    if hasattr(config, "multi_query"):  # GPT-BigCode's own word for it
        num_heads = 1 if config.multi_query else num_queries
    if num_queries % num_heads or (packed and width % 8):
        needs = "packed cache needs whole groups and a width that is a multiple of 8"
        raise RotqError(
            f"{config.model_type}: {num_queries} query heads on {num_heads} KV heads of width "
            f"{width}; a {needs if packed else 'cache needs whole groups'}"
        )
    return KVShape(num_heads=num_heads, head_dim=width, group=num_queries // num_heads)


def rotaries(config: Any) -> list[Rotary | None]:
    """RoPE of every layer; None where it is not known to be half-split with fixed frequencies."""
    config = _text(config)
    num_layers = config.num_hidden_layers
    if config.model_type not in HALF_SPLIT:
        return [None] * num_layers
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:  # ESM-2's configuration is older than the dictionary
        if config.position_embedding_type != "rotary":
            return [None] * num_layers
        parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    layers = layer_configs(config)
    if "rope_type" in parameters:
        return [_rotary(layer, parameters, None) for layer in layers]
    kinds = zip(layers, config.layer_types, strict=True)
    return [
        _rotary(layer, parameters[kind], kind) if parameters.get(kind) else None
        for layer, kind in kinds
    ]


def _rotary(config: Any, parameters: dict[str, Any], layer_type: str | None) -> Rotary | None:
    kind = parameters["rope_type"]
    if kind not in _FIXED_TYPES:
        return None
    if kind != "default":
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type)
        return Rotary(inv_freq_R=inv_freq.float(), scale=float(scale))
    width = int(head_dim(config) * parameters.get("partial_rotary_factor", 1.0))
    exponent_R = torch.arange(0, width, 2, dtype=torch.float32) / width
    return Rotary(inv_freq_R=1.0 / parameters["rope_theta"] ** exponent_R)


def layer_configs(config: Any) -> list[Any]:
    """The configuration that each layer of a text decoder has; as a rule all have the same."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
