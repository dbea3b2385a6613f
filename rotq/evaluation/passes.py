"""One pass of a model over several rows of tokens, packed where the model can be, else padded.

Shape suffixes: B rows, T positions, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.batches import Batch, filled, padded
from rotq.errors import RotqError
from rotq.models.attention.packed import packed_rows, packs_rows, row_positions
from rotq.models.limits import embedding_device, vocabulary_of


@dataclass(frozen=True, kw_only=True)
class RowPass:
    """What a model put out for some rows."""

    output: Any
    """Of transformers."""
    starts: tuple[int, ...] | None
    """First token of each row where rows are packed; None where they are padded."""
    lengths: tuple[int, ...]

    def row(self, tensor: Tensor, number: int) -> Tensor:
        """A row's own part of a tensor of the output, (T, ...)."""
        if self.starts is None:
            return tensor[number, : self.lengths[number]]
        start = self.starts[number]
        return tensor[0, start : start + self.lengths[number]]

    def logits(self, number: int) -> Tensor:
        """Of a row, (T, V)."""
        return self.row(self.output.logits, number)


def batches_of_rows(
    models: Sequence[Any], rows: Sequence[Sequence[int]], tokens: int
) -> list[list[int]]:
    """Indices of rows for passes, the longest first: as many as ``tokens`` hold.

    Padding is counted where one of the models needs it. A single row may have more.
    """
    return filled(rows, tokens, packed=all(map(packs_rows, models)))


def run_rows(model: Any, rows: Sequence[Sequence[int]], pad_id: int, **options: Any) -> RowPass:
    """One pass over all rows.

    Args:
        model: Of transformers, on any device.
        rows: Token ids.
        pad_id: Fills up where rows of different lengths cannot be packed.
        options: Of the model's forward.

    Raises:
        RotqError: as ``run_batch``.
    """
    lengths = tuple(map(len, rows))
    if len(set(lengths)) == 1 or not packs_rows(model):
        output = run_batch(model, padded(rows, pad_id, frozenset()), **options)
        return RowPass(output=output, starts=None, lengths=lengths)
    ids_1N = torch.tensor([[id for row in rows for id in row]])
    position_1N = row_positions(model, lengths).to(embedding_device(model))
    with packed_rows(model, lengths):
        output = run_batch(model, Batch(ids_BT=ids_1N), position_ids=position_1N, **options)
    starts = tuple(accumulate(lengths[:-1], initial=0))
    return RowPass(output=output, starts=starts, lengths=lengths)


def run_batch(model: Any, batch: Batch, **options: Any) -> Any:
    """The output of a language model for a batch, padding masked.

    Raises:
        RotqError: a token id outside the embedding, or logits that are not finite.
    """
    num_embeddings = vocabulary_of(model)
    if int(batch.ids_BT.max()) >= num_embeddings:
        raise RotqError(
            f"token id {int(batch.ids_BT.max())} is outside the model's {num_embeddings} "
            "embeddings; is the tokenizer the model's own?"
        )
    device = embedding_device(model)
    mask_BT = batch.mask_on(device)
    output = model(input_ids=batch.ids_BT.to(device), attention_mask=mask_BT, **options)
    if not bool(torch.isfinite(output.logits).all()):
        raise RotqError("the model's logits are not finite")
    return output
