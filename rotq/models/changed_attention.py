"""Change what an attention is given, behind RoPE, while gradients flow.

transformers dispatches attention by name (``config._attn_implementation``); a block that runs under
``changed_attention`` computes what sdpa computes on queries, keys and values that were changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "rotq_changed"

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Queries (B, H, T, d), keys and values (B, KV heads, T, d) to the same shapes."""


@contextmanager
def changed_attention(block: nn.Module, change: Change) -> Iterator[None]:
    """Run ``change`` in every attention of the block inside the context."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = sdpa(module, *change(query, key, value), mask, **kw)
        return result

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    held: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in held}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
