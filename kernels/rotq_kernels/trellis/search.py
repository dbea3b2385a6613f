"""The best paths through a trellis: Viterbi's algorithm, twice, for paths that close.

    cost of a path = sum_r (x_r - level(state_r))^2

With u a state without its lowest symbol (what it shares with the state before it), and p = u + j
2^(L - bits) the states that end in u,

    M_0[u] = 0,      M_t+1[u] = min_j  M_t[p >> bits] + (x_t - level(p))^2

and the way back takes the first j that has the minimum: costs of states are never stored. A closed
path begins with the u that it ends in. That u is taken from a first, open search on the ring turned
by half, at its middle, where both ends are far away; a second search has both ends held there
(QTIP, arXiv 2406.11235, algorithm 4). The first search may be over a part of the ring alone,
``reach`` rows to each side of the middle: what is further away hardly decides there.

Two implementations find the same paths, bit by bit: native code for CPUs, compiled by numba when it
is first called, and plain PyTorch, which is many times slower there.

Shape suffixes: S rings, R rows, G values of u, P states.
"""

import torch
from torch import Tensor

from rotq_kernels.launching import is_native
from rotq_kernels.trellis.code import check_ring, code_levels

REMEMBERED = 2 << 30
"""Bytes of M, of all steps, that plain PyTorch keeps at a time."""


def search_paths(
    x_SR: Tensor, bits: int, state_bits: int, *, reach: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best closed path of each ring, or close to it.

    Args:
        x_SR: fp32, finite, in units of the code's levels; not modified.
        bits: 1 to 8.
        state_bits: L, 8 to 16.
        reach: Rows to each side of where a ring closes that decide how; None: half of them.

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
    state_SR = find_states(x_SR, levels, bits, reach=reach)
    level_SR = levels.index_select(0, state_SR.flatten().long()).view(x_SR.shape)
    symbol_SR = (state_SR & (2**bits - 1)) - 2 ** (bits - 1)
    return symbol_SR.to(torch.int8), level_SR


def find_states(x_SR: Tensor, levels_P: Tensor, bits: int, *, reach: int | None = None) -> Tensor:
    """int32 (S, R) states of the closed paths, by the native search where there is one.

    Args:
        x_SR: fp32, finite; not modified.
        levels_P: fp32 (2^L).
        bits: Of a symbol; a ring is as long as a state.
        reach: As for ``search_paths``.
    """
    around = closing(x_SR.shape[1], reach)
    if x_SR.device.type == "cpu" and is_native():
        from rotq_kernels.trellis.native import search_native

        return search_native(x_SR, levels_P, bits, around)
    # what a search remembers of each ring, as many rings at a time as leave room for the rest
    ring_bytes = 4 * x_SR.shape[1] * (len(levels_P) >> bits)
    parts = x_SR.split(max(1, REMEMBERED // ring_bytes))
    return torch.cat([search_reference(part, levels_P, bits, around) for part in parts])


def closing(rows: int, reach: int | None = None) -> tuple[int, int]:
    """Steps before and behind the place where a ring closes that the first search takes."""
    before, behind = rows - rows // 2, rows // 2
    return (before, behind) if reach is None else (min(reach, before), min(reach, behind))


def search_reference(
    x_SR: Tensor, levels_P: Tensor, bits: int, around: tuple[int, int] | None = None
) -> Tensor:
    """int32 (S, R) states of the closed paths, in plain PyTorch; arguments as ``search_native``."""
    S, R = x_SR.shape
    before, behind = around or closing(R)
    # a path goes from the last row to the first
    x_ST = x_SR.flip(1)
    middle_ST = torch.cat([x_ST[:, R - before :], x_ST[:, :behind]], dim=1)
    M_SG = torch.zeros(S, len(levels_P) >> bits, device=x_SR.device)
    history, M_SG = _forward(middle_ST, levels_P, bits, M_SG)
    _, middle_S = _back(middle_ST, levels_P, bits, history, M_SG.argmin(1), before)
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
