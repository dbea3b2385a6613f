"""Sizes that a configuration of transformers gives, whatever its family calls them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rotq.errors import RotqError

MOST_MODULES = 10_000
"""Layers or experts; the largest model of today has some hundred of each."""


def check_counts(values: Mapping[str, Any], file: Path) -> None:
    """Refuse a configuration, as read from its file, whose modules alone would fill the memory.

    Raises:
        RotqError: more layers or experts than any model has; names the key.
    """
    for key, number in _counts(values):
        if number > MOST_MODULES:
            raise RotqError(f"{file}: {key} {number} is more than the {MOST_MODULES} rotq reads")


def _counts(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of layers and experts, also of a model within the model."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int | float) and _is_count(key):
            yield key, value


def _is_count(key: str) -> bool:
    """Of layers or experts; ``vocab_size_per_layer_input`` is none."""
    return bool(re.search(r"layer|expert", key)) and not re.search(r"size|dim|rank|token", key)


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
