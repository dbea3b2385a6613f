"""Hessians as the solver damps them, for tests that need the matrix itself."""

from torch import Tensor

from rotq.solvers.gptq import eliminate


def damp(hessian_KK: Tensor, damping: float) -> tuple[Tensor, float]:
    """A damped copy, and the share of the mean diagonal that was added."""
    elimination = eliminate(hessian_KK, "natural", damping)
    return elimination.damp_(hessian_KK.clone()), elimination.damping
