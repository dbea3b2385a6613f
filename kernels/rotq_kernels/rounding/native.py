# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Loops over the columns of a weight, and over candidates for its scales, compiled by numba.

A column's error goes to the columns after it. Plain PyTorch does that with half a dozen small
operations for each column, and reads and writes the columns after it once each time; here a strip
of rows stays in the first cache until a whole block of columns is done. Products and sums are
those of PyTorch's operators one by one, so that codes are the same.

For scales the lanes of a register are candidates: what a candidate makes of one group's columns is
multiplied with the group's Hessian where it lies.

The interpreter's lock is not held. Needs numba, which ``pip install rotq[native]`` brings.

Shape suffixes: N out features, B columns of one block, G groups, g columns of a
group, C candidates.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotq_kernels.launching import is_native

NATIVE_FROM = 1 << 16
"""Numbers of a weight from which on it is worth compiling."""

STRIP = 64
"""Rows of the weight that stay in the first cache, with a block of 128 columns."""


def rounds_natively(weight_NK: Tensor) -> bool:
    """Whether native code for a weight is there, and worth the seconds that compiling takes."""
    is_plain = weight_NK.device.type == "cpu" and weight_NK.dtype == torch.float32
    return is_plain and weight_NK.numel() >= NATIVE_FROM and is_native()


def searches_natively(w_NGg: Tensor) -> bool:
    """The same for ``best_candidates``, which takes columns by fours."""
    return w_NGg.shape[-1] % 4 == 0 and rounds_natively(w_NGg)


def round_block(
    w_BN: Tensor,
    factor_BB: Tensor,
    scale_BN: Tensor,
    zero_BN: Tensor,
    bounds_2N: Tensor,
    q_BN: Tensor,
) -> Tensor:
    """GPTQ's loop over one block of columns: codes, and errors (B, N) over the factor's diagonal.

    All fp32 on the CPU.

    Args:
        w_BN: Columns in the order they are rounded; not modified.
        factor_BB: Of the inverse Hessian, upper, these columns.
        scale_BN, zero_BN: Of each column's group.
        bounds_2N: Least and largest code of each row.
        q_BN: Gets the codes.
    """
    error_BN = torch.empty(w_BN.shape)
    given = (w_BN, factor_BB, scale_BN, zero_BN, bounds_2N, q_BN, error_BN)
    run, _ = _compiled_loops()
    run(*(tensor.numpy() for tensor in given))
    return error_BN


def refine_block(
    gradient_BN: Tensor,
    hessian_BB: Tensor,
    scale_BN: Tensor,
    step_BN: Tensor,
    bounds: tuple[int, int],
    q_BN: Tensor,
) -> Tensor:
    """One sweep over a block of columns: each takes its best code. Returns what changed, (B, N).

    All fp32 on the CPU.

    Args:
        gradient_BN: (W^ - T) H of these columns; not modified.
        hessian_BB: Of these columns.
        scale_BN, step_BN: Of each column's group, and its inverse.
        bounds: Least and largest code.
        q_BN: Codes; modified.
    """
    change_BN = torch.empty(q_BN.shape)
    given = (gradient_BN, hessian_BB, scale_BN, step_BN)
    arrays = [tensor.numpy() for tensor in given]
    low, high = (np.float32(bound) for bound in bounds)
    _, run = _compiled_loops()
    run(*arrays, low, high, q_BN.numpy(), change_BN.numpy())
    return change_BN


def best_candidates(
    w_NGg: Tensor,
    scale_CNG: Tensor,
    zero_CNG: Tensor,
    block_Ggg: Tensor,
    bounds: tuple[int, int],
) -> Tensor:
    """int64 (N, G): the first candidate with the least e H_gg e^T.

    Args:
        w_NGg: fp32 on the CPU; not modified.
        scale_CNG, zero_CNG: fp32.
        block_Ggg: fp32, symmetric.
        bounds: Least and largest code.
    """
    C, (_, _, g) = len(scale_CNG), w_NGg.shape
    best_NG = torch.empty(w_NGg.shape[:2], dtype=torch.int64)
    scale_NGC, zero_NGC = (each.movedim(0, -1).contiguous() for each in (scale_CNG, zero_CNG))
    low, high = (np.float32(bound) for bound in bounds)
    # of a symmetric form, each pair once
    lower_Ggg = block_Ggg.tril() + block_Ggg.tril(-1)
    given = (w_NGg.contiguous(), scale_NGC, zero_NGC, lower_Ggg)
    arrays = [tensor.numpy() for tensor in given]
    run = _compiled_search(C, g)
    run(*arrays, low, high, best_NG.numpy())
    return best_NG


