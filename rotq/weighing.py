"""The importance of each calibration token in a block, by the recipe's strategy.

Shape suffixes: B windows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.capture import run_block
from rotq.calibration.importance import (
    attention_received,
    frequency_score,
    hidden_score,
    token_weights,
)
from rotq.calibration.streams import Streams
from rotq.models.observed_attention import observed_attention
from rotq.models.skeleton import Skeleton
from rotq.precision import matmul_precision
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
        if importance.strategy == "token_frequency":
            counts_V = torch.bincount(torch.cat([ids_BT.flatten() for ids_BT in streams.ids]))
            scores = [frequency_score(ids_BT, counts_V).to(self.device) for ids_BT in streams.ids]
        else:
            with matmul_precision(self.recipe.calibration.precision):
                scores = [
                    self._score(index, block, hidden_BTD.to(self.device))
                    for hidden_BTD in streams.quantized.hidden
                ]
        return [token_weights(score_BT, importance) for score_BT in scores]

    def _score(self, index: int, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        importance = self.recipe.importance
        kwargs = self.skeleton.block_kwargs(index, hidden_BTD)
        if importance.strategy == "attention":
            received: list[Tensor] = []

            def observe(query: Tensor, key: Tensor, **how: Any) -> None:
                received.append(attention_received(query, key, **how))

            with observed_attention(block, observe):
                run_block(block, hidden_BTD, kwargs)
            return torch.stack(received).sum(0)
        return hidden_score(
            importance.strategy,
            hidden_BTD,
            lambda: run_block(block, hidden_BTD, kwargs),
            importance.first_n,
        )


def effective_share(weights: list[Tensor] | None) -> float:
    """Effective sample size (sum r)^2 / sum r^2 over the number of tokens; 1 without weights."""
    if weights is None:
        return 1.0
    flat_M = torch.cat([weight_BT.flatten() for weight_BT in weights]).double()
    return (flat_M.sum() ** 2 / flat_M.square().sum() / flat_M.numel()).item()
