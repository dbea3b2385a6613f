"""Keys and values of many sequences in a fixed amount of memory, for a server.

``PackedCache`` belongs to one call of ``generate``: all its sequences take part in every forward
pass, and it grows. A pool is allocated once; each forward pass names the sequences that are its
rows, by the pages that they hold (who holds which is the caller's book-keeping). Coding, paging
and attention are those of ``PackedCache`` (``packed``), or the same pages hold keys and values in
the model's own precision (``dense``).

The shapes of a pass depend on its number of rows and columns only: tables are as wide as the
longest sequence may be, sinks always have their columns, absent rows and columns are padding. So
what a row computes does not depend on how many others there are or how long they are.

Shape suffixes: B rows, T columns, J pages of a row, S sinks, N keys.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from rotq.errors import RotqError
from rotq.kv.cache.hooks import WatchingCache, attach
from rotq.kv.cache.layout import NO_TOKEN, Layout, extent_of
from rotq.kv.cache.trial import try_out
from rotq.kv.pool import attention
from rotq.models.attention import dispatch

PAGE_SIZE = 64
"""Tokens of a page."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sequence in a forward pass."""

    pages: Sequence[int] = ()
    """For all its tokens but the sinks, those of the pass included."""
    sink: int = 0
    """Its place among the sinks that the pool holds; the last one is for rows of padding."""
    count: int = 0
    """Tokens before the pass."""
    fresh: int = 0
    """Tokens of the pass; the columns after them are padding. 0 for a row of padding."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes of all layers together."""

    page: int
    sinks: int
    """Of the tokens that one sequence keeps whole."""
    elements: int
    """Key and value elements of a token."""

    def of(self, pages: int, sinks: int) -> int:
        """Bytes of so many pages and of the sinks of so many sequences."""
        return pages * self.page + sinks * self.sinks


@dataclass(kw_only=True)
class PoolLayout(Layout):
    """A forward pass over the rows of a pool."""

    sink_B: Tensor
    """int64, where each row's sinks are."""
    sink_BTS: Tensor
    """int64 (3, number): row, column and sink of each new sink."""


