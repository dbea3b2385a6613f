"""The importance of each calibration token in a block, by the recipe's strategy.

Shape suffixes: B windows, T positions, D hidden size, M tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
from rotq.job.context import Job
from rotq.models.attention.observed import observed_attention
from rotq.numerics import matmul_precision


def token_weights(job: Job, index: int, block: nn.Module, streams: Streams) -> list[Tensor] | None:
    """(B, T) weights of each batch, mean 1 per window; None if all tokens count the same.

    Args:
        job: Of its recipe, ``importance``.
        index: Of the block in the model.
        block: About to be quantized; scores are taken on the quantized stream with it.
        streams: Before the block.
    """
    importance, batches = job.recipe.importance, streams.batches
    if importance.strategy == "none":
        return None
    if importance.strategy == "token_frequency":
        scores = _frequency_scores(batches)
    else:
        score = _attention_score if importance.strategy == "attention" else _hidden_score
        with matmul_precision(job.recipe.calibration.precision):
            scores = [
                score(job, index, block, hidden_BTD.to(job.device), batch)
                for hidden_BTD, batch in zip(streams.quantized.hidden, batches, strict=True)
            ]
    return [
        weights_from_scores(score_BT.to(job.device), importance, batch)
        for score_BT, batch in zip(scores, batches, strict=True)
    ]


def effective_share(weights: list[Tensor] | None) -> float:
    """Effective sample size (sum r)^2 / sum r^2 over the number of tokens; 1 without weights."""
    if weights is None:
        return 1.0
    flat_M = torch.cat([weight_BT.flatten() for weight_BT in weights]).double()
    # only padding has weight 0
    return (flat_M.sum() ** 2 / flat_M.square().sum() / flat_M.count_nonzero()).item()


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
    for row, length in enumerate(batch.lengths()):
        part = (slice(row, row + 1), slice(length))

        def inside(part: tuple[slice, slice] = part) -> Tensor:
            return output()[part]

        score_BT[part] = hidden_score(
            importance.strategy, hidden_BTD[part], inside, importance.first_n
        )
    return score_BT


def _frequency_scores(batches: Sequence[Batch]) -> list[Tensor]:
    """Of the tokens of every batch, by their count in all of them; padding is not counted."""
    real = [batch.without_padding(batch.ids_BT.flatten()) for batch in batches]
    # the padding's id may be larger than any that a window holds
    largest = max(int(batch.ids_BT.max()) for batch in batches)
    counts_V = torch.bincount(torch.cat(real), minlength=largest + 1)
    return [frequency_score(batch.ids_BT, counts_V) for batch in batches]
