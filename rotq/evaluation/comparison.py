"""Several checkpoints of one model on one text, and how sure their order is.

    ln ratio    mean_t (nll of the checkpoint - nll of the reference) = ln(ppl / reference's ppl)
    interval    of the ratio, 95 %, by the paired bootstrap: windows are drawn again with
                replacement, the same ones for both models, so that what makes a window hard for
                every model drops out (Efron and Tibshirani 1993, chapter 13)

Neighbouring tokens are no independent draws, windows nearly are: they are what is drawn.

Shape suffixes: W windows, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rotq.evaluation.perplexity import Evaluation, WindowScores, summary

DRAWS = 4000
SHARE = 0.95
"""Of the draws that lie inside an interval."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and where 95 % of its bootstrap draws lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One checkpoint against the reference, and against the first checkpoint."""

    evaluation: Evaluation
    ln_ratio: Interval
    """ln(ppl / the reference's)."""
    against_first: Interval | None
    """ln(ppl / the first checkpoint's); None for that one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def compare_scores(scores: Sequence[WindowScores], protocol: str, *, seed: int) -> list[Compared]:
    """Figures of all checkpoints.

    Args:
        scores: Of the same windows, each with the reference's.
        protocol: In a line.
        seed: Of the draws.
    """
    tokens_W, first = scores[0].tokens, scores[0].nll
    found = []
    for number, one in enumerate(scores):
        found.append(
            Compared(
                evaluation=summary(one, protocol),
                ln_ratio=paired_interval(one.nll, one.reference_nll, tokens_W, seed=seed),
                against_first=(
                    paired_interval(one.nll, first, tokens_W, seed=seed) if number else None
                ),
            )
        )
    return found


def kl_by_position(scores: WindowScores) -> list[float]:
    """Mean KL over windows of the first scored position, the second, ...; nats.

    Raises:
        ValueError: windows differ in length.
    """
    lengths = set(scores.tokens)
    if len(lengths) != 1:
        raise ValueError("positions of windows that differ in length do not compare")
    means_T = scores.divergence.kl_N.view(-1, lengths.pop()).mean(0)
    return [float(value) for value in means_T]


def paired_interval(
    nll_W: Sequence[float], other_W: Sequence[float], tokens_W: Sequence[int], *, seed: int
) -> Interval:
    """Of the mean difference per token.

    Args:
        nll_W: Nats of each window.
        other_W: The same of what is subtracted.
        tokens_W: Scored tokens of each window.
        seed: Of the draws.
    """
    difference_W = np.subtract(nll_W, other_W)
    count_W = np.asarray(tokens_W, dtype=np.float64)
    windows = len(count_W)
    drawn_RW = np.random.default_rng(seed).integers(windows, size=(DRAWS, windows))
    mean_R = difference_W[drawn_RW].sum(1) / count_W[drawn_RW].sum(1)
    # of W windows a draw has the variance (W - 1) / W of what it estimates
    mean = float(difference_W.sum() / count_W.sum())
    wider_R = mean + (mean_R - mean) * np.sqrt(windows / max(windows - 1, 1))
    low, high = np.quantile(wider_R, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(mean=mean, low=float(low), high=float(high))