def lay_out(rows: Sequence[Row], length: int, *, sinks: int, table_width: int) -> PoolLayout:
    """Where the tokens of a pass are read and written; tensors on the CPU.

    Args:
        rows: Of the pass; token i of a sequence is at position i.
        length: T.
        sinks: S.
        table_width: J.
    """
    count_B1 = torch.tensor([[row.count] for row in rows])
    fresh_B1 = torch.tensor([[row.fresh] for row in rows])
    column_T, sink_S = torch.arange(length), torch.arange(sinks)
    number_BT = (count_B1 + column_T).where(column_T < fresh_B1, NO_TOKEN)
    table = [[*row.pages, *[0] * (table_width - len(row.pages))] for row in rows]
    table_BJ = torch.tensor(table, dtype=torch.int64).view(len(rows), table_width)
    at_BT = number_BT - sinks
    page_BT = table_BJ.gather(1, at_BT.clamp(min=0) // PAGE_SIZE)
    slot_BT = (page_BT * PAGE_SIZE + at_BT % PAGE_SIZE).where(at_BT >= 0, NO_TOKEN)
    sequence, column = ((number_BT >= 0) & (at_BT < 0)).nonzero(as_tuple=True)
    sink_BS = sink_S.where(sink_S < count_B1, NO_TOKEN)
    length_B = (count_B1[:, 0] - sinks).clamp(min=0).int()
    dense_BN = torch.cat((sink_BS, number_BT), dim=1).int()
    return PoolLayout(
        query_position_BT=number_BT.int(),
        page_table_BJ=table_BJ.int(),
        length_B=length_B,
        start_B=torch.full((len(rows),), sinks, dtype=torch.int32),
        dense_position_BN=dense_BN,
        extent=extent_of(number_BT, length_B, dense_BN),
        encode_position_BE=number_BT.where(at_BT >= 0, NO_TOKEN).int(),
        encode_slot_BE=slot_BT,
        sink_B=torch.tensor([row.sink for row in rows]),
        sink_BTS=torch.stack((sequence, column, number_BT[sequence, column])),
    )


class Pool(WatchingCache, Cache):
    """Pages of all layers, and the forward pass that is under way."""

    def __init__(self, layers: list[Any], *, sinks: int, table_width: int) -> None:
        super().__init__(layers=layers)
        self.sinks = sinks
        self.table_width = table_width
        self._layout: PoolLayout | None = None
        self.waits = True
        """Whether a pass waits for the device, to check what it has stored; see ``check``."""

    def attach(self, model: Any) -> None:
        """Let the model use the pool, once all of it is there.

        Raises:
            RotqError: the model cannot.
        """
        attention.register()
        self._decoder = weakref.ref(attach(model, self._try_out, dispatch.POOLED))

    def _try_out(self, decoder: nn.Module) -> None:
        """Run a few tokens of a sequence that holds the first page, and is forgotten."""
        self._decoder = weakref.ref(decoder)

        def run(ids_1T: Tensor, position_1T: Tensor) -> None:
            count, fresh = int(position_1T[0, 0]), position_1T.shape[1]
            self.plan([Row(pages=[0], count=count, fresh=fresh)], fresh)
            decoder(
                input_ids=ids_1T, position_ids=position_1T, past_key_values=self, use_cache=True
            )

        try_out(decoder, run)
        self.forget()

    @abstractmethod
    def forget(self) -> None:
        """Begin anew: what is in pages and sinks is of nobody."""

    def lay_out(self, rows: Sequence[Row], length: int) -> PoolLayout:
        """Where the tokens of a pass are read and written; tensors on the CPU."""
        return lay_out(rows, length, sinks=self.sinks, table_width=self.table_width)

    def plan(self, rows: Sequence[Row], length: int) -> None:
        """Say what the next forward pass of the model adds; it must be given (B, T) tokens."""
        self.use(self.lay_out(rows, length))

    def use(self, layout: PoolLayout) -> None:
        """As ``plan``, with what ``lay_out`` gave, on the CPU or on the model's device."""
        self._layout = layout
        for layer in self.layers:
            layer.layout = layer.visible = layer.uncoded = None

    def begin(self, decoder: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Before a forward pass of the decoder with these arguments; returns what to pass."""
        assert self._decoder() is decoder, "the pool was made for another model"
        assert self._layout is not None, "a forward pass that nobody planned"
        for layer in self.layers:
            layer.layout = self._layout
        shape = tuple(self._layout.query_position_BT.shape)
        # four dimensions: transformers passes it on as it is, and builds none of its own
        mask = torch.empty(shape[0], 1, shape[1], 0, dtype=torch.bool)
        return given | {"attention_mask": mask}

    def finish(self) -> None:
        """After a forward pass.

        Raises:
            RotqError: the model did not use the cache as a decoder does, or ``check`` does.
        """
        for index, layer in enumerate(self.layers):
            if layer.visible is None or not layer.visible.was_read:
                raise RotqError(f"layer {index} of the model did not attend to the cache")
        self.take_over()
        if self.waits:
            self.check(self.flag())
        for layer in self.layers:
            layer.layout = layer.visible = None
        self._layout = None

    @abstractmethod
    def take_over(self) -> None:
        """Store what a pass has left over."""

    def flag(self) -> Tensor | None:
        """bool (), on the device: whether the last pass cannot be relied on; None if it can."""
        return None

    def check(self, flag: Tensor | None) -> None:
        """Wait for a pass that has left this ``flag``, and refuse it if that is set."""

    def steady(self) -> list[Any] | None:
        """Objects with which decode steps stay the same; None where a step looks at its tokens."""
        return None

    @property
    def nbytes(self) -> int:
        """Allocated bytes of pages and sinks."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.held())
