"""The matrix in front of the codes that makes errors cost least.

y = A x is coded with an error that is near to white, of a size that goes with |A x|; it
comes back as A^-1 e, and costs tr(M A^-1 A^-T) for a metric M. The product

    E|A x|^2  tr(M A^-1 A^-T) = tr(P C) tr(M P^-1),     P = A^T A,  C = E[x x^T],

is least for the geometric mean P = C^-1 # M, with A # B = A^1/2 (A^-1/2 B A^-1/2)^1/2 A^1/2. C is
the covariance of keys with their mean removed, M the second moment of the queries; for values M is
W^T W of the output projection. With C = 1 this is P = M^1/2, the query metric at alpha 1/2. A
Hadamard matrix behind it spreads each token over all codes: A = Q P^1/2.

Shape suffixes: H KV heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.numerics import inverse

_SOURCE_SHRINK = 0.1
_METRIC_SHRINK = 0.02
_CODED_SHRINK = 0.05
"""Shares of the mean eigenvalue that are mixed in."""


def balanced_metric(C_HDD: Tensor, M_HDD: Tensor, *, alpha: float, beta: float) -> Tensor:
    """P = C^-beta #_alpha M, of mean eigenvalue 1; fp64.

    Args:
        C_HDD: Second moment of what is coded, positive semidefinite.
        M_HDD: What an error costs, as well.
        alpha: 1/2 is the geometric mean; 0 gives C^-beta, 1 gives M.
        beta: 0 leaves C out, so that P = M^alpha.
    """
    C_HDD = symmetric_power(_shrunk(C_HDD, _SOURCE_SHRINK), beta)
    M_HDD = _shrunk(M_HDD, _METRIC_SHRINK)
    root, inverse_root = symmetric_power(C_HDD, 0.5), symmetric_power(C_HDD, -0.5)
    P_HDD = inverse_root @ symmetric_power(root @ M_HDD @ root, alpha) @ inverse_root
    return P_HDD / _mean_eigenvalue(P_HDD)


def coded_metric(matrix_HDD: Tensor, M_HDD: Tensor) -> Tensor:
    """W = A^-T M A^-1, what an error of y = A x costs; of mean diagonal 1, fp64."""
    inverse_HDD = inverse(matrix_HDD.double())
    W_HDD = inverse_HDD.mT @ _shrunk(M_HDD, _CODED_SHRINK) @ inverse_HDD
    return W_HDD / _mean_eigenvalue(W_HDD)


def symmetric_power(M_HDD: Tensor, power: float) -> Tensor:
    """fp64 power of positive semidefinite matrices; eigenvalues of 0 count as tiny ones."""
    value_HD, vector_HDD = torch.linalg.eigh(M_HDD.double())
    value_HD = value_HD.clamp(min=1e-12 * float(value_HD.max()))
    return (vector_HDD * value_HD[:, None] ** power) @ vector_HDD.mT


def _mean_eigenvalue(M_HDD: Tensor) -> Tensor:
    return M_HDD.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[:, None, None]


def _shrunk(M_HDD: Tensor, share: float) -> Tensor:
    M_HDD = M_HDD.double() / _mean_eigenvalue(M_HDD)
    return (1 - share) * M_HDD + share * torch.eye(M_HDD.shape[-1], dtype=torch.float64)
