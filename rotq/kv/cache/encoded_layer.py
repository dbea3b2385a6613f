"""One layer whose tokens are codes in pages: what a cache's layer and a pool's have in common.

What is kept whole beside the pages, and where, is theirs. The few tokens of a decode step are not
coded at once but left in ``uncoded``, for all layers together; see ``batched_encoding``.

Shape suffixes: B sequences, T fresh columns, N tokens that are whole, E columns to be coded, H KV
heads, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rotq.autocast import lowered, switched_off
from rotq.errors import RotqError
from rotq.kv.cache.attention import PackedKV, Visible
from rotq.kv.cache.layout import Layout
from rotq.kv.cache.pages import PageStore
from rotq.kv.norm_range import NormReach, outgrown
from rotq.ops import DenseKV, KVConstants, KVHistory, KVPages, encode_kv

ENCODED = 1024
"""Columns coded at a time on a CPU, where coding takes several times their size."""

POSTPONED = 16
"""Up to so many columns are left to be coded with those of other layers."""

BATCHED = ("cpu", "cuda")
"""Devices on which they are."""

SHORT = 128
"""And on a CPU, where coding a prompt is many small operations, passes of so many tokens."""


class EncodedLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Args:
        constants: Of the layer.
        window: Keys that a query sees, itself included; 0 for all.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, constants: KVConstants, window: int) -> None:
        super().__init__()
        self.window = window
        self.start_with(constants)
        self.store: PageStore | None = None
        self.layout: Layout | None = None
        """Of the forward pass that is under way; who owns the layer sets it."""
        self.visible: Visible | None = None
        """In that pass, from ``update`` on."""
        self.uncoded: tuple[Tensor, Tensor] | None = None
        """Columns (B, H, E, D) that are coded after the forward pass."""

    def start_with(self, constants: KVConstants) -> None:
        """Code with these constants, nothing having been coded; see ``norm_range``."""
        self.reach = NormReach(constants)
        self.outgrown: Tensor | None = None
        """bool (), of the tokens that were coded last: whether a norm did not fit."""

    @property
    def constants(self) -> KVConstants:
        """That its tokens are coded with."""
        return self.reach.constants

    @property
    def is_sliding(self) -> bool:
        """Whether queries see a window only."""
        return self.window > 0

    @property
    def num_heads(self) -> int:
        """KV heads that the constants are for."""
        return self.constants.key.base_H.numel()

    @property
    def pages(self) -> KVPages:
        """The packed tokens."""
        assert self.store is not None
        return self.store.pages

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the fresh tokens; what comes back only the packed attention can read.

        Args:
            key_states: (B, H, T, D), after RoPE.
            value_states: (B, H, T, D).

        Raises:
            RotqError: outside of a forward pass of the cache's model, twice in one, or with
                gradients.
        """
        if self.layout is None or self.visible is not None:
            raise RotqError(
                "PackedCache was updated outside of a forward pass of the model it was made for"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RotqError("PackedCache is for inference; use torch.no_grad()")
        # under autocast they may have different dtypes
        key_states, value_states = lowered(key_states), lowered(value_states)
        with switched_off(key_states.device):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.visible = self.take_in(key_states, value_states)
        batch, num_heads, length, width = key_states.shape
        shape = (batch, num_heads, self.get_mask_sizes(length)[0], width)
        handle = PackedKV(shape, key_states, self.visible)
        return handle, handle

    @abstractmethod
    def take_in(self, k_BHTD: Tensor, v_BHTD: Tensor) -> Visible:
        """Store the fresh tokens where ``layout`` says; returns what their queries see."""

    def _see(self, layout: Layout, k_BHND: Tensor, v_BHND: Tensor) -> Visible:
        """What is packed before the pass, and these tokens that are whole."""
        history = KVHistory(
            pages=self.pages,
            page_table_BJ=layout.page_table_BJ,
            length_B=layout.length_B,
            start_B=layout.start_B,
            constants=self.constants,
            dense=DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=layout.dense_position_BN),
            window=self.window,
            extent=layout.extent,
            worked_out=layout.worked_out,
        )
        return Visible(history=history, layout=layout)

    def encode(self, layout: Layout, k_BHED: Tensor, v_BHED: Tensor) -> None:
        """Write columns into their pages; a few are left in ``uncoded``.

        The first ones decide how far the norms of their heads reach.

        Args:
            layout: On the device of the columns.
            k_BHED: After RoPE.
            v_BHED: As ``k_BHED``.
        """
        first = slice(0, ENCODED)
        if not self.reach.is_settled:
            self.reach.settle(
                k_BHED[:, :, first],
                v_BHED[:, :, first],
                layout.encode_position_BE[:, first],
                layout.encode_slot_BE[:, first] >= 0,
            )
        if _is_postponed(k_BHED):
            self.uncoded = k_BHED, v_BHED
            return
        self._encode_now(layout, k_BHED, v_BHED)

    def encode_rest(self) -> None:
        """Write what ``encode`` has left."""
        if self.uncoded is not None and self.visible is not None:
            self._encode_now(self.visible.layout, *self.uncoded)
        self.uncoded = None

    def _encode_now(self, layout: Layout, k_BHED: Tensor, v_BHED: Tensor) -> None:
        number = k_BHED.shape[2]
        if not number:
            return
        step = ENCODED if k_BHED.device.type == "cpu" else number
        for e in range(0, number, step):
            turn = slice(e, e + step)
            encode_kv(
                k_BHED[:, :, turn],
                v_BHED[:, :, turn],
                layout.encode_position_BE[:, turn],
                layout.encode_slot_BE[:, turn],
                self.constants,
                self.pages,
            )
        self._look_at_norms(layout)

    def _look_at_norms(self, layout: Layout) -> None:
        """Whether a norm that has just been stored did not fit; on the device, without waiting."""
        self.outgrown = stored_outgrown(self.pages, layout.encode_slot_BE)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask would have, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: transformers' word for no maximum."""
        return -1


def _is_postponed(k_BHED: Tensor) -> bool:
    (batch, _, number, _), device = k_BHED.shape, k_BHED.device.type
    are_few = device in BATCHED and number <= POSTPONED
    is_short = device == "cpu" and batch * number <= SHORT
    return number > 0 and (are_few or is_short)


def stored_outgrown(pages: KVPages, slot_BE: Tensor) -> Tensor | None:
    """bool (): whether a norm that was stored in these slots did not fit; None without norms."""
    at_BE, size = slot_BE.clamp(min=0), pages.format.page_size
    flags = [
        # [B, E, H] -> [B, H, E]
        outgrown(norm_PHS[at_BE // size, :, at_BE % size].transpose(1, 2), slot_BE >= 0)
        for norm_PHS in (pages.k_norm, pages.v_norm, pages.k_gamma)
        if norm_PHS is not None
    ]
    return torch.stack(flags).any() if flags else None
