"""Products and inverses of matrices that are as exact as a stretch of code needs them.

Inverses are by QR, never by LU. The LU factorization of torch 2.13's CPU build (oneMKL 2024.2) is
wrong from order 192 on where it runs on two or more cores: ``torch.linalg.inv`` and ``solve``
return numbers that have nothing to do with their input, without an error. QR, Cholesky and
eigenvalues are right there (docs/log.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's fp32 matrix product precision ("highest" or "medium") and put it back.

    "medium" multiplies in bf16 and sums in fp32: twice as fast where the CPU has AVX512-BF16;
    hardware without it computes in fp32 or TF32 by torch's own choice.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse(matrix: Tensor) -> Tensor:
    """A^-1 = R^-1 Q^T of square matrices (..., K, K), in their dtype."""
    q, r = torch.linalg.qr(matrix)
    return torch.linalg.solve_triangular(r, q.mT, upper=True)
