"""Learned fast rotations: a Hadamard transform whose steps on pairs have angles of their own.

The fast transform of n = m 2^a features is a stages of 2 x 2 reflections in the line at pi / 8,
[[1, 1], [1, -1]] / sqrt 2, on the n / 2 pairs of each, and a core that mixes m runs. Here a pair
has the reflection

    [[cos t, sin t], [sin t, -cos t]]

with a t of its own. The product is orthogonal whatever the angles are, takes n (2 a + m) products
instead of n^2, and is the Hadamard transform where all t = pi / 4. (ButterflyQuant, arXiv
2509.09679, learns Givens angles for weights; orders with a core, the start at the Hadamard matrix
and the online use are ours.)

Checkpoints hold angles as int16, in units of pi / 2^15: no cast of a model touches them, and what
weights are fused with is what runs.

Shape suffixes: K features, A stages, M runs (order of the core), Q pairs of a run, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotq import ops
from rotq.rotations.hadamard import core_order, paley_core

UNIT = math.pi / 2**15
"""Radians of one step of a stored angle."""

HADAMARD_ANGLE = math.pi / 4
"""Of every pair in the Hadamard transform."""


def angle_shape(n: int) -> tuple[int, int, int]:
    """(A, M, Q) of the angles of order n.

    Raises:
        ValueError: the order cannot be constructed, or is a core that has no pairs.
    """
    m = core_order(n)
    run = n // m
    if run < 2:
        raise ValueError(f"a butterfly of order {n} has no pairs: {n} is a core of its own")
    return run.bit_length() - 1, m, run // 2


def to_codes(angles: Tensor) -> Tensor:
    """Angles in radians, as they are stored: int16."""
    steps = (angles.detach().double() / UNIT).round()
    return (torch.remainder(steps + 2**15, 2**16) - 2**15).to(torch.int16)


def from_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``to_codes``, radians in -pi to pi."""
    return codes.to(dtype) * UNIT


def fast_butterfly(x: Tensor, angles_AMQ: Tensor, signs_K: Tensor | None = None) -> Tensor:
    """Multiply features by D B, from the right; D the diagonal of signs, B of these angles.

    On a CUDA device a kernel does it, unless a gradient is wanted, or fp64. Differentiable in ``x``
    and in angles that are floats.

    Args:
        x: (..., K), floating point; fp16 and bf16 are summed in fp32.
        angles_AMQ: Radians, or int16 as stored; of ``angle_shape(K)``.
        signs_K: +1 and -1; None for all +1.

    Returns:
        Shape and dtype of ``x``.
    """
    K = x.shape[-1]
    core_MM = paley_core(core_order(K)).to(x.device)
    signs_K = None if signs_K is None else signs_K.to(device=x.device, dtype=torch.int8)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    if angles_AMQ.is_floating_point():
        radians_AMQ = angles_AMQ.to(device=x.device, dtype=wide)
    else:
        radians_AMQ = from_codes(angles_AMQ.to(x.device), wide)
    traced = (x.requires_grad or radians_AMQ.requires_grad) and torch.is_grad_enabled()
    plain = wide == torch.float64 or traced
    transform = ops.butterfly_reference if plain else ops.butterfly
    return transform(x.reshape(-1, K), core_MM, radians_AMQ, signs_K).reshape(x.shape)


class Butterfly:
    """Angles as functions of free parameters; a step turns features by about its size in all."""

    def __init__(self, start: Tensor) -> None:
        """
        Args:
            start: (..., A, M, Q), radians.
        """
        self.start = start.float()
        self.free = torch.zeros_like(self.start, requires_grad=True)

    def angles(self) -> Tensor:
        """Radians, fp32, differentiable in ``free``."""
        # a turn by e in each of A stages turns features by sqrt(A) e
        return self.start + self.free / self.free.shape[-3] ** 0.5
