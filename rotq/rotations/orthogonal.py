"""Orthogonal matrices as functions of free parameters, which start at a given one.

    R = R0 (I + A/2) (I - A/2)^-1,   A = (P - P^T) / (2 sqrt n),   P = 0 at the start

The factor makes the size of a step independent of n: changing every entry of P by e turns R0 by an
rms angle of about e radians. (Cayley transform; Lezcano-Casado and Martinez-Rubio, arXiv
1901.08428.)

Shape suffixes: n order; all matrices may come in batches (..., n, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.numerics import inverse


class Cayley:
    """Any rotation of the start that has no eigenvalue -1, or a batch of them."""

    def __init__(self, start_nn: Tensor, *, keeps_ones: bool = False) -> None:
        """
        Args:
            start_nn: Orthogonal.
            keeps_ones: 1 R = 1 holds for the start, and is to hold for all (see
                ``fusion.layernorm``): A is projected, so that A 1 = 0.
        """
        self.start_nn, self.keeps_ones = start_nn.float(), keeps_ones
        self.free = torch.zeros_like(self.start_nn, requires_grad=True)
        """What is trained; fp32, a leaf."""

    def matrix(self) -> Tensor:
        """(..., n, n) fp32, differentiable in ``free``."""
        n = self.free.shape[-1]
        half_nn = (self.free - self.free.mT) / (4 * n**0.5)
        if self.keeps_ones:
            half_nn = half_nn - half_nn.mean(-1, keepdim=True)
            half_nn = half_nn - half_nn.mean(-2, keepdim=True)
        one_nn = torch.eye(n, device=half_nn.device)
        return self.start_nn @ (one_nn + half_nn) @ inverse(one_nn - half_nn)


def polish(R_nn: Tensor) -> Tensor:
    """The nearest orthogonal matrix to an almost orthogonal one, to fp64 accuracy.

    Newton-Schulz: X <- 1.5 X - 0.5 X X^T X converges quadratically where |X^T X - I| < 1.

    Args:
        R_nn: (..., n, n), any dtype.

    Returns:
        fp64, max |R^T R - I| below 1e-12.

    Raises:
        ValueError: it is too far from orthogonal, or not finite.
    """
    X_nn = R_nn.double()
    one_nn = torch.eye(X_nn.shape[-1], dtype=torch.float64, device=X_nn.device)
    for _ in range(30):
        gram_nn = X_nn.mT @ X_nn
        if (gram_nn - one_nn).abs().max() < 1e-13 * max(10, X_nn.shape[-1] ** 0.5) / 10:
            return X_nn
        X_nn = X_nn @ (1.5 * one_nn - 0.5 * gram_nn)
    raise ValueError("the matrix is not close enough to an orthogonal one to be made one")


def with_ones_kept(R_nn: Tensor) -> Tensor:
    """P R P + 1 1^T / n, fp64: what of an almost orthogonal matrix leaves the ones alone.

    ``polish`` keeps it so: rows and columns sum to one at each of its steps.
    """
    R_nn = R_nn.double()
    R_nn = R_nn - R_nn.mean(-1, keepdim=True)
    return R_nn - R_nn.mean(-2, keepdim=True) + 1 / R_nn.shape[-1]


def turned(start_nn: Tensor, R_nn: Tensor) -> float:
    """Rms angle between the columns of two orthogonal matrices (or batches of them), radians."""
    cosine = (start_nn.double() * R_nn.double()).sum(-2).clamp(-1, 1)
    return float(cosine.acos().square().mean().sqrt())
