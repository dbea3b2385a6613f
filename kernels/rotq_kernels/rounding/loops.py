# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The loops of ``native``, for numba: imported when they are first called.

Shape suffixes: N out features, S rows of a strip, B columns of one block, G groups, g columns of a
group, C candidates, Y bytes.
"""

import functools
from typing import Any

import numpy as np

from rotq_kernels.compiled import SUMS, inlined, kept

STRIP = 64
"""Rows of the weight that stay in the first cache, with a block of 128 columns."""

FINITE_SUMS = SUMS | {"nnan"}
"""Of a group's columns, where nothing is a NaN."""


@inlined(error_model="numpy")
def _spread(strip_BS, row_B, k, change_S):
    for j in range(k + 1, len(strip_BS)):
        factor = row_B[j]
        for n in range(STRIP):
            strip_BS[j, n] += factor * change_S[n]


@inlined(error_model="numpy")
def _round_column(w_S, pivot, scale_S, zero_S, low_S, high_S, q_S, error_S, less_S):
    for n in range(len(q_S)):
        q = np.rint(w_S[n] / scale_S[n] + zero_S[n])
        q = min(max(q, low_S[n]), high_S[n])
        error = (w_S[n] - (q - zero_S[n]) * scale_S[n]) / pivot
        q_S[n], error_S[n], less_S[n] = q, error, -error


@kept(error_model="numpy")
def round_all(w_BN, factor_BB, scale_BN, zero_BN, bounds_2N, q_BN, error_BN):
    """``round_block``."""
    columns, rows = w_BN.shape
    strip_BS = np.zeros((columns, STRIP), np.float32)
    less_S = np.zeros(STRIP, np.float32)
    for first in range(0, rows, STRIP):
        end = min(first + STRIP, rows)
        strip_BS[:, : end - first] = w_BN[:, first:end]
        low_S, high_S = bounds_2N[0, first:end], bounds_2N[1, first:end]
        for k in range(columns):
            scale_S, zero_S = scale_BN[k, first:end], zero_BN[k, first:end]
            q_S, error_S = q_BN[k, first:end], error_BN[k, first:end]
            pivot = factor_BB[k, k]
            _round_column(strip_BS[k], pivot, scale_S, zero_S, low_S, high_S, q_S, error_S, less_S)
            _spread(strip_BS, factor_BB[k], k, less_S)


@inlined(error_model="numpy")
def _refine_column(gradient_S, rate, scale_S, step_S, low, high, q_S, change_S):
    for n in range(len(q_S)):
        q = np.rint(q_S[n] - rate * (gradient_S[n] * step_S[n]))
        q = min(max(q, low), high)
        change_S[n] = (q - q_S[n]) * scale_S[n]
        q_S[n] = q


@kept(error_model="numpy")
def refine_all(gradient_BN, hessian_BB, scale_BN, step_BN, low, high, q_BN, change_BN):
    """``refine_block``."""
    columns, rows = q_BN.shape
    strip_BS = np.zeros((columns, STRIP), np.float32)
    change_S = np.zeros(STRIP, np.float32)
    for first in range(0, rows, STRIP):
        end = min(first + STRIP, rows)
        strip_BS[:, : end - first] = gradient_BN[:, first:end]
        for k in range(columns):
            rate = np.float32(1.0 / np.float64(hessian_BB[k, k]))
            scale_S, step_S = scale_BN[k, first:end], step_BN[k, first:end]
            q_S = q_BN[k, first:end]
            _refine_column(strip_BS[k], rate, scale_S, step_S, low, high, q_S, change_S)
            change_BN[k, first:end] = change_S[: end - first]
            _spread(strip_BS, hessian_BB[k], k, change_S)


@inlined(error_model="numpy", fastmath=FINITE_SUMS)
def _errors(w_g, scale_C, zero_C, low, high, error_gC, width, candidates):
    for k in range(width):
        w = w_g[k]
        for c in range(candidates):
            q = min(max(np.rint(w / scale_C[c] + zero_C[c]), low), high)
            error_gC[k, c] = (q - zero_C[c]) * scale_C[c] - w


@inlined(error_model="numpy", fastmath=FINITE_SUMS)
def _losses(lower_gg, error_gC, half_C, loss_C, width, candidates):
    loss_C[:] = np.float32(0.0)
    for k in range(width):
        half_C[:] = np.float32(0.0)
        for j in range(0, k + 1, 4):
            h0, h1 = lower_gg[k, j], lower_gg[k, j + 1]
            h2, h3 = lower_gg[k, j + 2], lower_gg[k, j + 3]
            for c in range(candidates):
                half_C[c] += (h0 * error_gC[j, c] + h1 * error_gC[j + 1, c]) + (
                    h2 * error_gC[j + 2, c] + h3 * error_gC[j + 3, c]
                )
        for c in range(candidates):
            loss_C[c] += error_gC[k, c] * half_C[c]


@functools.cache
def candidate_search(candidates: int, width: int) -> Any:
    """The loops of ``best_candidates``; C and g are constants of them."""

    @kept(error_model="numpy", fastmath=FINITE_SUMS)
    def search(w_NGg, scale_NGC, zero_NGC, lower_Ggg, low, high, best_NG):
        error_gC = np.empty((width, candidates), np.float32)
        half_C, loss_C = np.empty(candidates, np.float32), np.empty(candidates, np.float32)
        for n in range(w_NGg.shape[0]):
            for group in range(w_NGg.shape[1]):
                scale_C, zero_C = scale_NGC[n, group], zero_NGC[n, group]
                w_g = w_NGg[n, group]
                _errors(w_g, scale_C, zero_C, low, high, error_gC, width, candidates)
                _losses(lower_Ggg[group], error_gC, half_C, loss_C, width, candidates)
                best = 0
                for c in range(1, candidates):
                    if loss_C[c] < loss_C[best]:
                        best = c
                best_NG[n, group] = best

    return search


@functools.cache
def unpacking(bits: int) -> Any:
    """The loops of ``unpacked_levels``."""
    mask, half = np.uint64((1 << bits) - 1), np.int32(1 << (bits - 1))
    shifts, eight = np.uint64(bits), np.uint64(8)

    @kept()
    def run(byte_NY, zero_NG, level_NK, width):
        for n in range(len(level_NK)):
            for e in range(level_NK.shape[1] // 8):
                word = np.uint64(0)
                for y in range(bits):
                    word |= np.uint64(byte_NY[n, bits * e + y]) << (eight * np.uint64(y))
                zero = half + np.int32(zero_NG[n, 8 * e // width])
                for i in range(8):
                    code = np.int32((word >> (shifts * np.uint64(i))) & mask)
                    level_NK[n, 8 * e + i] = np.float32(code - zero)

    return run
