"""See queries and keys as the attention of any family does: after norms and rotary embedding.

transformers dispatches attention by name (``config._attn_implementation``); a block that runs under
``observed_attention`` computes what it does without (sdpa, on heads that may be rotated and rounded
online) and reports how much attention each token got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotq.models.attention.online import heads_of

NAME = "rotq_observed"

Observer = Callable[..., None]


@contextmanager
def observed_attention(block: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer(query_BHTd, key_BHTd, scale=, mask=, causal=)`` in every attention.

    Args:
        block: The configurations its modules hold name another attention inside the context.
        observer: Is given detached tensors.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        scale = kw.get("scaling")
        query, key, value = heads_of(module).apply(query, key, value)
        observer(
            query,
            key,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            mask=mask,
            causal=mask is None and getattr(module, "is_causal", True),
        )
        result: tuple[Tensor, Tensor | None] = sdpa(module, query, key, value, mask, **kw)
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
