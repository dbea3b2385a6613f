"""The best paths through a trellis: Viterbi's algorithm, twice, for paths that close.

    cost of a path = sum_r (x_r - level(state_r))^2

With u a state without its lowest symbol (what it shares with the state before it), and p = u + j
2^(L - bits) the states that end in u,

    M_0[u] = 0,      M_t+1[u] = min_j  M_t[p >> bits] + (x_t - level(p))^2

and the way back takes the first j that has the minimum: costs of states are never stored. A closed
path begins with the u that it ends in. That u is taken from a first, open search on the ring turned
by half, at its middle, where both ends are far away; a second search has both ends held there
(QTIP, arXiv 2406.11235, algorithm 4).

Two implementations find the same paths, bit by bit: native code for CPUs, compiled by numba when it
is first called, and plain PyTorch, which is many times slower there.

Shape suffixes: S rings, R rows, G values of u, P states.
"""

import torch
from torch import Tensor

from rotq_kernels.launching import is_native
from rotq_kernels.trellis.code import check_ring, code_levels


def search_paths(x_SR: Tensor, bits: int, state_bits: int) -> tuple[Tensor, Tensor]:
    """The best closed path of each ring, or close to it.

    Args:
        x_SR: fp32, finite, in units of the code's levels; not modified.
        bits: 1 to 8.
        state_bits: L, 8 to 16.

    Returns:
        symbol_SR: int8, symbol - 2^(bits-1).
        level_SR: fp32, what the path stands for.

    Raises:
        ValueError: not 2-D fp32, bits out of range, or a ring shorter than a state.
    """
    if x_SR.ndim != 2 or x_SR.dtype != torch.float32:
        raise ValueError(f"expected 2-D torch.float32, got {x_SR.ndim}-D {x_SR.dtype}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    check_ring(x_SR.shape[1], bits, state_bits)
    levels = code_levels(state_bits, x_SR.device)
    if x_SR.device.type == "cpu" and is_native():
        from rotq_kernels.trellis.native import search_native

        state_SR = search_native(x_SR, levels, bits)
    else:
        state_SR = search_reference(x_SR, levels, bits)
    level_SR = levels.index_select(0, state_SR.flatten().long()).view(x_SR.shape)
    symbol_SR = (state_SR & (2**bits - 1)) - 2 ** (bits - 1)
    return symbol_SR.to(torch.int8), level_SR


def search_reference(x_SR: Tensor, levels_P: Tensor, bits: int) -> Tensor:
    """int32 (S, R) states of the closed paths, in plain PyTorch; arguments as ``search_native``."""
    S, R = x_SR.shape
    groups, half = len(levels_P) >> bits, R // 2
    # a path goes from the last row to the first
    x_ST = x_SR.flip(1)
    turned_ST = x_ST.roll(-half, dims=1)
    M_SG = torch.zeros(S, groups, device=x_SR.device)
    history, M_SG = _forward(turned_ST, levels_P, bits, M_SG)
    _, middle_S = _back(turned_ST, levels_P, bits, history, M_SG.argmin(1), R - half)
    M_SG = torch.full_like(M_SG, float("inf")).scatter_(1, middle_S[:, None], 0.0)
    history, _ = _forward(x_ST, levels_P, bits, M_SG)
    states, _ = _back(x_ST, levels_P, bits, history, middle_S, 0)
    return torch.stack(states, dim=1).to(torch.int32)


def _forward(
    x_ST: Tensor, levels_P: Tensor, bits: int, M_SG: Tensor
) -> tuple[list[Tensor], Tensor]:
    """M_t before each step, and behind the last."""
    history = []
    for t in range(x_ST.shape[1]):
        history.append(M_SG)
        cost_SP = M_SG.repeat_interleave(2**bits, dim=1)
        cost_SP += (x_ST[:, t, None] - levels_P).square_()
        M_SG = cost_SP.view(len(M_SG), 2**bits, -1).amin(1)
    return history, M_SG


def _back(
    x_ST: Tensor, levels_P: Tensor, bits: int, history: list[Tensor], u_S: Tensor, first: int
) -> tuple[list[Tensor], Tensor]:
    """States of steps T - 1, ..., ``first`` in this order, and the u that they begin with."""
    j_J = torch.arange(2**bits, device=x_ST.device)
    states = []
    for t in range(x_ST.shape[1] - 1, first - 1, -1):
        p_SJ = u_S[:, None] | (j_J * (len(levels_P) >> bits))
        cost_SJ = history[t].gather(1, p_SJ >> bits)
        cost_SJ = cost_SJ + (x_ST[:, t, None] - levels_P[p_SJ]).square()
        is_least_SJ = cost_SJ == cost_SJ.amin(1, keepdim=True)
        best_S = torch.where(is_least_SJ, j_J, 2**bits).amin(1)
        p_S = p_SJ.gather(1, best_S[:, None])[:, 0]
        states.append(p_S)
        u_S = p_S >> bits
    return states, u_S
