"""Orthogonal matrices as functions of free parameters, each starting at a given one.

    cayley       R = R0 (I + A/2) (I - A/2)^-1,  A = (P - P^T) / (2 sqrt n),  P = 0
    qr           R = Q of Z = Q T, diag T > 0,   Z = R0 + P / sqrt n,         P = 0
    householder  R = R0 prod_i (I - 2 v_i v_i^T / |v_i|^2), v_2i = v_2i+1 at the start

The factors make the size of a step independent of n: changing every entry of P by e turns R0 by an
rms angle of about e radians. (Lezcano-Casado and Martinez-Rubio, arXiv 1901.08428, for cayley;
QR-Orth of DartQuant, arXiv 2511.04063, for qr.)

Shape suffixes: n order; all matrices may come in batches (..., n, n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from rotq.numerics import inverse

REFLECTORS = 32
"""Of a Householder parametrization; a multiple of two."""


class Orthogonal(Protocol):
    """One parametrized matrix, or a batch of them."""

    free: Tensor
    """What is trained; fp32, a leaf."""

    def matrix(self) -> Tensor:
        """(..., n, n) fp32, differentiable in ``free``."""


class Cayley:
    """Any rotation of the start that has no eigenvalue -1."""

    def __init__(self, start_nn: Tensor) -> None:
        self.start_nn = start_nn.float()
        self.free = torch.zeros_like(self.start_nn, requires_grad=True)

    def matrix(self) -> Tensor:
        """See the module."""
        n = self.free.shape[-1]
        half_nn = (self.free - self.free.mT) / (4 * n**0.5)
        one_nn = torch.eye(n, device=half_nn.device)
        return self.start_nn @ (one_nn + half_nn) @ inverse(one_nn - half_nn)


class QR:
    """Any rotation of the start."""

    def __init__(self, start_nn: Tensor) -> None:
        self.start_nn = start_nn.float()
        self.free = torch.zeros_like(self.start_nn, requires_grad=True)

    def matrix(self) -> Tensor:
        """See the module."""
        q_nn, t_nn = torch.linalg.qr(self.start_nn + self.free / self.free.shape[-1] ** 0.5)
        return cast(Tensor, q_nn * t_nn.diagonal(dim1=-2, dim2=-1).sign()[..., None, :])


class Householder:
    """Rotations of the start within the span of ``REFLECTORS`` vectors."""

    def __init__(self, start_nn: Tensor) -> None:
        self.start_nn = start_nn.float()
        *batch, n, _ = start_nn.shape
        pairs = min(REFLECTORS, n) // 2
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(*batch, pairs, n, generator=generator).repeat_interleave(2, dim=-2)
        self.free = vectors.to(self.start_nn.device).requires_grad_()

    def matrix(self) -> Tensor:
        """See the module."""
        R_nn = self.start_nn
        for v_n1 in (self.free / self.free.norm(dim=-1, keepdim=True)).unsqueeze(-1).unbind(-3):
            R_nn = R_nn - 2 * (R_nn @ v_n1) @ v_n1.mT
        return R_nn


PARAMETRIZATIONS: dict[str, Callable[[Tensor], Orthogonal]] = {
    "cayley": Cayley,
    "qr": QR,
    "householder": Householder,
}


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


def turned(start_nn: Tensor, R_nn: Tensor) -> float:
    """Rms angle between the columns of two orthogonal matrices (or batches of them), radians."""
    cosine = (start_nn.double() * R_nn.double()).sum(-2).clamp(-1, 1)
    return float(cosine.acos().square().mean().sqrt())
