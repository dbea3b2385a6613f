"""One layer of the packed cache: beside its pages, its sinks and its recent window.

Shape suffixes: B sequences, T fresh columns, N recent and fresh columns, H KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.attention import PackedKV, Visible
from rotq.kv.cache.encoded_layer import EncodedLayer
from rotq.kv.cache.pages import PageStore
from rotq.kv.cache.placement import CacheLayout, Placement
from rotq.kv.cache.support import check_heads
from rotq.kv.calibration.file import KVCalibration


class PackedLayer(EncodedLayer):
    """Keys and values of one layer; ``PackedCache`` says what each forward pass adds.

    Args:
        calibration: Of the model.
        index: Of the layer.
        placement: Shared with the layers whose tokens lie in the same places.
    """

    layout: CacheLayout | None

    def __init__(self, calibration: KVCalibration, index: int, placement: Placement) -> None:
        super().__init__(calibration.layers[index], placement.window)
        self.calibration, self.index = calibration, index
        self.placement = placement
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.recent: tuple[Tensor, Tensor] | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` is always exact, also without ``activate_past_recording``."""
        return not self.window and not self.placement.sequences.recent

    @property
    def keys(self) -> Tensor | None:
        """For those who ask its shape: a handle (B, H, columns, D), None before the first token."""
        return self._handle(0)

    @keys.setter
    def keys(self, nothing: None) -> None:
        """transformers' layers begin with None; what is stored here is codes."""
        assert nothing is None

    @property
    def values(self) -> Tensor | None:
        """As ``keys``."""
        return self._handle(1)

    @values.setter
    def values(self, nothing: None) -> None:
        """As of ``keys``."""
        assert nothing is None

    def _handle(self, side: int) -> PackedKV | None:
        if self.sinks is None or not self.get_seq_length():
            return None
        like = self.sinks[side]
        batch, num_heads, _, width = like.shape
        return PackedKV((batch, num_heads, self.get_seq_length(), width), like)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors like these; called by ``update``."""
        num_heads, width = self.num_heads, self.constants.format.head_dim
        check_heads(num_heads, width, key_states, value_states)
        self.start_with(self.calibration.on(key_states.device).layer(self.index))
        self.store = PageStore(self.constants.format, num_heads, key_states.device)
        count = self.placement.sequences.sinks
        shape = (key_states.shape[0], num_heads, count, width)
        self.sinks = key_states.new_zeros(shape), value_states.new_zeros(shape)
        none = (*shape[:2], 0, width)
        self.recent = key_states.new_empty(none), value_states.new_empty(none)
        self.is_initialized = True

    def take_in(self, k_BHTD: Tensor, v_BHTD: Tensor) -> Visible:
        """Code what leaves the recent window, and hold the rest whole."""
        assert self.layout is not None
        assert self.store is not None
        assert self.sinks is not None
        assert self.recent is not None
        layout = self.layout.to(k_BHTD.device)
        self._follow(k_BHTD)
        k_BHND, v_BHND = _joined(self.recent, (k_BHTD, v_BHTD))
        dense = (k_BHND, v_BHND)
        if layout.has_sinks:
            dense = _joined(self.sinks, dense)
        visible = self._see(layout, *dense)
        self.store.prepare(layout.num_pages, layout.copies)
        if layout.encode == slice(0, k_BHND.shape[2]):
            self.encode(layout, k_BHND, v_BHND)
        else:
            self.encode(layout, k_BHND[:, :, layout.encode], v_BHND[:, :, layout.encode])
        self._keep_sinks(layout, k_BHTD, v_BHTD)
        if layout.keep < k_BHND.shape[2] or self.recent[0].shape[2]:
            # a copy, so that the whole chunk is not held for a few columns of it
            self.recent = k_BHND[:, :, layout.keep :].clone(), v_BHND[:, :, layout.keep :].clone()
        return visible

    def _follow(self, k_BHTD: Tensor) -> None:
        """Bring what is held whole to the dtype that the model has now.

        Raises:
            RotqError: the model is on another device now.
        """
        assert self.sinks is not None
        assert self.recent is not None
        held = self.sinks[0]
        if held.device != k_BHTD.device:
            raise RotqError(
                f"the model moved from {held.device} to {k_BHTD.device} while its PackedCache held "
                "tokens; call reset() and run them again"
            )
        if held.dtype != k_BHTD.dtype:
            self.sinks, self.recent = (
                (k.to(k_BHTD.dtype), v.to(k_BHTD.dtype)) for k, v in (self.sinks, self.recent)
            )

    def _keep_sinks(self, layout: CacheLayout, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        if layout.sink_BTS is None:
            return
        assert self.sinks is not None
        sequence, column, sink = layout.sink_BTS
        for held, fresh in zip(self.sinks, (k_BHTD, v_BHTD), strict=True):
            held[sequence, :, sink] = fresh[sequence, :, column]

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.placement.sequences.num_columns

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
        parts = (self.constants, self.constants.key, self.constants.value)
        held = [getattr(part, item.name) for part in parts for item in fields(part)]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _joined(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values one behind the other; no copy if the first are none."""
    if not first[0].shape[2]:
        return then
    return torch.cat((first[0], then[0]), dim=2), torch.cat((first[1], then[1]), dim=2)
