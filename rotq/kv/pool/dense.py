"""A pool of keys and values in the model's dtype, without sinks, to hold the packed one against.

Shape suffixes: P pages, S tokens of a page, B rows, T columns, J pages of a row, N keys, M query
heads, H KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rotq.errors import RotqError
from rotq.kv.cache.attention import PackedKV
from rotq.kv.cache.support import check_heads, windows
from rotq.kv.pool.attention import PLAIN, Extras, Whole
from rotq.kv.pool.pool import PAGE_SIZE, Cost, Pool, PoolLayout
from rotq.models.rotary import KVShape, kv_shapes


def shapes_and_windows(model: Any) -> list[tuple[KVShape, int]]:
    """What each layer keeps, and how many tokens its queries see; 0 for all.

    Raises:
        RotqError: the model cannot be served from dense pages.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not getattr(config, "is_causal", True):
        raise RotqError(f"{config.model_type}: a server is for causal decoders")
    if getattr(config, "use_bidirectional_attention", None):
        raise RotqError(f"{config.model_type}: its attention is not causal")
    return list(zip(kv_shapes(config, packed=False), windows(config), strict=True))


class DensePool(Pool):
    """Pages of keys and values in the model's dtype, without sinks.

    Args:
        model: A causal language model of transformers, on one device.
        num_pages: P.
        table_width: Pages of the longest sequence.

    Raises:
        RotqError: the model cannot be served.
    """

    def __init__(self, model: Any, *, num_pages: int, table_width: int) -> None:
        found = shapes_and_windows(model)
        layers = [
            DenseLayer((num_pages, shape.num_heads, PAGE_SIZE, shape.head_dim), window, model)
            for shape, window in found
        ]
        super().__init__(layers, sinks=0, table_width=table_width)
        self.attach(model)

    def forget(self) -> None:
        """Nothing: keys and values are overwritten."""

    def take_over(self) -> None:
        """Nothing: ``update`` has stored all."""

    @staticmethod
    def cost(model: Any) -> Cost:
        """Bytes that pages take."""
        shapes = kv_shapes(model.config, packed=False)
        whole = sum(2 * shape.num_heads * shape.head_dim for shape in shapes)
        return Cost(page=PAGE_SIZE * whole * model.dtype.itemsize, sinks=0, elements=whole)


class DenseLayer(CacheLayerMixin):
    """One layer, whose pages are those of all sequences."""

    is_compileable = False

    def __init__(self, shape: tuple[int, ...], window: int, model: Any) -> None:
        super().__init__()
        self.k_PHSD = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.v_PHSD = torch.zeros_like(self.k_PHSD)
        self.window = window
        self.layout: PoolLayout | None = None
        self.visible: DenseVisible | None = None
        self.is_initialized = True

    @property
    def is_sliding(self) -> bool:
        """Whether queries see a window only."""
        return self.window > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: all memory has been taken."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store fresh tokens, (B, H, T, D); what comes back only our attention can read."""
        assert self.layout is not None
        _, num_heads, _, width = self.k_PHSD.shape
        check_heads(num_heads, width, key_states, value_states)
        layout = self.layout.to(key_states.device)
        b, t = (layout.encode_slot_BE >= 0).nonzero(as_tuple=True)
        slot = layout.encode_slot_BE[b, t]
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        self.k_PHSD[page, :, offset] = key_states[b, :, t].to(self.k_PHSD.dtype)
        self.v_PHSD[page, :, offset] = value_states[b, :, t].to(self.v_PHSD.dtype)
        self.visible = DenseVisible(layer=self, layout=self.layout, window=self.window)
        handle = PackedKV(tuple(key_states.shape), key_states, self.visible)
        return handle, handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask would have; nobody builds one."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: each row has a length of its own."""
        return 0

    def get_max_length(self) -> int:
        """-1: transformers' word for no maximum."""
        return -1

    def held(self) -> list[Tensor]:
        """What is allocated for tokens."""
        return [self.k_PHSD, self.v_PHSD]


@dataclass(kw_only=True)
class DenseVisible(Whole):
    """What the queries of one layer can see in one forward pass."""

    layer: DenseLayer
    layout: PoolLayout
    """On the CPU."""
    window: int
    was_read: bool = False

    def attend(self, query_BMTD: Tensor, scale: float, extras: Extras = PLAIN) -> Tensor:
        """Attention row by row, each over its own keys; zeros for rows of padding."""
        self.was_read = True
        out_BMTD = torch.zeros_like(query_BMTD)
        position_BT = self.layout.query_position_BT
        for b, last in enumerate(position_BT.amax(1).tolist()):
            if last >= 0:
                first = int(position_BT[b, 0])
                k_HND, v_HND, seen_TN = self._row(b, first, last + 1, query_BMTD)
                out_BMTD[b] = extras.attend(query_BMTD[b, None], k_HND, v_HND, seen_TN, scale)[0]
        return out_BMTD

    def _row(
        self, b: int, first: int, end: int, query_BMTD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of one sequence, (1, H, N, D), and which of them each query sees."""
        device = query_BMTD.device
        page_J = self.layout.page_table_BJ[b, : -(-end // PAGE_SIZE)].long().to(device)
        k_HND, v_HND = (
            pages[page_J].transpose(0, 1).flatten(1, 2)[None, :, :end].to(query_BMTD.dtype)
            for pages in (self.layer.k_PHSD, self.layer.v_PHSD)
        )
        position_T1 = first + torch.arange(query_BMTD.shape[2], device=device)[:, None]
        ahead_TN = position_T1 - torch.arange(end, device=device)
        seen_TN = ahead_TN >= 0
        if self.window:
            seen_TN &= ahead_TN < self.window
        # columns of padding see their neighbours, and nobody sees them
        seen_TN[end - first :, -1] = True
        return k_HND, v_HND, seen_TN
