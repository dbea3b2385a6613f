"""Attention maps one layer at a time, of any family that dispatches its attention by name.

What ``output_attentions`` gives holds the maps of all layers at once: 2.7 GB for a protein of 1000
residues in ESM-2 650M. Heads that are rotated or rounded online are seen as the products see them.

Shape suffixes: B windows, T positions, H query heads, K KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.models.attention import dispatch
from rotq.models.attention.online import heads_of


@contextmanager
def shown_maps(model: Any, on_map: Callable[[Tensor], None]) -> Iterator[None]:
    """Show every layer's probabilities (B, H, T, T), in the order in which layers run.

    Args:
        model: A masked language model of transformers, called without padding.
        on_map: Keeps nothing of what it is given, or else has all of it.

    Raises:
        RotqError: the model does not dispatch its attention by name, or masks tokens.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        if mask is not None or getattr(module, "is_causal", False):
            raise RotqError(f"{type(module).__name__} hides tokens from each other; no contacts")
        q_BHTD, k_BKTD, v_BKTD = heads_of(module).apply(query, key, value)
        k_BHTD, v_BHTD = (
            side.repeat_interleave(q_BHTD.shape[1] // side.shape[1], dim=1)
            for side in (k_BKTD, v_BKTD)
        )
        scale = kw.get("scaling")
        scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
        map_BHTT = (q_BHTD @ k_BHTD.mT * scale).softmax(-1)
        on_map(map_BHTT)
        return (map_BHTT @ v_BHTD).transpose(1, 2).contiguous(), None

    dispatch.register(dispatch.MAPS, attention, mask=_no_mask)
    with dispatch.used(model, dispatch.MAPS):
        yield


def _no_mask(*_: Any, **__: Any) -> None:
    """Nothing is padded."""
