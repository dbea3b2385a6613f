"""Calibration windows for masked language models of proteins: one sequence each.

Sequences are drawn without replacement; one that is too long for a window gives a random piece of
it. A share of the residues is masked, as in training, because that is where such a model is asked.
"""

from __future__ import annotations

import torch

from rotq.calibration.batches import Batch, bucketed
from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.errors import RotqError
from rotq.recipe import Calibration


def draw_proteins(
    calibration: Calibration, records: tuple[Record, ...], codec: ResidueCodec
) -> tuple[Batch, ...]:
    """Windows of up to ``seq_len`` tokens, special tokens included, in batches of like length.

    Args:
        calibration: Number, length, share of masked residues, seed, and windows of a batch. Where
            there are fewer sequences than windows, each is taken once.

    Raises:
        RotqError: ``seq_len`` leaves no room for a residue.
    """
    room = calibration.seq_len - codec.num_special
    if room < 1:
        raise RotqError(
            f"calibration.seq_len={calibration.seq_len} leaves no room for a residue between "
            f"{codec.num_special} special tokens"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    order = torch.randperm(len(records), generator=generator)[: calibration.num_samples].tolist()
    windows = []
    for index in order:
        sequence = records[index].sequence
        start = int(torch.randint(0, max(1, len(sequence) - room + 1), (), generator=generator))
        ids = codec.encode(sequence[start : start + room])
        windows.append(_masked(ids, codec, calibration.masked, generator))
    special = frozenset(codec.around[0] + codec.around[1])
    mask_id = codec.mask_id if calibration.masked else None
    return tuple(bucketed(windows, calibration.batch_size, codec.pad_id, special, mask_id))


def _masked(
    ids: list[int], codec: ResidueCodec, share: float, generator: torch.Generator
) -> list[int]:
    """Some residues replaced by the mask token."""
    if not share:
        return ids
    hidden = torch.rand(len(ids), generator=generator) < share
    return [
        codec.mask_id if hide and id in codec.scored else id
        for id, hide in zip(ids, hidden.tolist(), strict=True)
    ]
