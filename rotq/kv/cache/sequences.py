"""Which tokens a batch of sequences consists of, and what one forward pass adds to them.

A column is what transformers counts: one entry of the attention mask, a token or padding. Padding
is never stored, so every sequence numbers its own tokens 0, 1, ...; token i is at RoPE position
``first + i``. By number, the first ``sinks`` tokens and the last ``recent`` stay whole, and those
in between are packed in order:

    0 ... sinks | packed ... | count - recent ... count

All of this is the same for all layers, and is kept on the CPU.

Shape suffixes: B sequences, T columns of a forward pass, N columns so far or kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.layout import NO_TOKEN


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward pass adds."""

    number_BT: Tensor
    """int64 number of each token in its sequence; NO_TOKEN for padding."""
    position_BT: Tensor
    """int32 RoPE positions; NO_TOKEN for padding."""
    counts: list[int]
    """Tokens of each sequence afterwards."""
    firsts: list[int]
    """Position of each sequence's token 0."""
    there_BT: Tensor
    """bool: a token, not padding."""


@dataclass(kw_only=True)
class Sequences:
    """The tokens seen so far."""

    sinks: int
    recent: int
    counts: list[int] = field(default_factory=list)
    """Tokens of each sequence; empty before the first forward pass."""
    firsts: list[int] = field(default_factory=list)
    num_columns: int = 0
    """What transformers calls the length of the cache."""
    padded_BN: Tensor | None = None
    """bool, of every column: a token, not padding; None while no column has been padding."""

    @property
    def there_BN(self) -> Tensor:
        """bool, of every column: a token, not padding."""
        if self.padded_BN is not None:
            return self.padded_BN
        return torch.ones(len(self.counts), self.num_columns, dtype=torch.bool)

    def packed(self, counts: list[int]) -> list[int]:
        """Packed tokens of sequences of so many tokens."""
        return [max(0, count - self.sinks - self.recent) for count in counts]

    def plan(
        self, batch: int, length: int, mask_BN: Tensor | None, position_BT: Tensor | None
    ) -> Step:
        """Number the tokens of a forward pass.

        Args:
            batch: B.
            length: T.
            mask_BN: Attention mask over all columns, the new ones last; None if all are tokens.
            position_BT: RoPE positions, (B, T) or (1, T); None for what transformers does then,
                the column's number.

        Raises:
            RotqError: the mask or the positions say what a packed cache cannot be.
        """
        if self.counts and batch != len(self.counts):
            raise RotqError(f"the cache holds {len(self.counts)} sequences, the input {batch}")
        there_BT = self._new_tokens(batch, length, mask_BN)
        counts_B = torch.tensor(self.counts or [0] * batch)
        number_BT = counts_B[:, None] + there_BT.cumsum(1) - 1
        if position_BT is None:
            position_BT = torch.arange(self.num_columns, self.num_columns + length)[None]
        position_BT = position_BT.to("cpu", torch.int64).expand(batch, length)
        first_B = torch.tensor(self.firsts or [0] * batch)
        found_B = torch.where(there_BT, position_BT - number_BT, torch.iinfo(torch.int64).max)
        first_B = torch.where(counts_B > 0, first_B, found_B.amin(1))
        first_B = first_B.where((counts_B > 0) | there_BT.any(1), 0)
        wrong_BT = there_BT & ((position_BT - number_BT != first_B[:, None]) | (position_BT < 0))
        if bool(wrong_BT.any()):
            b, t = wrong_BT.nonzero()[0].tolist()
            raise RotqError(
                f"sequence {b} has a token at position {int(position_BT[b, t])} where "
                f"{int(first_B[b] + number_BT[b, t])} follows; {self._reason(b, there_BT)}"
            )
        return Step(
            number_BT=number_BT.where(there_BT, NO_TOKEN),
            position_BT=position_BT.where(there_BT, NO_TOKEN).int(),
            counts=(counts_B + there_BT.sum(1)).tolist(),
            firsts=first_B.tolist(),
            there_BT=there_BT,
        )

    def _reason(self, b: int, there_BT: Tensor) -> str:
        """Why the positions of a sequence are not in order, and what to do."""
        there_N = torch.cat((self.there_BN[b], there_BT[b])) if self.counts else there_BT[b]
        if bool((there_N[:-1] & ~there_N[1:]).any()):
            return (
                "it is padded on the right, and generate() counts padding there as positions: pad "
                'on the left (tokenizer.padding_side = "left")'
            )
        return "a packed cache takes tokens in order"

    def counted(self, batch: int, length: int, mask_BN: Tensor | None) -> Tensor:
        """Positions (B, T) of families that count the tokens of the mask; -1 for padding.

        Args:
            batch: B.
            length: T.
            mask_BN: As for ``plan``.

        Raises:
            RotqError: as ``plan``.
        """
        there_BT = self._new_tokens(batch, length, mask_BN)
        before_B = torch.tensor(self.counts or [0] * batch)
        return (before_B[:, None] + there_BT.cumsum(1) - 1).where(there_BT, NO_TOKEN)

    def _new_tokens(self, batch: int, length: int, mask_BN: Tensor | None) -> Tensor:
        before = self.num_columns
        if mask_BN is None:
            if self.padded_BN is None:
                return torch.ones(batch, length, dtype=torch.bool)
            mask_BN = torch.ones(batch, before + length, dtype=torch.bool)
        if mask_BN.ndim != 2 or mask_BN.shape != (batch, before + length):
            raise RotqError(
                f"a packed cache needs an attention mask of shape ({batch}, {before + length}), "
                f"got {tuple(mask_BN.shape)}"
            )
        if self.padded_BN is None and int(mask_BN.count_nonzero()) == mask_BN.numel():
            # all that a device has to say
            return torch.ones(batch, length, dtype=torch.bool)
        mask_BN = mask_BN.to("cpu", torch.bool)
        if before and not torch.equal(mask_BN[:, :before], self.there_BN):
            raise RotqError(
                "the attention mask differs from the one that the cached tokens came with; "
                "a packed cache stores no padding and cannot show or hide tokens later"
            )
        return mask_BN[:, before:]

    def advance(self, step: Step) -> None:
        """Take over what a finished forward pass added."""
        if self.padded_BN is not None or not bool(step.there_BT.all()):
            before_BN = self.there_BN if self.counts else step.there_BT[:, :0]
            self.padded_BN = torch.cat((before_BN, step.there_BT), dim=1)
        self.num_columns += step.there_BT.shape[1]
        self.counts, self.firsts = step.counts, step.firsts

    def select(self, indices: list[int]) -> None:
        """Let sequence i be what sequence ``indices[i]`` was."""
        self.counts = [self.counts[index] for index in indices]
        self.firsts = [self.firsts[index] for index in indices]
        if self.padded_BN is not None:
            self.padded_BN = self.padded_BN[indices]

    def without_last(self, num_columns: int) -> list[int]:
        """Tokens of each sequence without the last columns."""
        if self.padded_BN is None:
            return [count - num_columns for count in self.counts]
        gone_B = self.padded_BN[:, self.num_columns - num_columns :].sum(1)
        return (torch.tensor(self.counts) - gone_B).tolist()

    def crop(self, num_columns: int) -> None:
        """Forget the last columns."""
        self.counts = self.without_last(num_columns)
        self.num_columns -= num_columns
        if self.padded_BN is not None:
            self.padded_BN = self.padded_BN[:, : self.num_columns]

    def clear(self) -> None:
        """Forget all sequences."""
        self.counts, self.firsts = [], []
        self.num_columns, self.padded_BN = 0, None
