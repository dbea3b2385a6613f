# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The search of ``search`` for CPUs, compiled by numba: one specialisation for each code.

A step reads M and the levels and writes M: 2^L subtractions, multiply-adds and minima without a
branch or a shuffle, because values of u are taken by their lowest symbol first: those of one symbol
read a contiguous piece of M each. One pass over 2^(L - bits) values then puts them in order.
No operation is contracted or reordered, so that paths are those of plain PyTorch.

Needs numba, which ``pip install rotq[native]`` brings; wheels are there for Linux and macOS.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotq_kernels.compiled import inlined, kept


def search_native(
    x_SR: Tensor, levels_P: Tensor, bits: int, around: tuple[int, int] | None = None
) -> Tensor:
    """int32 (S, R) states of the closed path of each ring.

    The interpreter's lock is not held: calls on several threads run at the same time.

    Args:
        x_SR: fp32 on the CPU, finite.
        levels_P: fp32 (2^L).
        bits: Of a symbol, at most L.
        around: Steps of the first search before and behind where a ring closes; None: all of the
            ring, turned by half.
    """
    rows = x_SR.shape[1]
    before, behind = around or (rows - rows // 2, rows // 2)
    state_SR = torch.empty(x_SR.shape, dtype=torch.int32)
    search = _compiled(bits, len(levels_P).bit_length() - 1)
    search(x_SR.contiguous().numpy(), levels_P.numpy(), state_SR.numpy(), before, behind)
    return state_SR


@functools.cache
def _compiled(bits: int, state_bits: int) -> Any:
    """The whole search for one code; sizes are constants of the compiled loops."""

    @kept()
    def search(x_SR, levels_P, state_SR, before, behind):
        rings, rows = x_SR.shape
        groups = 1 << (state_bits - bits)
        x_T = np.empty(rows, np.float32)
        middle_T = np.empty(before + behind, np.float32)
        least_G = np.empty(groups, np.float32)
        history_TG = np.empty((rows, groups), np.float32)
        unused_T = np.empty(rows, np.int32)
        for ring in range(rings):
            for t in range(rows):
                x_T[t] = x_SR[ring, rows - 1 - t]
            for t in range(before + behind):
                middle_T[t] = x_T[(rows - before + t) % rows]
            end = -1
            # the first walk is open and says where the second, which is the path, begins and ends
            for walked_T, first, found_T in (
                (middle_T, before, unused_T),
                (x_T, 0, state_SR[ring]),
            ):
                least_G[:] = 0.0 if end < 0 else np.inf
                least_G[max(end, 0)] = 0.0
                _forward(walked_T, levels_P, least_G, history_TG, bits, state_bits)
                end = _least(least_G) if end < 0 else end
                end = _back(walked_T, levels_P, history_TG, end, first, found_T, bits, state_bits)

    return search


@inlined()
def _least(least_G):
    end = 0
    for u in range(1, len(least_G)):
        if least_G[u] < least_G[end]:
            end = u
    return end


@inlined()
def _forward(x_T, levels_P, least_G, history_TG, bits, state_bits):
    if state_bits >= 2 * bits:
        _wide(x_T, levels_P, least_G, history_TG, bits, state_bits)
    else:
        _narrow(x_T, levels_P, least_G, history_TG, bits, state_bits)


@inlined()
def _wide(x_T, levels_P, least_G, history_TG, bits, state_bits):
    """Steps where a state holds two symbols or more."""
    branches, groups = 1 << bits, 1 << (state_bits - bits)
    run = groups >> bits
    # by j, lowest symbol, rest of u
    level_JBU = np.empty((branches, branches, run), np.float32)
    for p in range(branches * groups):
        level_JBU[p // groups, p % branches, (p % groups) >> bits] = levels_P[p]
    found_BU = np.empty((branches, run), np.float32)
    for t in range(len(x_T)):
        history_TG[t] = least_G
        x = x_T[t]
        for b in range(branches):
            for u in range(run):
                error = x - level_JBU[0, b, u]
                best = least_G[u] + error * error
                for j in range(1, branches):
                    error = x - level_JBU[j, b, u]
                    cost = least_G[j * run + u] + error * error
                    best = cost if cost < best else best
                found_BU[b, u] = best
        for u in range(run):
            for b in range(branches):
                least_G[u * branches + b] = found_BU[b, u]


@inlined()
def _narrow(x_T, levels_P, least_G, history_TG, bits, state_bits):
    """Steps where it holds less than two: all that lead to one u have one M each."""
    branches, groups = 1 << bits, 1 << (state_bits - bits)
    found_G = np.empty(groups, np.float32)
    for t in range(len(x_T)):
        history_TG[t] = least_G
        x = x_T[t]
        found_G[:] = np.inf
        for j in range(branches):
            before = least_G[(j * groups) >> bits]
            for u in range(groups):
                error = x - levels_P[j * groups + u]
                cost = before + error * error
                found_G[u] = cost if cost < found_G[u] else found_G[u]
        least_G[:] = found_G


@inlined()
def _back(x_T, levels_P, history_TG, u, first, state_R, bits, state_bits):
    """Write the states of steps T - 1, ..., first as those of rows 0, 1, ...; returns u."""
    branches, groups = 1 << bits, 1 << (state_bits - bits)
    for t in range(len(x_T) - 1, first - 1, -1):
        least, chosen = np.float32(np.inf), u
        for j in range(branches):
            p = u + j * groups
            error = x_T[t] - levels_P[p]
            cost = history_TG[t, p >> bits] + error * error
            if cost < least:
                least, chosen = cost, p
        state_R[len(x_T) - 1 - t] = chosen
        u = chosen >> bits
    return u
