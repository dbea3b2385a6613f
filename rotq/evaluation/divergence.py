"""How far a model's next-token distribution is from a reference's.

    KL = mean_t sum_v p_ref(v) (log p_ref(v) - log p(v))     nats per token
    top-1 = share of positions where argmax p_ref = argmax p

Shape suffixes: T positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.devices import double
from rotq.errors import RotqError


@dataclass(frozen=True)
class Divergence:
    """Sums over positions, so that windows add up."""

    kl_sum: float = 0.0
    agreements: int = 0
    positions: int = 0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(
            self.kl_sum + other.kl_sum,
            self.agreements + other.agreements,
            self.positions + other.positions,
        )

    @property
    def kl(self) -> float:
        """Mean KL(reference || model), in nats per token."""
        return self.kl_sum / self.positions

    @property
    def top1(self) -> float:
        """Share of positions where both most likely tokens are the same."""
        return self.agreements / self.positions


def compare(reference_TV: Tensor, logits_TV: Tensor, *, chunk: int) -> Divergence:
    """KL(reference || model) and top-1 agreement over positions.

    Args:
        reference_TV: Logits of the reference, any float dtype, same device as ``logits_TV``.
        logits_TV: Logits of the model.
        chunk: Positions whose fp32 log-probabilities are held at a time.

    Raises:
        RotqError: the vocabularies differ.
    """
    if reference_TV.shape != logits_TV.shape:
        raise RotqError(
            f"the reference has a vocabulary of {reference_TV.shape[-1]}, "
            f"the model one of {logits_TV.shape[-1]}"
        )
    kl_sum, agreements = 0.0, 0
    for reference_CV, logits_CV in zip(
        reference_TV.split(chunk), logits_TV.split(chunk), strict=True
    ):
        log_p_CV = torch.log_softmax(reference_CV.float(), dim=-1)
        log_q_CV = torch.log_softmax(logits_CV.float(), dim=-1)
        kl_C = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dim=-1)
        kl_sum += float(double(kl_C).sum())
        agreements += int((reference_CV.argmax(dim=-1) == logits_CV.argmax(dim=-1)).sum())
    return Divergence(kl_sum, agreements, reference_TV.shape[0])
