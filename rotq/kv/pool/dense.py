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
from rotq.kv.cache.layout import together
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
        places = DensePlaces.of(self.layout, key_states.device)
        b, t, page, offset = places.fresh
        self.k_PHSD[page, :, offset] = key_states[b, :, t].to(self.k_PHSD.dtype)
        self.v_PHSD[page, :, offset] = value_states[b, :, t].to(self.v_PHSD.dtype)
        self.visible = DenseVisible(layer=self, places=places, window=self.window)
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


@dataclass(frozen=True, kw_only=True)
class DenseRow:
    """A sequence in a pass, on the model's device."""

    b: int
    page_J: Tensor
    end: int
    """Tokens, those of the pass included."""
    seen_TN: Tensor
    """Which of them each query sees."""


class DensePlaces:
    """Where a pass stores its tokens and finds each row's: moved once for all layers.

    Args:
        layout: Of the pass, on the CPU.
        device: Of the model.
    """

    def __init__(self, layout: PoolLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        b, t = (layout.encode_slot_BE >= 0).nonzero(as_tuple=True)
        slot = layout.encode_slot_BE[b, t]
        self.fresh = together((b, t, slot // PAGE_SIZE, slot % PAGE_SIZE), device)
        """int64, of each token: row, column, page and place in it."""
        self._rows: dict[int, list[DenseRow]] = {}

    @classmethod
    def of(cls, layout: PoolLayout, device: torch.device) -> DensePlaces:
        """Those of a pass, kept with its layout."""
        kept: dict[torch.device, DensePlaces] = vars(layout).setdefault("_dense_places", {})
        if device not in kept:
            kept[device] = cls(layout, device)
        return kept[device]

    def rows(self, window: int) -> list[DenseRow]:
        """All rows but padding.

        Args:
            window: Of sliding attention in tokens; 0 for none.
        """
        if window not in self._rows:
            position_BT = self._layout.query_position_BT
            ends = enumerate((position_BT.amax(1) + 1).tolist())
            self._rows[window] = [self._row(b, end, window) for b, end in ends if end]
        return self._rows[window]

    def _row(self, b: int, end: int, window: int) -> DenseRow:
        layout = self._layout
        first, length = int(layout.query_position_BT[b, 0]), layout.query_position_BT.shape[1]
        page_J = layout.page_table_BJ[b, : -(-end // PAGE_SIZE)].long()
        ahead_TN = first + torch.arange(length)[:, None] - torch.arange(end)
        seen_TN = ahead_TN >= 0
        if window:
            seen_TN &= ahead_TN < window
        # columns of padding see their neighbours, and nobody sees them
        seen_TN[end - first :, -1] = True
        page_J, seen_TN = together((page_J, seen_TN), self._device)
        return DenseRow(b=b, page_J=page_J, end=end, seen_TN=seen_TN)


@dataclass(kw_only=True)
class DenseVisible(Whole):
    """What the queries of one layer can see in one forward pass."""

    layer: DenseLayer
    places: DensePlaces
    window: int
    was_read: bool = False

    def attend(self, query_BMTD: Tensor, scale: float, extras: Extras = PLAIN) -> Tensor:
        """Attention row by row, each over its own keys; zeros for rows of padding.

        Not of all rows at once: what a row gives would depend on the length of the others.
        """
        self.was_read = True
        out_BMTD = torch.zeros_like(query_BMTD)
        for row in self.places.rows(self.window):
            k_1HND, v_1HND = (
                pages[row.page_J].transpose(0, 1).flatten(1, 2)[None, :, : row.end]
                for pages in (self.layer.k_PHSD, self.layer.v_PHSD)
            )
            q_1MTD, dtype = query_BMTD[row.b, None], query_BMTD.dtype
            k_1HND, v_1HND = k_1HND.to(dtype), v_1HND.to(dtype)
            out_BMTD[row.b] = extras.attend(q_1MTD, k_1HND, v_1HND, row.seen_TN, scale)[0]
        return out_BMTD
