"""Windows of different lengths in batches of like length, padded on the right.

Shape suffixes: B windows, T positions, M tokens of a batch, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows that are run together."""

    ids_BT: Tensor
    """int64 token ids, padding included."""
    mask_BT: Tensor | None = None
    """int64, 1 where a token is and 0 where padding is; None where nothing is padded."""
    special_BT: Tensor | None = None
    """bool, tokens that stand for no part of the text, as <cls>; None where there are none."""
    hidden_BT: Tensor | None = None
    """bool, tokens that the model is to find; None where it is given all of them."""

    @property
    def asked_BT(self) -> Tensor:
        """bool, where the model's answer counts: at hidden tokens, or at all of the text's."""
        if self.hidden_BT is not None and self.hidden_BT.any():
            return self.hidden_BT
        asked_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        if self.mask_BT is not None:
            asked_BT &= self.mask_BT.bool()
        return asked_BT if self.special_BT is None else asked_BT & ~self.special_BT

    @property
    def real_M(self) -> Tensor | None:
        """bool, what is not padding, as one row; None where nothing is padded."""
        return None if self.mask_BT is None else self.mask_BT.flatten().bool()

    def without_padding(self, x_M: Tensor) -> Tensor:
        """The rows of ``x_M``, one per token, that are no padding; (M, ...) on any device."""
        return x_M if self.real_M is None else x_M[self.real_M.to(x_M.device)]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.ids_BT.numel() if self.mask_BT is None else int(self.mask_BT.sum())

    def lengths(self) -> list[int]:
        """Tokens of each window, padding left out."""
        if self.mask_BT is None:
            return [self.ids_BT.shape[1]] * len(self.ids_BT)
        lengths: list[int] = self.mask_BT.sum(1).tolist()
        return lengths

    def windows(self, longest: int = 0) -> list[tuple[slice, slice]]:
        """Where each window is in a (B, T, ...) tensor, padding cut off.

        Args:
            longest: Tokens from its start, at most; 0 for all.
        """
        return [
            (slice(row, row + 1), slice(min(length, longest or length)))
            for row, length in enumerate(self.lengths())
        ]

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask where the block is."""
        return None if self.mask_BT is None else self.mask_BT.to(device)


def in_order_of_length(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Indices, longest first; equal lengths in the order given."""
    return sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))


def filled(
    sequences: Sequence[Sequence[int]], tokens: int, *, packed: bool = False
) -> list[list[int]]:
    """Indices in batches, the longest first: of each as many as ``tokens`` hold, padding counted.

    A single sequence may have more.

    Args:
        sequences: Token ids of each.
        tokens: Of a batch.
        packed: No padding is made, so none is counted.
    """
    found: list[list[int]] = []
    held = 0
    for index in in_order_of_length(sequences):
        length = len(sequences[index])
        held += length if packed or not found else len(sequences[found[-1][0]])
        if not found or held > tokens:
            found.append([])
            held = length
        found[-1].append(index)
    return found


def bucketed(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    pad_id: int,
    special: frozenset[int],
    mask_id: int | None = None,
) -> list[Batch]:
    """Batches of windows of like length, the longest first.

    Args:
        sequences: Token ids of each window.
        batch_size: Windows of a batch; the last one may have fewer.
        pad_id: Fills up to the longest of a batch.
        special: Ids of tokens that stand for no part of the text.
        mask_id: Id of a token that the model is to find; None where it is given all of them.
    """
    order = in_order_of_length(sequences)
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        padded([sequences[index] for index in group], pad_id, special, mask_id) for group in groups
    ]


def padded(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    special: frozenset[int],
    mask_id: int | None = None,
) -> Batch:
    """One batch of the windows as they come; arguments as for ``bucketed``."""
    longest = max(map(len, sequences))
    rows = [[*ids, *[pad_id] * (longest - len(ids))] for ids in sequences]
    ids_BT = torch.tensor(rows, dtype=torch.int64)
    length_B1 = torch.tensor([[len(ids)] for ids in sequences])
    mask_BT = (torch.arange(longest) < length_B1).long()
    special_BT = None
    if special:
        special_BT = torch.isin(ids_BT, torch.tensor(sorted(special))) & mask_BT.bool()
    return Batch(
        ids_BT=ids_BT,
        mask_BT=None if bool(mask_BT.all()) else mask_BT,
        special_BT=special_BT,
        hidden_BT=None if mask_id is None else ids_BT == mask_id,
    )
