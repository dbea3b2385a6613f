"""Where the tokens of a forward pass go: sinks, packed pages, the recent window.

Worked out once for all layers of the same page size and window. The fresh columns follow the
recent columns that are still held; the columns that leave the recent window are coded into pages,
and each token is attended to in one place only, the one it had before the pass.

Shape suffixes: B sequences, T fresh columns, N dense columns (sinks, recent, fresh), E columns to
be coded, J pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.layout import NO_TOKEN, Layout, extent_of
from rotq.kv.cache.pages import PageTable
from rotq.kv.cache.sequences import Sequences, Step


@dataclass(kw_only=True)
class CacheLayout(Layout):
    """One forward pass for the layers of one ``Placement``."""

    has_sinks: bool
    """The dense columns begin with the sinks."""
    num_pages: int
    copies: list[tuple[int, int]]
    """Of pages, before anything is written; see ``PageTable.reserve``."""
    encode: slice
    """Of the recent and fresh columns: what is coded, or nothing."""
    sink_BTS: Tensor | None
    """int64 (3, number): sequence, fresh column and sink of each new sink; None without."""
    keep: int
    """Recent and fresh columns from here on stay in the recent window."""


@dataclass(kw_only=True)
class Placement:
    """The places of all tokens for layers of one page size and window."""

    sequences: Sequences
    table: PageTable
    window: int
    """Keys that a query sees, itself included; 0 for all."""
    dropped: list[int] = field(default_factory=list)
    """Packed tokens of each sequence that left the window with their whole page."""
    recent_BN: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """Numbers of the tokens in the recent columns; NO_TOKEN for padding."""

    def begin(self, step: Step, *, recording: bool) -> CacheLayout:
        """Give places to the tokens of ``step``.

        Args:
            step: Of ``Sequences.plan``.
            recording: Keep what ``crop`` may need.
        """
        sequences, batch = self.sequences, len(step.counts)
        if not self.dropped:
            self.dropped = [0] * batch
            self.table.begin(batch)
            self.recent_BN = torch.zeros(batch, 0, dtype=torch.int64)
        counts = sequences.counts or [0] * batch
        if not recording:
            self._drop_hidden(counts)
        before = self._packed_before(counts, step)
        number_BN = torch.cat((self.recent_BN, step.number_BT), dim=1)
        dense_BN, has_sinks = self._dense_positions(counts, step)
        num_pages, copies = self._reserve(counts, step, recording)
        encode, slot_BE = self._slots(number_BN, counts, step)
        position_BN = (torch.tensor(step.firsts)[:, None] + number_BN)[:, encode]
        keep = self._first_kept(number_BN, step.counts, recording)
        self.recent_BN = number_BN[:, keep:]
        return CacheLayout(
            query_position_BT=step.position_BT,
            **before,
            dense_position_BN=dense_BN,
            extent=extent_of(step.position_BT, before["length_B"], dense_BN),
            has_sinks=has_sinks,
            num_pages=num_pages,
            copies=copies,
            encode=encode,
            encode_position_BE=position_BN.where(slot_BE >= 0, NO_TOKEN).int(),
            encode_slot_BE=slot_BE,
            sink_BTS=_new_sinks(step, sequences.sinks),
            keep=keep,
        )

    def _packed_before(self, counts: list[int], step: Step) -> dict[str, Any]:
        """What the pass finds packed. Pages it releases or copies still hold that for it."""
        start_B = torch.tensor(step.firsts) + self.sequences.sinks + torch.tensor(self.dropped)
        packed = self._in_pages(self.sequences.packed(counts))
        return {
            "page_table_BJ": self.table.tensor(),
            "length_B": torch.tensor(packed, dtype=torch.int32),
            "start_B": start_B.int(),
        }

    def _dense_positions(self, counts: list[int], step: Step) -> tuple[Tensor, bool]:
        """Positions of sinks, if there are any, recent and fresh columns, where still whole."""
        sinks, first_B1 = self.sequences.sinks, torch.tensor(step.firsts)[:, None]
        packed_B1 = torch.tensor(self.sequences.packed(counts))[:, None]
        recent_BN = (first_B1 + self.recent_BN).where(self.recent_BN >= sinks + packed_B1, NO_TOKEN)
        dense_BN = torch.cat((recent_BN, step.position_BT), dim=1)
        there_BS = torch.arange(sinks) < torch.tensor(counts)[:, None]
        if not bool(there_BS.any()):
            return dense_BN.int(), False
        sink_BS = (first_B1 + torch.arange(sinks)).where(there_BS, NO_TOKEN)
        return torch.cat((sink_BS, dense_BN), dim=1).int(), True

    def _reserve(
        self, counts: list[int], step: Step, recording: bool
    ) -> tuple[int, list[tuple[int, int]]]:
        """Pages for what is coded now; none for fresh tokens that no later token will see."""
        size, busy = self.table.page_size, list[int]()
        packed, after = self.sequences.packed(counts), self.sequences.packed(step.counts)
        for b, hidden in enumerate(self._hidden(step.counts)):
            if not recording and hidden // size * size > packed[b]:
                busy += self.table.rows[b]
                self.table.release(b)
                self.dropped[b] = hidden // size * size
        held = [max(0, length) for length in self._in_pages(packed)]
        copies = self.table.reserve(held, self._in_pages(after), busy=busy)
        return self.table.num_pages, copies

    def _in_pages(self, packed: Sequence[int]) -> list[int]:
        return [number - gone for number, gone in zip(packed, self.dropped, strict=True)]

    def _slots(self, number_BN: Tensor, counts: list[int], step: Step) -> tuple[slice, Tensor]:
        """The span of columns that are coded now, and their slots."""
        sinks, size, dropped_B = (
            self.sequences.sinks,
            self.table.page_size,
            torch.tensor(self.dropped),
        )
        first_B = sinks + torch.tensor(self.sequences.packed(counts)).maximum(dropped_B)
        last_B = sinks + torch.tensor(self.sequences.packed(step.counts))
        coded_BN = (number_BN >= first_B[:, None]) & (number_BN < last_B[:, None])
        columns = coded_BN.any(0).nonzero().flatten().tolist()
        span = slice(columns[0], columns[-1] + 1) if columns else slice(0, 0)
        coded_BE = coded_BN[:, span]
        at_BE = (number_BN[:, span] - sinks - dropped_B[:, None]).where(coded_BE, 0)
        if not columns:
            return span, at_BE
        page_BE = self.table.tensor().gather(1, at_BE // size).long()
        return span, (page_BE * size + at_BE % size).where(coded_BE, NO_TOKEN)

    def _first_kept(self, number_BN: Tensor, counts: Sequence[int], recording: bool) -> int:
        """The first column that a later pass or ``crop`` may want whole."""
        if recording and self.sequences.recent:
            return 0
        first_B = self.sequences.sinks + torch.tensor(self.sequences.packed(list(counts)))
        columns = (number_BN >= first_B[:, None]).any(0).nonzero().flatten()
        return int(columns[0]) if columns.numel() else number_BN.shape[1]

    def _hidden(self, counts: Sequence[int]) -> list[int]:
        """Packed tokens of each sequence that its next token does not see."""
        if not self.window:
            return [0] * len(counts)
        packed = self.sequences.packed(list(counts))
        return [
            min(held, max(0, count + 1 - self.window - self.sequences.sinks))
            for held, count in zip(packed, counts, strict=True)
        ]

    def _drop_hidden(self, counts: Sequence[int]) -> None:
        """Release whole pages that left the window."""
        size = self.table.page_size
        for b, hidden in enumerate(self._hidden(counts)):
            pages = (hidden - self.dropped[b]) // size
            if pages > 0:
                self.table.drop_front(b, pages)
                self.dropped[b] += pages * size

    def check_crop(self, counts: Sequence[int]) -> None:
        """Whether everything is still there that sequences of only so many tokens need.

        Raises:
            RotqError: it is not.
        """
        sequences = self.sequences
        packed = sequences.packed(list(counts))
        enough = all(
            gone <= hidden for gone, hidden in zip(self.dropped, self._hidden(counts), strict=True)
        )
        for b, count in enumerate(counts):
            wanted = set(range(sequences.sinks + packed[b], count))
            enough &= not sequences.recent or wanted <= set(self.recent_BN[b].tolist())
        if not enough:
            raise RotqError(
                "the packed cache cannot go back so far exactly: tokens were coded or left their "
                "window; call activate_past_recording() before the tokens that are taken back"
            )

    def crop(self, counts: Sequence[int], num_columns: int) -> slice:
        """Forget the tokens beyond ``counts``, which came in the last columns.

        Returns:
            The recent columns that are still held.
        """
        self.table.crop(self._in_pages(self.sequences.packed(list(counts))))
        self._drop_hidden(counts)
        last = max(0, self.recent_BN.shape[1] - num_columns)
        held = slice(self._first_kept(self.recent_BN[:, :last], counts, recording=False), last)
        self.recent_BN = self.recent_BN[:, held]
        return held

    def select(self, indices: list[int]) -> None:
        """Let sequence i be what sequence ``indices[i]`` was."""
        self.table.select(indices)
        self.dropped = [self.dropped[index] for index in indices]
        self.recent_BN = self.recent_BN[indices]

    def clear(self) -> None:
        """Forget all sequences."""
        self.table = PageTable(page_size=self.table.page_size)
        self.dropped, self.recent_BN = [], self.recent_BN.new_zeros(0, 0)


def _new_sinks(step: Step, sinks: int) -> Tensor | None:
    sequence, column = ((step.number_BT >= 0) & (step.number_BT < sinks)).nonzero(as_tuple=True)
    if not sequence.numel():
        return None
    return torch.stack((sequence, column, step.number_BT[sequence, column]))
