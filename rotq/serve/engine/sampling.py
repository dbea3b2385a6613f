"""Choosing a token from logits, for one sequence at a time.

One number is drawn for each token, from a generator of the sequence's own, so a seed gives the
same text whatever else is being served. Reported log probabilities are the model's own, before
temperature and truncation.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.devices import double

COLDEST = 1e-5
"""Temperatures from here on down are greedy: the next ones would divide to infinity."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one sequence's tokens are chosen."""

    temperature: float = 1.0
    """Divides the logits; up to ``COLDEST`` it takes the likeliest token."""
    top_p: float = 1.0
    """Likeliest tokens that together have this probability, in (0, 1]."""
    top_k: int = 0
    """Only so many of the likeliest tokens may be chosen; 0 for all."""
    seed: int | None = None
    logprobs: int | None = None
    """Report the chosen token's log probability and so many of the likeliest; None for neither."""


@dataclass(frozen=True, kw_only=True)
class Picked:
    """A token, and what was asked about it."""

    token: int
    logprob: float | None = None
    """Of the model before temperature, in nats; None if it was not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest tokens and their log probabilities, descending."""


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: How.
        index: Which choice of its request; equal seeds shall not give equal choices.
    """

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self.sampling = sampling
        seeded = sampling.seed is not None
        self._random = random.Random(f"{sampling.seed}/{index}") if seeded else random.Random()

    def pick(self, logits_V: Tensor) -> Picked:
        """Choose a token, and describe it as ``sampling.logprobs`` asks."""
        return describe(self._choose(logits_V), logits_V, self.sampling.logprobs)

    def _choose(self, logits_V: Tensor) -> int:
        sampling = self.sampling
        if sampling.temperature <= COLDEST:
            return int(logits_V.argmax())
        scaled_V = double(logits_V) / sampling.temperature
        # equal numbers in the order of their tokens, on every machine
        share_V, token_V = scaled_V.softmax(-1).sort(descending=True, stable=True)
        if sampling.top_k:
            share_V = share_V[: sampling.top_k]
        below_V = share_V.cumsum(-1)
        if sampling.top_p < 1:
            kept = int((below_V - share_V < sampling.top_p * below_V[-1]).sum())
            below_V = below_V[: max(1, kept)]
        drawn = self._random.random() * float(below_V[-1])
        place = int(torch.searchsorted(below_V, drawn, right=True))
        return int(token_V[min(place, len(below_V) - 1)])


def describe(token: int, logits_V: Tensor, logprobs: int | None) -> Picked:
    """A token with its log probability and those of the likeliest."""
    if logprobs is None:
        return Picked(token=token)
    logprob_V = logits_V.float().log_softmax(-1)
    number = min(logprobs, len(logprob_V))
    value, index = logprob_V.topk(number) if number else (logprob_V[:0], logprob_V[:0].long())
    top = tuple(zip(index.tolist(), value.tolist(), strict=True))
    return Picked(token=token, logprob=float(logprob_V[token]), top=top)
