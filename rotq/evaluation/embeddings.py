"""Embeddings of proteins: hidden states of a layer, for each residue or their mean.

Special tokens and padding are left out. A checkpoint whose residual stream is rotated gives its
hidden states in another basis; ``OriginalBasis`` leads them back, so that what was trained on the
original model's embeddings goes on working.

Shape suffixes: B rows of a batch, T positions, D hidden size, L residues of one protein, M rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.devices import double
from rotq.errors import RotqError
from rotq.evaluation.passes import batches_of_rows, run_rows
from rotq.evaluation.representations import OriginalBasis

Pooling = Literal["residue", "mean"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingProtocol:
    """What is taken of a model."""

    layer: int = -1
    """As transformers counts hidden states: 0 is what the first block is given, -1 the last, behind
    the final norm."""
    pooling: Pooling = "mean"
    batch_tokens: int = 8192
    """Of a forward pass, padding included; a single row may have more."""


def check_layer(layer: int, blocks: int) -> None:
    """Refuse hidden states that a model of so many blocks does not have.

    Raises:
        RotqError: there are none of that number.
    """
    if not -blocks - 1 <= layer <= blocks:
        raise RotqError(f"layer {layer}: the model has hidden states {-blocks - 1} to {blocks}")


def check_lengths(records: Sequence[Record], positions: int | None, special: int) -> None:
    """Refuse a protein that is longer than a model's table of positions; names it.

    Args:
        records: With their sequences.
        positions: None bounds nothing.
        special: Tokens around each.

    Raises:
        RotqError: there is one.
    """
    for record in records:
        if positions is not None and len(record.sequence) + special > positions:
            raise RotqError(
                f"{record.name}: {len(record.sequence)} residues, and the model's {positions} "
                f"positions leave room for {positions - special}"
            )


@torch.inference_mode()
def embed(
    model: Any,
    codec: ResidueCodec,
    records: Sequence[Record],
    protocol: EmbeddingProtocol,
    basis: OriginalBasis | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Embeddings of all proteins, those of like length together, the longest first.

    Args:
        model: A language model of transformers, masked or causal, on any device.
        codec: Of its tokenizer.
        records: Not empty; each fits the model's positions.
        protocol: What is taken.
        basis: That hidden states are led back from.

    Yields:
        Index of the record and its embedding, fp32 on the CPU: (L, D), or (D,) for the mean.

    Raises:
        RotqError: logits that are not finite.
    """
    ids = [codec.encode(record.sequence) for record in records]
    first = len(codec.around[0])
    for batch in batches_of_rows([model], ids, protocol.batch_tokens):
        rows = [ids[index] for index in batch]
        passed = run_rows(model, rows, codec.pad_id, output_hidden_states=True)
        hidden = passed.output.hidden_states[protocol.layer]
        for row, index in enumerate(batch):
            length = len(records[index].sequence)
            hidden_LD = passed.row(hidden, row)[first : first + length]
            found_LD = double(hidden_LD) if basis is None else basis.restore(hidden_LD)
            pooled = found_LD.mean(0) if protocol.pooling == "mean" else found_LD
            yield index, pooled.float().cpu()
