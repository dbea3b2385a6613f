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
from rotq.models.adapter import Adapter
from rotq.models.rotary import rotaries
from rotq.models.sizes import head_dim, num_value_heads
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
    for name in wanted:
        why = _obstacle(adapter, name)
        if why is not None:
            raise RotqError(
                f"transform.scalings: {name} is not possible for {adapter.family} models: {why}"
            )
    rotary = rotaries(config)
    found = []
    hidden, width = int(config.hidden_size), head_dim(config)
    num_heads = num_value_heads(config)
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


def _obstacle(adapter: Adapter, name: str) -> str | None:
    """Why a family does not allow a scaling; None where it does."""
    if not adapter.attention:
        return "it needs a known family"
    if name == "query_key" and adapter.norms_all_heads:
        return "a norm over all heads stands behind queries and keys"
    if name in ("qkv", "gate_up") and adapter.attention_norm == adapter.mlp_norm:
        return "attention and MLP do not have a norm each before them"
    if name in ("value", "query_key") and adapter.query == adapter.value:
        return "queries, keys and values are rows of one layer"
    if name == "up" and adapter.mlp_up not in adapter.mlp_inputs:
        return "no linear layer gives a factor of what the MLP's last one reads"
    return None


def _up_shape(block: nn.Module, writers: Sequence[str]) -> tuple[int, int]:
    linear = block.get_submodule(writers[0])
    assert isinstance(linear, nn.Linear), f"{writers[0]} is a linear layer"
    return len(writers), linear.in_features
