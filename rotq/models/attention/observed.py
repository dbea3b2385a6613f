"""See queries and keys as the attention of any family does: after norms and rotary embedding.

A block that runs under ``observed_attention`` computes what it does without (sdpa, on heads that
may be rotated and rounded online), and an observer is shown what its attention works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotq.models.attention import dispatch
from rotq.models.attention.online import heads_of

Observer = Callable[..., None]


@contextmanager
def observed_attention(block: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer(query_BHTd, key_BHTd, scale=, mask=, causal=)`` in every attention.

    Args:
        block: Of a model with sdpa or online attention.
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

    dispatch.register(dispatch.OBSERVED, attention)
    with dispatch.used(block, dispatch.OBSERVED):
        yield
