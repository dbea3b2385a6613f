"""Which scalings a model allows, and how many free factors each has.

A scaling of queries and keys has to commute with RoPE, which turns features i and i + R together:
they share one factor, features that are not turned (partial rotary) have their own. Behind a norm
on the heads (Qwen3, Gemma 3) it sits in the norms' gains, which all heads of a layer share.

Shape suffixes: H KV heads, K head size, R rotary pairs, F free factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.models.rotary import rotaries
from rotq.models.sizes import head_dim
from rotq.models.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One scaling of one layer."""

    shape: tuple[int, ...]
    """Of the free factors."""
    num_pairs: int = 0
    """The first free factors that serve two features each, R apart."""

    def expand(self, free: Tensor) -> Tensor:
        """(..., F) free factors to (..., K), one per feature."""
        R = self.num_pairs
        return torch.cat((free[..., :R], free[..., :R], free[..., R:]), dim=-1) if R else free


def scalings(skeleton: Skeleton, wanted: Sequence[str]) -> list[dict[str, Scaling]]:
    """Of every layer, by name.

    Args:
        wanted: Names from ``rotations.basis.SCALINGS``.

    Raises:
        RotqError: the family's adapter or its RoPE does not say where a wanted one goes.
    """
    adapter, config = skeleton.adapter, skeleton.config
    if wanted and (not adapter.attention or adapter.layer_norm):
        raise RotqError(
            f"transform.scalings is not possible for {adapter.family} models: it needs a known "
            "family with RMSNorm"
        )
    rotary = rotaries(config)
    found = []
    hidden, width = int(config.hidden_size), head_dim(config)
    num_heads = int(config.num_key_value_heads)
    for index, block in enumerate(skeleton.blocks):
        layer = {
            "qkv": Scaling(shape=(hidden,)),
            "gate_up": Scaling(shape=(hidden,)),
            "value": Scaling(shape=(num_heads, width)),
            "up": Scaling(shape=_up_shape(block, adapter.mlp_writers(block))),
        }
        if "query_key" in wanted:
            turned = rotary[index]
            if turned is None:
                raise RotqError(
                    f"{config.model_type}: its RoPE is not known to pair features i and i + R, "
                    "so the scaling query_key is not possible; leave it out of transform.scalings"
                )
            pairs = turned.inv_freq_R.numel()
            heads = 1 if adapter.query_norm else num_heads
            layer["query_key"] = Scaling(shape=(heads, width - pairs), num_pairs=pairs)
        found.append({name: layer[name] for name in wanted})
    return found


def _up_shape(block: nn.Module, writers: Sequence[str]) -> tuple[int, int]:
    linear = block.get_submodule(writers[0])
    assert isinstance(linear, nn.Linear), f"{writers[0]} is a linear layer"
    return len(writers), linear.in_features
