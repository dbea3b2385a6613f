"""The importance of each calibration token in a block, by the recipe's strategy.

Shape suffixes: B windows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.batches import Batch
from rotq.calibration.capture import run_block
from rotq.calibration.importance import (
    attention_received,
    frequency_score,
    hidden_score,
    token_weights,
)
from rotq.calibration.streams import Streams
from rotq.models.attention.observed import observed_attention
from rotq.models.skeleton import Skeleton
from rotq.numerics import matmul_precision
from rotq.recipe import Recipe


class TokenWeigher:
    """Scores tokens on the quantized stream, with the block that is about to be quantized."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, device: torch.device) -> None:
        self.skeleton, self.recipe, self.device = skeleton, recipe, device

    def weights(self, index: int, block: nn.Module, streams: Streams) -> list[Tensor] | None:
        """(B, T) weights of each batch, mean 1 per window; None if all tokens count the same."""
        importance = self.recipe.importance
        if importance.strategy == "none":
            return None
        batches = streams.batches
        if importance.strategy == "token_frequency":
            counts_V = torch.bincount(torch.cat([_real(b.ids_BT.flatten(), b) for b in batches]))
            scores = [frequency_score(b.ids_BT, _reaching(counts_V, b)) for b in batches]
        else:
            with matmul_precision(self.recipe.calibration.precision):
                scores = [
                    self._score(index, block, hidden_BTD.to(self.device), batch)
                    for hidden_BTD, batch in zip(streams.quantized.hidden, batches, strict=True)
                ]
        return [
            token_weights(score_BT.to(self.device), importance, batch)
            for score_BT, batch in zip(scores, batches, strict=True)
        ]

    def _score(self, index: int, block: nn.Module, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        importance = self.recipe.importance
        mask_BT = batch.mask_on(self.device)
        kwargs = self.skeleton.block_kwargs(index, hidden_BTD, mask_BT)
        if importance.strategy == "attention":
            received: list[Tensor] = []
            real_BT = None if mask_BT is None else mask_BT.bool()

            def observe(query: Tensor, key: Tensor, **how: Any) -> None:
                received.append(attention_received(query, key, real_BT=real_BT, **how))

            with observed_attention(block, observe):
                run_block(block, hidden_BTD, kwargs)
            return torch.stack(received).sum(0)
        output = functools.cache(lambda: run_block(block, hidden_BTD, kwargs))
        score_BT = torch.zeros(hidden_BTD.shape[:2], device=self.device)
        for row, length in enumerate(batch.lengths()):
            part = (slice(row, row + 1), slice(length))

            def inside(part: tuple[slice, slice] = part) -> Tensor:
                return output()[part]

            score_BT[part] = hidden_score(
                importance.strategy, hidden_BTD[part], inside, importance.first_n
            )
        return score_BT


def _real(x_M: Tensor, batch: Batch) -> Tensor:
    return x_M if batch.real_M is None else x_M[batch.real_M]


def _reaching(counts_V: Tensor, batch: Batch) -> Tensor:
    """Counts with zeros up to the padding's id, which no window may hold."""
    missing = int(batch.ids_BT.max()) + 1 - len(counts_V)
    return torch.nn.functional.pad(counts_V, (0, max(0, missing)))


def effective_share(weights: list[Tensor] | None) -> float:
    """Effective sample size (sum r)^2 / sum r^2 over the number of tokens; 1 without weights."""
    if weights is None:
        return 1.0
    flat_M = torch.cat([weight_BT.flatten() for weight_BT in weights]).double()
    # only padding has weight 0
    return (flat_M.sum() ** 2 / flat_M.square().sum() / flat_M.count_nonzero()).item()
