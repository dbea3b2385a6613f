"""How many tokens and positions a model has tables for.

A table of positions is an embedding or a buffer that is named for them. Rows that no position takes
are told by the module: those before ``offset`` (OPT), those up to the padding token's (RoBERTa,
ESM with absolute positions). ProphetNet looks up the positions after a text too. Rotary models have
no table and no bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.limits import Limits
from rotq.layers.packed_weight import PackedWeight
from rotq.models.multimodal import text_model

_BY_CONFIG = {"mpt": "max_seq_len"}
"""Model types whose bound is a number of the configuration."""

_AHEAD = {"prophetnet": 1}
"""Rows that a model type reads beyond those of its tokens."""


def limits_of(model: Any) -> Limits:
    """What a model can be given.

    Args:
        model: A language model of transformers, on any device; its parameters may be on meta.
    """
    return Limits(
        embeddings=vocabulary_of(model),
        positions=min(_bounds(model), default=None),
    )


def vocabulary_of(model: Any) -> int:
    """Token ids that a model has embeddings for, whatever its configuration says."""
    embedding = model.get_input_embeddings()
    # a packed one makes its weight at each access
    shape = embedding.shape if isinstance(embedding, PackedWeight) else embedding.weight.shape
    return int(shape[0])


def embedding_device(model: Any) -> torch.device:
    """Where a model is to be given its tokens."""
    embedding = model.get_input_embeddings()
    is_packed = isinstance(embedding, PackedWeight)
    weight: Tensor = embedding.weight_packed if is_packed else embedding.weight
    # accelerate keeps offloaded weights on meta and moves the inputs itself
    return torch.device("cpu") if weight.is_meta else weight.device


def _bounds(model: nn.Module) -> Iterator[int]:
    model = text_model(model)
    config: Any = model.config
    tables = [*_embeddings(model), *_buffers(model, floating=True)]
    yield from tables
    if tables:
        # some begin their rows later than the module says
        yield from _buffers(model, floating=False)
    if config.model_type in _BY_CONFIG:
        yield int(getattr(config, _BY_CONFIG[config.model_type]))


def _embeddings(model: Any) -> Iterator[int]:
    ahead = _AHEAD.get(model.config.model_type, 0)
    for name, module in model.named_modules():
        if _is_embedding(module) and _is_of_positions(name):
            unused = getattr(module, "offset", None)
            if unused is None:
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.weight.shape[0] - unused - ahead


def _is_embedding(module: nn.Module) -> bool:
    """torch's, or one of the same attributes (I-BERT)."""
    return hasattr(module, "padding_idx") and getattr(module, "weight", None) is not None


def _buffers(model: nn.Module, *, floating: bool) -> Iterator[int]:
    """Rows of tables, or else the length of rows of indices."""
    for name, buffer in model.named_buffers():
        if _is_of_positions(name) and buffer.is_floating_point() == floating:
            yield buffer.shape[0] if floating else buffer.shape[-1]


def _is_of_positions(name: str) -> bool:
    own = name.rpartition(".")[2]
    return own == "wpe" or "position" in own or own == "pos_encoding"
