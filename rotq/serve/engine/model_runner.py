"""Forward passes of fixed shape over a pool.

A matrix product gives a row other roundings when there are more rows beside it, and one flipped
bit becomes another token. So a decode step always has the same number of rows, those that are not
needed are padding, and more sequences than rows go in several passes; a prompt goes alone, in
passes of the same number of columns that end where chunks of pages end. For a fixed shape a row's
result does not depend on the others or on which row it is; ``rows_that_agree`` tries that on the
model before it serves, and takes passes of one row where it does not hold (experts that are given
their tokens together, for example). The price: a lone sequence pays for the padding beside it.

Shape suffixes: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotq.kv.pool.pool import PAGE_SIZE, Pool, Row
from rotq.models.limits import vocabulary_of
from rotq.serve.engine.captured_step import CAPTURED, CapturedStep


class ModelRunner:
    """Runs a model over the sequences of a pool.

    Args:
        model: In eval mode, on one device.
        pool: Made for it.
        rows: Of a decode step.
        chunk_pages: Pages that one pass over a prompt fills.
    """

    def __init__(self, model: Any, pool: Pool, *, rows: int, chunk_pages: int = 1) -> None:
        self.model, self.pool, self.rows = model, pool, rows
        self.chunk_pages = chunk_pages
        self.columns = pool.sinks + chunk_pages * PAGE_SIZE
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.captured: CapturedStep | None = None
        if model.device.type in CAPTURED:
            self.captured = CapturedStep(pool, self._forward, model.device)

    def pass_end(self, start: int, length: int) -> int:
        """Where the pass over a prompt of ``length`` that begins at ``start`` ends."""
        return min(length, start + self.chunk_pages * PAGE_SIZE if start else self.columns)

    def prefill(self, ids: Sequence[int], row: Row, *, all_logits: bool = False) -> Tensor:
        """The next tokens of a prompt.

        Args:
            ids: Up to ``pass_end``.
            row: Its sequence, with as many fresh tokens.
            all_logits: After every token, not the last one only.

        Returns:
            fp32 (1 or tokens, V).
        """
        ids_BT = torch.tensor([[*ids, *[0] * (self.columns - len(ids))]])
        kept = torch.arange(self.columns) if all_logits else torch.tensor([len(ids) - 1])
        logits = self._run(ids_BT, [row], kept)[0]
        return logits[: len(ids)] if all_logits else logits

    def decode(self, ids: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """One token of each sequence, at most ``self.rows`` of them; fp32 (sequences, V)."""
        spare = self.rows - len(rows)
        ids_BT = torch.tensor([*ids, *[0] * spare])[:, None]
        padded = [*rows, *[self.padding()] * spare]
        logits = None if self.captured is None else self._replay(self.captured, ids_BT, padded)
        if logits is None:
            logits = self._run(ids_BT, padded, None)
        return logits[: len(rows), 0]

    @torch.inference_mode()
    def _replay(self, captured: CapturedStep, ids_BT: Tensor, rows: Sequence[Row]) -> Tensor | None:
        logits = captured.run(ids_BT, self._positions(rows, 1), rows)
        return None if logits is None else logits.clone()

    def padding(self) -> Row:
        """A row without a sequence: it fills a step, and its result is dropped."""
        return Row(sink=-1)

    @torch.inference_mode()
    def _run(self, ids_BT: Tensor, rows: Sequence[Row], kept: Tensor | None) -> Tensor:
        device, length = self.model.device, ids_BT.shape[1]
        self.pool.plan(rows, length)
        position_BT = self._positions(rows, length)
        kept = None if kept is None else kept.to(device)
        return self._forward(ids_BT.to(device), position_BT.to(device), kept)

    def _forward(self, ids_BT: Tensor, position_BT: Tensor, kept: Tensor | None = None) -> Tensor:
        """A pass over what the pool was told; fp32 (B, columns, V), all columns if not ``kept``."""
        selects = self._selects and kept is not None
        output = self.model(
            input_ids=ids_BT,
            position_ids=position_BT,
            past_key_values=self.pool,
            use_cache=True,
            **({"logits_to_keep": kept} if selects else {}),
        )
        logits: Tensor = output.logits
        if kept is not None and not selects:
            logits = logits[:, kept]
        return logits.float()

    @staticmethod
    def _positions(rows: Sequence[Row], length: int) -> Tensor:
        """(B, T); padding is at 0, as some models have a table of positions."""
        first_B1 = torch.tensor([[row.count] for row in rows])
        end_B1 = torch.tensor([[row.count + row.fresh] for row in rows])
        position_BT = first_B1 + torch.arange(length)
        return position_BT.where(position_BT < end_B1, 0)


@torch.inference_mode()
def rows_that_agree(model: Any, rows: int) -> int:
    """``rows``, or 1 if a row of so many is not bitwise the same wherever it is.

    Args:
        model: Run without a cache on single tokens, whose attention is trivial; everything else
            has the shapes of a decode step.
        rows: Wanted.
    """
    vocabulary = vocabulary_of(model)
    generator = torch.Generator().manual_seed(0)
    token = int(torch.randint(vocabulary, (), generator=generator))
    seen: Tensor | None = None
    for place in range(rows):
        ids_BT = torch.randint(vocabulary, (rows, 1), generator=generator)
        ids_BT[place] = token
        found_V = model(input_ids=ids_BT.to(model.device), use_cache=False).logits[place, 0]
        if seen is not None and not torch.equal(found_V, seen):
            return 1
        seen = found_V
    return rows
