# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Packed paths on CPUs, compiled by numba: their levels, and products with few rows of inputs.

Words are taken column after column, so that a vector register holds the states of as many columns
of one row: a shift, a mask, a product and the sum of four bytes for each, without a table. The last
rows of a ring, whose states go around its end, are put together symbol by symbol.

Shape suffixes: M rows (tokens), N out features, K in features, G groups of K, W int32 words.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotq_kernels.compiled import inlined, kept
from rotq_kernels.trellis.code import CENTRE, MULTIPLIER, UNIT, ring_rows


def levels_native(word_WK: Tensor, num_rows: int, ring: int, bits: int, state_bits: int) -> Tensor:
    """fp32 (N, K) levels.

    Args:
        word_WK: int32 on the CPU, of ``num_rows`` rows from the start of a ring; contiguous.
        num_rows: Of whole rings.
        ring: Rows of each.
    """
    level_NK = torch.empty(num_rows, word_WK.shape[1])
    run = _compiled(bits, state_bits)[0]
    run(_unsigned(word_WK), ring, level_NK.numpy())
    return level_NK


def product_native(
    x_MK: Tensor, word_WK: Tensor, scale_NG: Tensor, bits: int, state_bits: int
) -> Tensor:
    """x W^T, fp32 (M, N), summed in fp32.

    Args:
        x_MK: fp32 on the CPU.
        word_WK: int32 of all N rows; contiguous.
        scale_NG: fp32.
    """
    N = len(scale_NG)
    y_MN = torch.empty(len(x_MK), N)
    run = _compiled(bits, state_bits)[1]
    x, scale = x_MK.contiguous().numpy(), scale_NG.contiguous().numpy()
    run(x, _unsigned(word_WK), scale, ring_rows(N), y_MN.numpy())
    return y_MN


def _unsigned(word_WK: Tensor) -> Any:
    return word_WK.numpy().view(np.uint32)


@functools.cache
def _compiled(bits: int, state_bits: int) -> tuple[Any, Any]:
    """Levels, and products, of one code."""
    code = (bits, state_bits, MULTIPLIER, CENTRE, UNIT)

    @kept()
    def levels(word_WK, rows, level_NK):
        for n in range(len(level_NK)):
            first = n // rows * rows * bits // 32
            _row_levels(word_WK, first, n % rows, rows, level_NK[n], code)

    @kept()
    def product(x_MK, word_WK, scale_NG, rows, y_MN):
        columns, groups = word_WK.shape[1], scale_NG.shape[1]
        width = columns // groups
        level_K = np.empty(columns, np.float32)
        for n in range(len(scale_NG)):
            first = n // rows * rows * bits // 32
            _row_levels(word_WK, first, n % rows, rows, level_K, code)
            for m in range(len(x_MK)):
                total = np.float32(0.0)
                for group in range(groups):
                    part = slice(group * width, (group + 1) * width)
                    total += scale_NG[n, group] * _dot(x_MK[m, part], level_K[part])
                y_MN[m, n] = total

    return levels, product


@inlined()
def _level(state, code):
    _, state_bits, multiplier, centre, unit = code
    pairs = np.uint32(0x00FF00FF)
    y = np.uint32(np.uint32(state & np.uint32((1 << state_bits) - 1)) * np.uint32(multiplier))
    halves = np.uint32((y & pairs) + ((y >> np.uint32(8)) & pairs))
    total = np.int32((halves & np.uint32(0xFFFF)) + (halves >> np.uint32(16)))
    return np.float32(total - np.int32(centre)) * np.float32(1 / unit)


@inlined()
def _around(word_WK, first, row, rows, level_K, code):
    bits, state_bits, _, _, _ = code
    symbol_mask = np.uint32((1 << bits) - 1)
    for k in range(word_WK.shape[1]):
        state = np.uint32(0)
        for step in range((state_bits + bits - 1) // bits):
            start = (row + step) % rows * bits
            symbol = word_WK[first + start // 32, k] >> np.uint32(start % 32)
            if start % 32 + bits > 32:
                symbol |= word_WK[first + start // 32 + 1, k] << np.uint32(32 - start % 32)
            state |= np.uint32(symbol & symbol_mask) << np.uint32(step * bits)
        level_K[k] = _level(state, code)


@inlined()
def _row_levels(word_WK, first, row, rows, level_K, code):
    bits, state_bits, _, _, _ = code
    start = row * bits
    low = np.uint32(start % 32)
    if start + state_bits > rows * bits:
        _around(word_WK, first, row, rows, level_K, code)
    elif low + state_bits <= 32:
        word_K = word_WK[first + start // 32]
        for k in range(len(word_K)):
            level_K[k] = _level(word_K[k] >> low, code)
    else:
        word_K, next_K = word_WK[first + start // 32], word_WK[first + start // 32 + 1]
        high = np.uint32(32 - low)
        for k in range(len(word_K)):
            joined = np.uint32((word_K[k] >> low) | np.uint32(next_K[k] << high))
            level_K[k] = _level(joined, code)


@inlined(fastmath={"reassoc", "contract"})
def _dot(x_K, level_K):
    total = np.float32(0.0)
    for k in range(len(level_K)):
        total += x_K[k] * level_K[k]
    return total
