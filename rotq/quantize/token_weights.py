"""The importance of each calibration token in a block, by the recipe's strategy.

Shape suffixes: B windows, T positions, D hidden size, M tokens that are no padding, G groups of
rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.batches import Batch
from rotq.calibration.capture import run_block
from rotq.calibration.importance import (
    attention_received,
    frequency_score,
    hidden_score,
    weights_from_scores,
)
from rotq.calibration.streams import Streams
from rotq.devices import double
from rotq.job.context import Job
from rotq.models.attention.observed import observed_attention
from rotq.numerics import matmul_precision
from rotq.quantize.gradients import gradient_weights
from rotq.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """How much each token counts in a block's Hessians."""

    by_site: Mapping[str, Sequence[Tensor]]
    """For each batch (M, G) fp32, by the name of the site; what "" has is of all sites."""

    def of(self, site: str, batch: int) -> Tensor:
        """(M, G) of one batch; a Hessian for each of the G groups of rows."""
        return self.by_site.get(site, self.by_site.get("", ()))[batch]

    def effective_share(self, ranks: Ranks) -> float:
        """Effective sample size (sum r)^2 / sum r^2 over the number of tokens, mean of all."""
        shares = []
        for batches in self.by_site.values():
            r_MG = double(torch.cat(list(batches))).cpu()
            (tokens,) = ranks.total(len(r_MG))
            sum_G, squares_G = r_MG.sum(0), r_MG.square().sum(0)
            ranks.sum_(sum_G, squares_G)
            shares.append(sum_G**2 / squares_G / tokens)
        return torch.stack(shares).mean().item()


def token_weights(job: Job, index: int, block: nn.Module, streams: Streams) -> TokenWeights | None:
    """Weights of every token; None if all count the same.

    Args:
        job: Of its recipe, ``importance``. What gradients weigh is there already.
        index: Of the block in the model.
        block: About to be quantized; scores are taken on the quantized stream with it.
        streams: Before the block.
    """
    strategy = job.recipe.importance.strategy
    if strategy == "none":
        return None
    if strategy == "gradient":
        return TokenWeights(by_site=gradient_weights(job, index))
    scored = zip(_scores(job, index, block, streams), streams.batches, strict=True)
    return TokenWeights(by_site={"": [_weights(job, *of_batch) for of_batch in scored]})


def _scores(job: Job, index: int, block: nn.Module, streams: Streams) -> list[Tensor]:
    """(B, T) of each batch, larger is more important."""
    if job.recipe.importance.strategy == "token_frequency":
        return _frequency_scores(job.windows.batches, streams.batches)
    by_attention = job.recipe.importance.strategy == "attention"
    score = _attention_score if by_attention else _hidden_score
    with matmul_precision(job.recipe.calibration.precision):
        return [
            score(job, index, block, hidden_BTD.to(job.device), batch)
            for hidden_BTD, batch in zip(streams.quantized.hidden, streams.batches, strict=True)
        ]


def _weights(job: Job, score_BT: Tensor, batch: Batch) -> Tensor:
    """(M, 1), mean 1 per window."""
    weight_BT = weights_from_scores(score_BT.to(job.device), job.recipe.importance, batch)
    return batch.without_padding(weight_BT.flatten())[:, None]


def _attention_score(
    job: Job, index: int, block: nn.Module, hidden_BTD: Tensor, batch: Batch
) -> Tensor:
    mask_BT = batch.mask_on(job.device)
    real_BT = None if mask_BT is None else mask_BT.bool()
    received: list[Tensor] = []

    def observe(query: Tensor, key: Tensor, **how: Any) -> None:
        received.append(attention_received(query, key, real_BT=real_BT, **how))

    with observed_attention(block, observe):
        run_block(block, hidden_BTD, job.skeleton.block_kwargs(index, hidden_BTD, mask_BT))
    return torch.stack(received).sum(0)


def _hidden_score(
    job: Job, index: int, block: nn.Module, hidden_BTD: Tensor, batch: Batch
) -> Tensor:
    importance = job.recipe.importance
    kwargs = job.skeleton.block_kwargs(index, hidden_BTD, batch.mask_on(job.device))
    output = functools.cache(lambda: run_block(block, hidden_BTD, kwargs))
    score_BT = torch.zeros(hidden_BTD.shape[:2], device=job.device)
    for part in batch.windows():

        def inside(part: tuple[slice, slice] = part) -> Tensor:
            return output()[part]

        score_BT[part] = hidden_score(
            importance.strategy, hidden_BTD[part], inside, importance.first_n
        )
    return score_BT


def _frequency_scores(batches: Sequence[Batch], scored: Sequence[Batch]) -> list[Tensor]:
    """Of the tokens of some, by their count in all batches; padding is not counted."""
    real = [batch.without_padding(batch.ids_BT.flatten()) for batch in batches]
    # the padding's id may be larger than any that a window holds
    largest = max(int(batch.ids_BT.max()) for batch in batches)
    counts_V = torch.bincount(torch.cat(real), minlength=largest + 1)
    return [frequency_score(batch.ids_BT, counts_V) for batch in scored]
