"""How much a calibration text says about keys, values and queries, and moments that say no more.

Second moments of width D need about 2 D independent tokens. Tokens of a text are not: where the
last few tokens are the same, so are keys, values and queries, nearly. Counted are therefore
different contexts, runs of 4 tokens. And a text of few different tokens says nothing about the
others, however long it is: 256 different ones are wanted, or a sixth of a small vocabulary (a
script that a tokenizer spells out in bytes has less, two pages of its own language have more):

    w = min(1, contexts / 2 D, tokens / min(256, V / 6))

Below 1 what was found is mixed with what calibration without data assumes, by w: means with 0,
moments with the identity of the same trace (linear shrinkage: Ledoit and Wolf, A well-conditioned
estimator for large-dimensional covariance matrices, 2004, with w from counts in place of their
estimate, which needs independent samples). Some pages of prose or code have w = 1.

Shape suffixes: B windows, T positions, H KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RUN = 4
"""Tokens of a context."""
_PER_WIDTH = 2
"""Contexts for each element of a head."""
_TOKENS = 256
_SHARE = 6
"""One of so many tokens of the vocabulary suffices where that is less."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is counted in calibration windows."""

    contexts: int
    """Different runs of 4 tokens."""
    tokens: int
    """Different tokens."""
    vocabulary: int
    """V: token ids that the model has."""

    @classmethod
    def of(cls, ids_BT: Tensor, vocabulary: int) -> Evidence:
        """Count.

        Args:
            ids_BT: int64 token ids; shorter windows than a run are one.
            vocabulary: Token ids that the model has.
        """
        run = min(_RUN, ids_BT.shape[1])
        contexts = ids_BT.unfold(1, run, 1).reshape(-1, run).unique(dim=0)
        return cls(contexts=len(contexts), tokens=ids_BT.unique().numel(), vocabulary=vocabulary)

    def weight(self, head_dim: int) -> float:
        """w, above 0 and at most 1."""
        contexts = self.contexts / (_PER_WIDTH * head_dim)
        tokens = self.tokens / min(_TOKENS, self.vocabulary / _SHARE)
        return min(1.0, contexts, tokens)

    def note(self, head_dim: int) -> str:
        """One line where w is below 1, for whoever chose the text; empty where it is not."""
        weight = self.weight(head_dim)
        if weight == 1:
            return ""
        return (
            f"the calibration windows hold {self.contexts} different runs of {_RUN} tokens and "
            f"{self.tokens} different tokens, which is little for heads of width {head_dim}: what "
            f"was found counts {weight:.2g}, constants that need no data the rest; calibrate on "
            "more text, or on more varied text"
        )


def shrunk(M_HDD: Tensor, weight: float) -> Tensor:
    """Of symmetric matrices, w M + (1 - w) tr(M) / D; themselves for a weight of 1."""
    if weight == 1:
        return M_HDD
    D = M_HDD.shape[-1]
    size_H11 = M_HDD.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return weight * M_HDD + (1 - weight) * size_H11 * torch.eye(D, dtype=M_HDD.dtype)
