"""A pool of packed pages: the layers of ``PackedCache`` over memory that all sequences share.

Shape suffixes: P pages, B rows, T columns, N dense keys, H KV heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.attention import Visible
from rotq.kv.cache.batched_encoding import Appender, appenders
from rotq.kv.cache.layer import PackedLayer
from rotq.kv.cache.pages import PageStore, PageTable
from rotq.kv.cache.placement import Layout, Placement
from rotq.kv.cache.sequences import Sequences
from rotq.kv.cache.support import check_served, windows
from rotq.kv.calibration.constants import on
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.pool.pool import PAGE_SIZE, Cost, Pool, PoolLayout
from rotq.models.rotary import kv_shapes
from rotq.ops import DenseKV


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
        sequences = Sequences(sinks=calibration.sinks, recent=0)
        placements: dict[int, Placement] = {}
        layers = []
        for index, window in enumerate(windows(model.config.get_text_config(decoder=True))):
            transform = calibration.layers[index]
            if transform.format.page_size != PAGE_SIZE:
                raise RotqError(f"a pool has pages of {PAGE_SIZE} tokens, this calibration other")
            if window not in placements:
                table = PageTable(page_size=PAGE_SIZE)
                placements[window] = Placement(sequences=sequences, table=table, window=window)
            layer = PooledLayer(transform, placements[window])
            layer.allocate(num_pages, num_sinks, model.device, model.dtype)
            layers.append(layer)
        super().__init__(model, layers, sinks=calibration.sinks, table_width=table_width)
        self._appenders: list[Appender] = appenders(layers)

    def take_over(self) -> None:
        """Code the tokens of a decode step, for all layers at once."""
        for appender in self._appenders:
            appender.append()

    @staticmethod
    def cost(model: Any, calibration: KVCalibration) -> Cost:
        """What pages and sinks take."""
        shapes = kv_shapes(model.config)
        whole = sum(2 * shape.num_heads * shape.head_dim for shape in shapes)
        packed = sum(
            shape.num_heads * calibration.layers[index].format.bytes_per_token
            for index, shape in enumerate(shapes)
        )
        sinks = calibration.sinks * whole * model.dtype.itemsize
        return Cost(page=PAGE_SIZE * packed, sinks=sinks, elements=whole)


class PooledLayer(PackedLayer):
    """One layer: a ``PackedLayer`` whose pages and sinks are those of all sequences."""

    layout: PoolLayout | None

    def allocate(
        self, num_pages: int, num_sinks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take all memory; one more place for sinks, of rows of padding, is never written."""
        self.transform = on(device, self.given)
        heads, width = self.transform.key.base_H.numel(), self.transform.format.head_dim
        self.store = PageStore(self.transform.format, heads, device)
        self.store.prepare(num_pages, [])
        shape = (num_sinks + 1, heads, self.placement.sequences.sinks, width)
        self.sinks = (
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )
        self.is_initialized = True

    def held(self) -> list[Tensor]:
        """All tensors of tokens."""
        assert self.sinks is not None
        return [*self.pages.tensors(), *self.sinks]

    def _store(self, layout: Layout, fresh_k: Tensor, fresh_v: Tensor) -> Visible:
        assert isinstance(layout, PoolLayout)
        assert self.sinks is not None
        k, v = (held[layout.sink_B] for held in self.sinks)
        visible = Visible(
            pages=self.pages,
            transform=self.transform,
            layout=layout,
            dense=DenseKV(
                k_BHND=torch.cat((k, fresh_k), dim=2),
                v_BHND=torch.cat((v, fresh_v), dim=2),
                position_BN=layout.dense_position_BN,
            ),
            window=self.placement.window,
        )
        self._encode(layout, fresh_k, fresh_v)
        assert layout.sink_BTS is not None
        sequence, column, sink = layout.sink_BTS
        for held, fresh in zip(self.sinks, (fresh_k, fresh_v), strict=True):
            held[layout.sink_B[sequence], :, sink] = fresh[sequence, :, column]
        return visible
