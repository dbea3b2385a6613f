"""Sizes that a configuration of transformers gives, whatever its family calls them."""

from __future__ import annotations

from typing import Any


def head_dim(config: Any) -> int:
    """Features per head: the configuration's own value where it has one."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def num_value_heads(config: Any) -> int:
    """KV heads; as many as query heads where the configuration does not know the difference."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def mlp_widths(config: Any) -> set[int]:
    """Features that the last linear of an MLP reads; GPT-2 may leave its own open."""
    names = ("intermediate_size", "n_inner", "moe_intermediate_size")
    given = [getattr(config, name, None) for name in names]
    return {size for size in given if size} or {4 * config.hidden_size}
