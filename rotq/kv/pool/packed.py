"""A pool of packed pages, and of whole sinks, that all sequences share.

Shape suffixes: P pages, B rows, T columns, N dense keys, S sinks, H KV heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.attention import Visible
from rotq.kv.cache.batched_encoding import JOINED, BatchedEncoder, batched_encoders
from rotq.kv.cache.encoded_layer import EncodedLayer
from rotq.kv.cache.norm_watch import flag_of, refuse
from rotq.kv.cache.pages import PageStore
from rotq.kv.cache.support import check_heads, check_served, windows
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.pool.pool import PAGE_SIZE, Cost, Pool, PoolLayout
from rotq.models.rotary import kv_shapes
from rotq.ops import KVConstants


class PackedPool(Pool):
    """Packed pages and whole sinks.

    Args:
        model: A causal language model of transformers, on one device.
        calibration: Made for this model.
        num_pages: P.
        num_sinks: Sequences whose sinks can be held.
        table_width: Pages of the longest sequence.

    Raises:
        RotqError: the model or the calibration cannot be served.
    """

    def __init__(
        self,
        model: Any,
        calibration: KVCalibration,
        *,
        num_pages: int,
        num_sinks: int,
        table_width: int,
    ) -> None:
        check_served(model, calibration)
        if calibration.recent:
            raise RotqError("a pool keeps no recent window; use a scheme with recent 0")
        layers = []
        for index, window in enumerate(windows(model.config.get_text_config(decoder=True))):
            constants = calibration.on(model.device).layer(index)
            if constants.format.page_size != PAGE_SIZE:
                raise RotqError(f"a pool has pages of {PAGE_SIZE} tokens, this calibration other")
            layer = PooledLayer(
                constants,
                window,
                num_sinks=num_sinks,
                sinks=calibration.sinks,
                dtype=model.dtype,
            )
            layers.append(layer)
        super().__init__(layers, sinks=calibration.sinks, table_width=table_width)
        self._constants = [layer.constants for layer in layers]
        self._encoders: list[BatchedEncoder] = batched_encoders(layers, calibration)
        if model.device.type in JOINED:
            # before there is memory to be moved
            for encoder in self._encoders:
                if encoder.codec is not None:
                    encoder.join()
        for layer in layers:
            layer.allocate(num_pages)
        self.attach(model)

    def forget(self) -> None:
        """Let the tokens that are coded next decide how far norms reach."""
        for layer, constants in zip(self.layers, self._constants, strict=True):
            layer.start_with(constants)

    def take_over(self) -> None:
        """Code the tokens of a decode step, for all layers at once."""
        for encoder in self._encoders:
            encoder.encode()

    def flag(self) -> Tensor | None:
        """Whether a norm did not fit, on the device."""
        return flag_of(self.layers)

    def check(self, flag: Tensor | None) -> None:
        """Wait for a pass.

        Raises:
            RotqError: a norm did not fit; what is in pages is worth nothing then.
        """
        try:
            if flag is not None:
                refuse(flag)
        except RotqError:
            self.forget()
            raise

    def steady(self) -> list[KVConstants] | None:
        """Constants of all layers, once all heads have seen what decides about them."""
        if not all(layer.reach.is_settled for layer in self.layers):
            return None
        return [layer.constants for layer in self.layers]

    @staticmethod
    def cost(model: Any, calibration: KVCalibration) -> Cost:
        """Bytes that pages and sinks take."""
        shapes = kv_shapes(model.config)
        whole = sum(2 * shape.num_heads * shape.head_dim for shape in shapes)
        packed = sum(
            shape.num_heads * calibration.layers[index].format.bytes_per_token
            for index, shape in enumerate(shapes)
        )
        sinks = calibration.sinks * whole * model.dtype.itemsize
        return Cost(page=PAGE_SIZE * packed, sinks=sinks, elements=whole)


class PooledLayer(EncodedLayer):
    """One layer, whose pages and sinks are those of all sequences; all memory is taken at once.

    Args:
        constants: Of the layer, on the device where its memory shall be.
        window: Keys that a query sees, itself included; 0 for all.
        num_sinks: Sequences whose sinks can be held; one more place, of rows of padding, is never
            written.
        sinks: Of a sequence.
        dtype: Of sinks.
    """

    layout: PoolLayout | None

    def __init__(
        self,
        constants: KVConstants,
        window: int,
        *,
        num_sinks: int,
        sinks: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(constants, window)
        device = constants.key.base_H.device
        self.store = PageStore(constants.format, self.num_heads, device)
        shape = (num_sinks + 1, self.num_heads, sinks, constants.format.head_dim)
        self.sinks = (
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )
        self.is_initialized = True

    def allocate(self, num_pages: int) -> None:
        """Take the memory of so many pages."""
        assert self.store is not None
        self.store.prepare(num_pages, [])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: all memory has been taken."""

    def take_in(self, k_BHTD: Tensor, v_BHTD: Tensor) -> Visible:
        """Code all fresh tokens but new sinks, which are held whole."""
        assert self.layout is not None
        check_heads(self.num_heads, self.constants.format.head_dim, k_BHTD, v_BHTD)
        layout = self.layout.to(k_BHTD.device)
        k, v = (held[layout.sink_B].to(k_BHTD.dtype) for held in self.sinks)
        visible = self._see(layout, torch.cat((k, k_BHTD), dim=2), torch.cat((v, v_BHTD), dim=2))
        self.encode(layout, k_BHTD, v_BHTD)
        if not layout.sink_BTS.shape[1]:
            return visible
        row, column, sink = layout.sink_BTS
        for held, fresh in zip(self.sinks, (k_BHTD, v_BHTD), strict=True):
            held[layout.sink_B[row], :, sink] = fresh[row, :, column].to(held.dtype)
        return visible

    def get_seq_length(self) -> int:
        """0: each row has a length of its own."""
        return 0

    def held(self) -> list[Tensor]:
        """What is allocated for tokens."""
        return [*self.pages.tensors(), *self.sinks]
