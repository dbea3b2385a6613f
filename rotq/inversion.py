"""Inverses of matrices by QR, never by LU.

The LU factorization of torch 2.13's CPU build (oneMKL 2024.2) is wrong from order 192 on where it
runs on two or more cores: ``torch.linalg.inv`` and ``solve`` return numbers that have nothing to do
with their input, without an error. QR, Cholesky and eigenvalues are right there (docs/log.md).
"""

import torch
from torch import Tensor


def inverse(matrix: Tensor) -> Tensor:
    """A^-1 = R^-1 Q^T of square matrices (..., K, K), in their dtype."""
    q, r = torch.linalg.qr(matrix)
    return torch.linalg.solve_triangular(r, q.mT, upper=True)
