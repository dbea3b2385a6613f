"""How far a model's next-token distribution is from a reference's.

    KL = mean_t sum_v p_ref(v) (log p_ref(v) - log p(v))     nats per token
    top-1 = share of positions where argmax p_ref = argmax p

Shape suffixes: T positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotq.devices import double
from rotq.errors import RotqError

PERCENTILES = {"kl_p50": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}
"""Figures of a report by the share of positions whose KL is below."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """Of all positions, so that windows add up."""

    kl_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Nats, fp64 on the CPU."""
    agreements: int = 0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(torch.cat((self.kl_N, other.kl_N)), self.agreements + other.agreements)

    @property
    def kl(self) -> float:
        """Mean KL(reference || model), in nats per token."""
        return float(self.kl_N.mean())

    @property
    def top1(self) -> float:
        """Share of positions where both most likely tokens are the same."""
        return self.agreements / len(self.kl_N)

    def percentiles(self) -> dict[str, float]:
        """By the names of ``PERCENTILES``, between the two nearest positions."""
        shares = torch.tensor(list(PERCENTILES.values()), dtype=torch.float64)
        return dict(zip(PERCENTILES, self.kl_N.quantile(shares).tolist(), strict=True))


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
    found: list[Tensor] = []
    agreements = 0
    for reference_CV, logits_CV in zip(
        reference_TV.split(chunk), logits_TV.split(chunk), strict=True
    ):
        log_p_CV = torch.log_softmax(reference_CV.float(), dim=-1)
        log_q_CV = torch.log_softmax(logits_CV.float(), dim=-1)
        kl_C = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dim=-1)
        found.append(double(kl_C).cpu())
        agreements += int((reference_CV.argmax(dim=-1) == logits_CV.argmax(dim=-1)).sum())
    return Divergence(torch.cat(found), agreements)
