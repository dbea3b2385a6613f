"""What a model is known by, so that what was found for it is used for no other.

``hash_config`` says which shapes and positions keys and values have; ``hash_model`` says which
model it is, weights included. Reading every weight would take longer than some calibrations, so of
each tensor 1024 elements count: training, merging or rounding leaves hardly any as it was.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from rotq.models.rotary import layer_configs

_HASHED = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "layer_types",
    "sliding_window",
)

_ELEMENTS = 1024
"""Of each tensor."""


def hash_config(config: Any) -> str:
    """sha256 over what decides the shape and position of keys and values."""
    config = config.get_text_config(decoder=True)
    values = {name: _value(config, name) for name in _HASHED}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_model(model: Any) -> str | None:
    """sha256 over the configuration and every tensor's name, shape, dtype and 1024 elements.

    None for a model that is not in memory, parts of which accelerate reads when they are needed.
    """
    digest = hashlib.sha256(hash_config(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # an odd step, or all that counts of a matrix could lie in one column
        sample_N = tensor.detach().flatten()[:: tensor.numel() // _ELEMENTS | 1]
        digest.update(sample_N.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _value(config: Any, name: str) -> Any:
    """Of the configuration, or of every layer where they differ in it."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in layer_configs(config)]
    return getattr(config, name, None)
