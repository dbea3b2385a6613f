# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Pieces of the kernel that encodes: RoPE of a mean, codes of a tile, packed words, stored norms.

Shape suffixes: N tokens of a tile, D head width padded to a power of two, C chunks of 32, K block
of the head width.
"""

import math

import triton
import triton.language as tl

from rotq_kernels.kv.format import STEPS_PER_OCTAVE, TABLE_BITS

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and removing it rounds halves to even, as torch.round does."""

TURN = tl.constexpr(2**40 / (2 * math.pi))
"""Fixed-point units of an angle in a radian."""

RADIANS = tl.constexpr(2 * math.pi / 2**32)
"""Of the upper 32 bits' unit."""

_STEPS = tl.constexpr(float(STEPS_PER_OCTAVE))
_TABLE_BITS = tl.constexpr(TABLE_BITS)


@triton.jit
def cos_sin(position_N, freq_K):
    """Of position * freq, to 2e-7 up to position 2^20: [N, K] each.

    Angles are fixed-point turns of 2^-40, so that whole turns drop out by themselves, then a
    quarter and a remainder of at most pi / 4 for the series. No table, no slow path, no fp64 but
    for a row of frequencies.
    """
    fixed_K = (freq_K.to(tl.float64) * TURN + 0.5).to(tl.int64)
    turn_NK = ((position_N.to(tl.int64)[:, None] * fixed_K[None, :]) >> 8).to(tl.int32)
    turn_NK += 1 << 29
    quarter_NK = turn_NK >> 30
    angle_NK = ((turn_NK & ((1 << 30) - 1)) - (1 << 29)).to(tl.float32) * RADIANS
    a2 = angle_NK * angle_NK
    sin = 1.0 + a2 * (-1 / 6 + a2 * (1 / 120 + a2 * (-1 / 5040 + a2 * (1 / 362880))))
    sin = angle_NK * sin
    cos = 1.0 + a2 * (-1 / 2 + a2 * (1 / 24 + a2 * (-1 / 720 + a2 * (1 / 40320))))
    swapped = (quarter_NK & 1) != 0
    cos_NK, sin_NK = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    cos_NK = tl.where(((quarter_NK + 1) & 2) != 0, -cos_NK, cos_NK)
    return cos_NK, tl.where((quarter_NK & 2) != 0, -sin_NK, sin_NK)


@triton.jit
def turned_mean(mean_ptr, inv_freq_ptr, position_N, d_K, rotary_scale, D, R: tl.constexpr):
    """RoPE of the mean at each position: [N, K]."""
    first, rotary = d_K < R, d_K < 2 * R
    mean_K = tl.load(mean_ptr + d_K, mask=d_K < D, other=0.0)
    partner_K = tl.load(mean_ptr + tl.where(first, d_K + R, d_K - R), mask=rotary, other=0.0)
    partner_K = tl.where(first, -partner_K, partner_K)
    freq_K = tl.load(inv_freq_ptr + tl.where(first, d_K, d_K - R), mask=rotary, other=0.0)
    cos_NK, sin_NK = cos_sin(position_N, freq_K)
    scale_K = tl.where(rotary, rotary_scale, 1.0)
    return (mean_K * scale_K) * cos_NK + (partner_K * scale_K) * sin_NK


@triton.jit
def quantize(u_ND, levels_ptr, thresholds_ptr, BITS: tl.constexpr):
    """Codes, int32, and their levels, fp32."""
    code_ND = tl.zeros_like(u_ND).to(tl.int32)
    if BITS <= _TABLE_BITS:
        # code and level in one number, so that a threshold is one compare and one select
        both_ND = code_ND + tl.load(levels_ptr).to(tl.int32) * 256
        for i in tl.static_range(2**BITS - 1):
            both = tl.load(levels_ptr + i + 1).to(tl.int32) * 256 + (i + 1)
            both_ND = tl.where(u_ND > tl.load(thresholds_ptr + i), both, both_ND)
        code_ND = both_ND & 255
        level_ND = (both_ND >> 8).to(tl.float32)
    else:
        for i in tl.static_range(BITS):
            half = 2 ** (BITS - 1 - i)
            above = u_ND > tl.load(thresholds_ptr + code_ND + (half - 1))
            code_ND = tl.where(above, code_ND + half, code_ND)
        level_ND = code_ND.to(tl.float32) - (2**BITS - 1) * 0.5
    return code_ND, level_ND


