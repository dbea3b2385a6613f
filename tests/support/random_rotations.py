"""Rotations without any symmetry that R and R^T could share."""

import torch
from torch import Tensor


def random_orthogonal(n: int, seed: int) -> Tensor:
    """Uniform over the orthogonal (n, n) matrices, fp64."""
    generator = torch.Generator().manual_seed(seed)
    Q, upper = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    # the Householder QR by itself gives every Q a negative first entry
    return Q * upper.diagonal().sign()
