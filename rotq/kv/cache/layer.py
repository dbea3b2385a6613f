"""One layer of the packed cache: its pages, its sinks and its recent window.

Shape suffixes: B sequences, T fresh columns, N recent and fresh columns, H KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rotq.errors import RotqError
from rotq.kv.cache.attention import PackedKV, Visible
from rotq.kv.cache.pages import PageStore
from rotq.kv.cache.placement import Layout, Placement
from rotq.kv.calibration.constants import on
from rotq.ops import DenseKV, KVConstants, KVHistory, KVPages, encode_kv

ENCODED = 1024
"""Columns coded at a time on a CPU, where coding takes several times their size."""

POSTPONED = 16
"""Up to so many columns are left to be coded with those of other layers, on a CPU."""


class PackedLayer(CacheLayerMixin):
    """Keys and values of one layer; ``PackedCache`` says what each forward pass adds.

    Args:
        transform: Constants of the layer, on any device.
        placement: Shared with the layers whose tokens lie in the same places.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, transform: KVConstants, placement: Placement) -> None:
        super().__init__()
        self.given = self.transform = transform
        self.placement = placement
        self.layout: Layout | None = None
        self.visible: Visible | None = None
        self.store: PageStore | None = None
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.recent: tuple[Tensor, Tensor] | None = None
        self.uncoded: tuple[Tensor, Tensor] | None = None
        """Tokens that the cache codes after the forward pass."""

    @property
    def is_sliding(self) -> bool:
        """Whether queries see a window only."""
        return self.placement.window > 0

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` is always exact, also without ``activate_past_recording``."""
        return not self.placement.window and not self.placement.sequences.recent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors like these; called by ``update``."""
        num_heads, width = key_states.shape[1], key_states.shape[3]
        wanted = (self.transform.key.base_H.numel(), self.transform.format.head_dim)
        if (num_heads, width) != wanted or value_states.shape[1::2] != key_states.shape[1::2]:
            raise RotqError(
                f"the calibration is for {wanted[0]} KV heads of width {wanted[1]}, got keys "
                f"{tuple(key_states.shape)} and values {tuple(value_states.shape)}"
            )
        self.transform = on(key_states.device, self.given)
        self.store = PageStore(self.transform.format, num_heads, key_states.device)
        count = self.placement.sequences.sinks
        shape = (key_states.shape[0], num_heads, count, width)
        self.sinks = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.recent = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout = self.layout.to(key_states.device)
        self.visible = self._store(layout, key_states, value_states)
        shape = (
            *key_states.shape[:2],
            self.get_mask_sizes(key_states.shape[2])[0],
            key_states.shape[3],
        )
        handle = PackedKV(shape, key_states, self.visible)
        return handle, handle

    def _store(self, layout: Layout, fresh_k: Tensor, fresh_v: Tensor) -> Visible:
        assert self.store is not None
        assert self.sinks is not None
        assert self.recent is not None
        k_BHND, v_BHND = _joined(self.recent, (fresh_k, fresh_v))
        dense = (k_BHND, v_BHND)
        if layout.has_sinks:
            dense = _joined(self.sinks, dense)
        visible = self._see(layout, *dense)
        self.store.prepare(layout.num_pages, layout.copies)
        self._encode(layout, k_BHND[:, :, layout.encode], v_BHND[:, :, layout.encode])
        self._keep_sinks(layout, fresh_k, fresh_v)
        # a copy, so that the whole chunk is not held for a few columns of it
        self.recent = k_BHND[:, :, layout.keep :].clone(), v_BHND[:, :, layout.keep :].clone()
        return visible

    def _see(self, layout: Layout, k_BHND: Tensor, v_BHND: Tensor) -> Visible:
        """What the fresh tokens see: what is packed before the pass, and these dense tokens."""
        history = KVHistory(
            pages=self.pages,
            page_table_BJ=layout.page_table_BJ,
            length_B=layout.length_B,
            start_B=layout.start_B,
            constants=self.transform,
            dense=DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=layout.dense_position_BN),
            window=self.placement.window,
        )
        return Visible(history=history, layout=layout)

    @property
    def pages(self) -> KVPages:
        """What is stored."""
        assert self.store is not None
        return self.store.pages

    def encode_rest(self) -> None:
        """Code what was left over."""
        if self.uncoded is not None and self.visible is not None:
            self._encode_now(self.visible.layout, *self.uncoded)
        self.uncoded = None

    def _encode(self, layout: Layout, k_BHED: Tensor, v_BHED: Tensor) -> None:
        number, on_cpu = k_BHED.shape[2], k_BHED.device.type == "cpu"
        if on_cpu and 0 < number <= POSTPONED:
            self.uncoded = k_BHED, v_BHED
            return
        self._encode_now(layout, k_BHED, v_BHED)

    def _encode_now(self, layout: Layout, k_BHED: Tensor, v_BHED: Tensor) -> None:
        number = k_BHED.shape[2]
        step = ENCODED if k_BHED.device.type == "cpu" else max(1, number)
        for e in range(0, number, step):
            turn = slice(e, e + step)
            encode_kv(
                k_BHED[:, :, turn],
                v_BHED[:, :, turn],
                layout.encode_position_BE[:, turn],
                layout.encode_slot_BE[:, turn],
                self.transform,
                self.pages,
            )

    def _keep_sinks(self, layout: Layout, fresh_k: Tensor, fresh_v: Tensor) -> None:
        if layout.sink_BTS is None:
            return
        assert self.sinks is not None
        sequence, column, sink = layout.sink_BTS
        for held, fresh in zip(self.sinks, (fresh_k, fresh_v), strict=True):
            held[sequence, :, sink] = fresh[sequence, :, column]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask would have, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.placement.sequences.num_columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def select(self, indices: list[int]) -> None:
        """Let sequence i be what sequence ``indices[i]`` was; pages are the placement's."""
        if self.sinks is not None and self.recent is not None:
            k, v = self.sinks
            self.sinks = k[indices], v[indices]
            k, v = self.recent
            self.recent = k[indices], v[indices]

    def hold(self, columns: slice) -> None:
        """Keep only these recent columns."""
        if self.recent is not None:
            k, v = self.recent
            self.recent = k[:, :, columns].clone(), v[:, :, columns].clone()

    def reset(self) -> None:
        """Forget everything and free its memory."""
        self.layout = self.visible = self.store = None
        self.sinks = self.recent = self.uncoded = None
        self.is_initialized = False

    def nbytes(self) -> tuple[int, int]:
        """Allocated bytes of pages, and of tokens kept whole."""
        if self.store is None or self.sinks is None or self.recent is None:
            return 0, 0
        whole = sum(tensor.nbytes for tensor in (*self.sinks, *self.recent))
        return self.store.pages.nbytes, whole

    def constant_bytes(self) -> int:
        """Bytes of the layer's constants."""
        transform = self.transform
        held = [
            getattr(part, item.name)
            for part in (transform, transform.key, transform.value)
            for item in fields(part)
        ]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _joined(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values one behind the other; no copy if the first are none."""
    if not first[0].shape[2]:
        return then
    return torch.cat((first[0], then[0]), dim=2), torch.cat((first[1], then[1]), dim=2)