@triton.jit
def part_of_word(code, k, WORD: tl.constexpr, BITS: tl.constexpr):
    """Bits that code k of a chunk has in the chunk's word WORD; ``layout`` has the table."""
    if BITS == 1:
        part = code << k
    elif BITS == 2 or BITS == 8:
        each: tl.constexpr = 32 // BITS
        part = tl.where(k // each == WORD, code << (BITS * (k % each)), 0)
    elif BITS == 3:
        spare = tl.where(k // 8 == 3, ((code >> WORD) & 1) << (4 * (k % 8) + 3), 0)
        part = tl.where(k // 8 == WORD, code << (4 * (k % 8)), spare)
    elif WORD < 4:
        part = tl.where(k // 8 == WORD, (code & 15) << (4 * (k % 8)), 0)
    else:
        part = ((code >> WORD) & 1) << k
    return part


@triton.jit
def store_words(words_ptr, row_N, keep_N, code_ND, D: tl.constexpr, BITS: tl.constexpr):
    """Pack codes, zero beyond D, and store them at rows of the page tensor."""
    chunks: tl.constexpr = (D + 31) // 32
    C: tl.constexpr = code_ND.shape[1] // 32
    # [N, D] -> [N, C, 32], and each word is a sum over 32: [N, C]
    code_NC32 = tl.reshape(code_ND, [code_ND.shape[0], C, 32])
    k = tl.arange(0, 32)[None, None, :]
    c = tl.arange(0, C)
    to_NC = (words_ptr + row_N * (chunks * BITS))[:, None] + c[None, :] * BITS
    for i in tl.static_range(BITS):
        word_NC = tl.sum(part_of_word(code_NC32, k, i, BITS), axis=2)
        tl.store(to_NC + i, word_NC, mask=keep_N[:, None] & (c < chunks)[None, :])


@triton.jit
def store_norm(norm_ptr, row_N, keep_N, scale_N, base, NORM: tl.constexpr):
    """Store norms; returns what a reader will take them for."""
    if NORM == "log8":
        # nothing is as small as 2^-126 but zero
        code_N = (tl.log2(tl.maximum(scale_N, 2.0**-126)) - base) * _STEPS
        code_N = tl.minimum(tl.maximum(code_N, 0.0), 255.0)
        code_N = (code_N + ROUND) - ROUND
        tl.store(norm_ptr + row_N, code_N.to(tl.uint8), mask=keep_N)
        kept_N = tl.exp2(base + code_N / _STEPS)
    else:
        half_N = scale_N.to(tl.float16)
        tl.store(norm_ptr + row_N, half_N, mask=keep_N)
        kept_N = half_N.to(tl.float32)
    return kept_N


@triton.jit
def store_sketch(
    sign_ptr, sketch_ptr, row_N, keep_N, left_ND, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Signs of S left, a word at a time."""
    chunks: tl.constexpr = (D + 31) // 32
    d = tl.arange(0, left_ND.shape[1])
    k = tl.arange(0, 32)
    for c in range(chunks):
        sketch_D32 = tl.load(
            sketch_ptr + (c * 32 + k)[None, :] * D + d[:, None],
            mask=(d < D)[:, None] & (c * 32 + k < D)[None, :],
            other=0.0,
        )
        # [N, D] @ [D, 32] -> [N, 32]
        sketched_N32 = tl.dot(left_ND, sketch_D32, input_precision=PRECISION)
        bit_N32 = ((sketched_N32 >= 0) & (c * 32 + k < D)[None, :]).to(tl.int32)
        word_N = tl.sum(bit_N32 << k[None, :], axis=1)
        tl.store(sign_ptr + (row_N * chunks + c), word_N, mask=keep_N)