def unpacked_levels(packed_NW: Tensor, zero_NG: Tensor | None, bits: int, shape: Any) -> Tensor:
    """fp32 (N, G, g): codes of a packed weight less their zero points.

    Args:
        packed_NW: int32 on the CPU, as ``layout.pack`` makes it; contiguous.
        zero_NG: int8; None for zeros.
        shape: (N, G, g); g is a multiple of 8.
    """
    level_NGg = torch.empty(shape)
    zero_NG = torch.zeros(shape[:2], dtype=torch.int8) if zero_NG is None else zero_NG
    stream = packed_NW.view(torch.uint8).numpy()
    run = _compiled_unpacking(bits)
    run(stream, zero_NG.contiguous().numpy(), level_NGg.flatten(1).numpy(), shape[2])
    return level_NGg


@functools.cache
def _compiled_unpacking(bits: int) -> Any:
    import numba

    mask, half = np.uint64((1 << bits) - 1), np.int32(1 << (bits - 1))
    shifts, eight = np.uint64(bits), np.uint64(8)

    @numba.njit(nogil=True)
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


@functools.cache
def _compiled_loops() -> tuple[Any, Any]:
    import numba  # optional, and looked for by who calls this

    jit = numba.njit(nogil=True, error_model="numpy")

    @jit
    def spread(strip_BS, row_B, k, change_S):
        for j in range(k + 1, len(strip_BS)):
            factor = row_B[j]
            for n in range(STRIP):
                strip_BS[j, n] += factor * change_S[n]

    @jit
    def round_column(w_S, pivot, scale_S, zero_S, low_S, high_S, q_S, error_S, less_S):
        for n in range(len(q_S)):
            q = np.rint(w_S[n] / scale_S[n] + zero_S[n])
            q = min(max(q, low_S[n]), high_S[n])
            error = (w_S[n] - (q - zero_S[n]) * scale_S[n]) / pivot
            q_S[n], error_S[n], less_S[n] = q, error, -error

    @jit
    def round_all(w_BN, factor_BB, scale_BN, zero_BN, bounds_2N, q_BN, error_BN):
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
                round_column(
                    strip_BS[k], pivot, scale_S, zero_S, low_S, high_S, q_S, error_S, less_S
                )
                spread(strip_BS, factor_BB[k], k, less_S)

    @jit
    def refine_column(gradient_S, rate, scale_S, step_S, low, high, q_S, change_S):
        for n in range(len(q_S)):
            q = np.rint(q_S[n] - rate * (gradient_S[n] * step_S[n]))
            q = min(max(q, low), high)
            change_S[n] = (q - q_S[n]) * scale_S[n]
            q_S[n] = q

    @jit
    def refine_all(gradient_BN, hessian_BB, scale_BN, step_BN, low, high, q_BN, change_BN):
        columns, rows = q_BN.shape
        strip_BS = np.zeros((columns, STRIP), np.float32)
        change_S = np.zeros(STRIP, np.float32)
        for first in range(0, rows, STRIP):
            end = min(first + STRIP, rows)
            strip_BS[:, : end - first] = gradient_BN[:, first:end]
            for k in range(columns):
                rate = np.float32(1.0 / np.float64(hessian_BB[k, k]))
                scale_S, step_S = scale_BN[k, first:end], step_BN[k, first:end]
                refine_column(
                    strip_BS[k], rate, scale_S, step_S, low, high, q_BN[k, first:end], change_S
                )
                change_BN[k, first:end] = change_S[: end - first]
                spread(strip_BS, hessian_BB[k], k, change_S)

    return round_all, refine_all


@functools.cache
def _compiled_search(candidates: int, width: int) -> Any:
    import numba

    jit = numba.njit(
        nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "nnan"}
    )

    @jit
    def errors(w_g, scale_C, zero_C, low, high, error_gC):
        for k in range(width):
            w = w_g[k]
            for c in range(candidates):
                q = min(max(np.rint(w / scale_C[c] + zero_C[c]), low), high)
                error_gC[k, c] = (q - zero_C[c]) * scale_C[c] - w

    @jit
    def losses(lower_gg, error_gC, half_C, loss_C):
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

    @jit
    def search(w_NGg, scale_NGC, zero_NGC, lower_Ggg, low, high, best_NG):
        error_gC = np.empty((width, candidates), np.float32)
        half_C, loss_C = np.empty(candidates, np.float32), np.empty(candidates, np.float32)
        for n in range(w_NGg.shape[0]):
            for group in range(w_NGg.shape[1]):
                scale_C, zero_C = scale_NGC[n, group], zero_NGC[n, group]
                errors(w_NGg[n, group], scale_C, zero_C, low, high, error_gC)
                losses(lower_Ggg[group], error_gC, half_C, loss_C)
                best = 0
                for c in range(1, candidates):
                    if loss_C[c] < loss_C[best]:
                        best = c
                best_NG[n, group] = best

    return search
