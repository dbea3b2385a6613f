"""Rank correlation, which asks for the order alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho of two lists of one length: Pearson's of their ranks, ties at their mean.

    None where one of them is constant or has fewer than two numbers.
    """
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    centred = [values - values.mean() for values in ranks] if len(first) > 1 else []
    if not centred or not all(values.any() for values in centred):
        return None
    lengths = np.prod([np.linalg.norm(values) for values in centred])
    return float(np.dot(*centred) / lengths)


def _ranks(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0; equal values get the mean of theirs."""
    _, inverse_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: NDArray[np.float64] = last - (counts + 1) / 2
    return middle[inverse_N]
