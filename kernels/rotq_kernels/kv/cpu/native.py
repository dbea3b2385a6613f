# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""A decode step's attention on CPUs, compiled by numba: scores, and weighted values.

A page of one head is looked up at a time, four levels for each 16 bits of codes as int8 in an
int32, into a buffer that stays in the first cache, and meets all query rows of its KV head there.
For scores the buffer's lanes are tokens, so that nothing is summed across a register; for values
they are elements. Levels are exact in int8 and in fp32; sums are in fp32, in another order than
torch's, and infinities, which stand for tokens that are not seen, stay. The mean that RoPE has
turned costs no sine per token: from page to page its coefficients turn by one angle, in fp64, and
within a page they meet a constant table.

A unit is one KV head of one sequence: units do not know of each other, and the interpreter's lock
is not held. ``decode`` prepares the arguments.

Shape suffixes: B sequences, P pages, H KV heads, M query rows of one KV head, N tokens that are
seen (dense ones first), S tokens of a page, W int32 words of a token, D head width, E the same in
whole chunks of 32, Q = E / 4, J pages of a sequence, R rotary pairs, L entries of a table.
"""

import functools
from typing import Any

import numpy as np

from rotq_kernels.compiled import SUMS, inlined, kept
from rotq_kernels.kv.format import STEPS_PER_OCTAVE


@functools.cache
def compiled_scores(bits: int, rows: int, quads: int, size: int) -> Any:
    """Scores of packed tokens; bits of the keys, M, Q and S are constants of the loops."""
    half, step = np.float32(0.5 if bits == 8 else 0.0), np.float32(1 / STEPS_PER_OCTAVE)

    @kept(fastmath=SUMS)
    def scores(
        units,
        x_BHMD,
        word_PHSW,
        norm_PHS,
        base_H,
        table_HL,
        page_BJ,
        span_B2,
        start_B,
        inverse_HDD,
        mean_HD,
        freq_R,
        factor,
        angle_2RS,
        num_dense,
        score_BHMN,
    ):
        heads, pairs = x_BHMD.shape[1], len(freq_R)
        quad_QS = np.zeros((quads, size), np.int32)
        scale_L = np.empty(256 if len(norm_PHS) else 1, np.float32)
        score_MS = np.empty((rows, size), np.float32)
        turned_ME = np.empty((rows, 4 * quads), np.float32)
        mean_MR2 = np.empty((rows, pairs, 2), np.float32)
        rest_M, offset_M = np.empty(rows, np.float32), np.empty(rows, np.float32)
        turn_cos_R, turn_sin_R = np.cos(size * freq_R), np.sin(size * freq_R)
        for unit in range(units[0], units[1]):
            b, h = unit // heads, unit % heads
            first, end = span_B2[b, 0], span_B2[b, 1]
            score_MN = score_BHMN[b, h]
            score_MN[:, num_dense + end - first :] = -np.inf
            _turn(x_BHMD[b, h], inverse_HDD[h], turned_ME, offset_M, half, rows)
            _turned_mean(x_BHMD[b, h], mean_HD[h], pairs, factor, mean_MR2, rest_M, rows)
            table_L = table_HL[h % len(table_HL)]
            _worth(base_H[h], scale_L, step)
            begins = first // size * size
            angle_R = (start_B[b] + begins) * freq_R
            cos_R, sin_R = np.cos(angle_R), np.sin(angle_R)
            for begin in range(begins, end, size):
                page = page_BJ[b, begin // size]
                low, high = max(0, first - begin), min(size, end - begin)
                _look_up(word_PHSW[page, h], table_L, low, high, quad_QS.T, bits)
                score_MS[:] = 0.0
                _products(turned_ME, quad_QS, score_MS, rows, quads, size)
                for n in range(low, high):
                    scale = scale_L[norm_PHS[page, h, n] if len(norm_PHS) else 0]
                    for m in range(rows):
                        score_MS[m, n] = (score_MS[m, n] + offset_M[m]) * scale + rest_M[m]
                _add_mean(mean_MR2, cos_R, sin_R, angle_2RS, score_MS, rows, size)
                for r in range(pairs):
                    cosine, sine = cos_R[r], sin_R[r]
                    cos_R[r] = cosine * turn_cos_R[r] - sine * turn_sin_R[r]
                    sin_R[r] = sine * turn_cos_R[r] + cosine * turn_sin_R[r]
                to = num_dense + begin - first
                for m in range(rows):
                    for n in range(low, high):
                        score_MN[m, to + n] = score_MS[m, n]

    return scores


@functools.cache
def compiled_values(bits: int, rows: int, quads: int, size: int) -> Any:
    """Weighted sums of packed values; bits of the values, M, Q and S are constants of the loops."""
    half, step = np.float32(0.5 if bits == 8 else 0.0), np.float32(1 / STEPS_PER_OCTAVE)

    @kept(fastmath=SUMS)
    def values(
        units,
        weight_BHMN,
        word_PHSW,
        norm_PHS,
        base_H,
        table_HL,
        page_BJ,
        span_B2,
        inverse_HDD,
        mean_HD,
        num_dense,
        out_BHMD,
    ):
        heads = weight_BHMN.shape[1]
        quad_SQ = np.zeros((size, quads), np.int32)
        scale_L = np.empty(256 if len(norm_PHS) else 1, np.float32)
        level_SE = quad_SQ.view(np.int8)
        weight_MS = np.empty((rows, size), np.float32)
        sum_ME = np.empty((rows, 4 * quads), np.float32)
        total_M, mass_M = np.empty(rows, np.float32), np.empty(rows, np.float32)
        for unit in range(units[0], units[1]):
            b, h = unit // heads, unit % heads
            first, end = span_B2[b, 0], span_B2[b, 1]
            weight_MN = weight_BHMN[b, h]
            table_L = table_HL[h % len(table_HL)]
            _worth(base_H[h], scale_L, step)
            sum_ME[:], total_M[:], mass_M[:] = 0.0, 0.0, 0.0
            for begin in range(first // size * size, end, size):
                page, at = page_BJ[b, begin // size], num_dense + begin - first
                low, high = max(0, first - begin), min(size, end - begin)
                _look_up(word_PHSW[page, h], table_L, low, high, quad_SQ, bits)
                for n in range(low, high):
                    scale = scale_L[norm_PHS[page, h, n] if len(norm_PHS) else 0]
                    for m in range(rows):
                        weight = weight_MN[m, at + n]
                        weight_MS[m, n] = weight * scale
                        mass_M[m] += weight
                        total_M[m] += weight * scale
                _add_levels(weight_MS, level_SE, low, high, sum_ME, rows, quads)
            _turn_back(
                sum_ME, total_M, mass_M, inverse_HDD[h], mean_HD[h], out_BHMD[b, h], half, rows
            )

    return values


@inlined(fastmath=SUMS)
def _turn(x_MD, inverse_DD, turned_ME, offset_M, half, rows):
    """x A^-1, and what a level of one half adds."""
    turned_ME[:] = 0.0
    for m in range(rows):
        for d in range(x_MD.shape[1]):
            for e in range(x_MD.shape[1]):
                turned_ME[m, e] += x_MD[m, d] * inverse_DD[d, e]
        offset_M[m] = half * turned_ME[m].sum()


@inlined(fastmath=SUMS)
def _products(turned_ME, quad_QS, score_MS, rows, quads, size):
    for i in range(quads):
        x_M4 = turned_ME[:, 4 * i : 4 * i + 4]
        for n in range(size):
            quad = quad_QS[i, n]
            x0 = np.float32(np.int32(quad << 24) >> 24)
            x1 = np.float32(np.int32(quad << 16) >> 24)
            x2 = np.float32(np.int32(quad << 8) >> 24)
            x3 = np.float32(quad >> 24)
            for m in range(rows):
                low = x_M4[m, 0] * x0 + x_M4[m, 1] * x1
                score_MS[m, n] += low + (x_M4[m, 2] * x2 + x_M4[m, 3] * x3)


@inlined(fastmath=SUMS)
def _add_mean(mean_MR2, cos_R, sin_R, angle_2RS, score_MS, rows, size):
    pairs = len(cos_R)
    for r in range(pairs):
        cosine, sine = np.float32(cos_R[r]), np.float32(sin_R[r])
        for m in range(rows):
            c, s = mean_MR2[m, r, 0], mean_MR2[m, r, 1]
            c, s = c * cosine + s * sine, s * cosine - c * sine
            for n in range(size):
                score_MS[m, n] += c * angle_2RS[r, n] + s * angle_2RS[pairs + r, n]


@inlined(fastmath=SUMS)
def _turned_mean(x_MD, mean_D, pairs, factor, mean_MR2, rest_M, rows):
    """Coefficients of cosine and sine, and what does not turn."""
    for m in range(rows):
        for r in range(pairs):
            x1, x2 = x_MD[m, r], x_MD[m, pairs + r]
            mean1, mean2 = mean_D[r], mean_D[pairs + r]
            mean_MR2[m, r, 0] = (x1 * mean1 + x2 * mean2) * factor
            mean_MR2[m, r, 1] = (x2 * mean1 - x1 * mean2) * factor
        rest_M[m] = (x_MD[m, 2 * pairs :] * mean_D[2 * pairs :]).sum()


@inlined(fastmath=SUMS)
def _add_levels(weight_MS, level_SE, low, high, sum_ME, rows, quads):
    for n in range(low, high):
        for e in range(4 * quads):
            level = np.float32(level_SE[n, e])
            for m in range(rows):
                sum_ME[m, e] += weight_MS[m, n] * level


@inlined(fastmath=SUMS)
def _turn_back(sum_ME, total_M, mass_M, inverse_DD, mean_D, out_MD, half, rows):
    for m in range(rows):
        for e in range(len(mean_D)):
            sum_ME[m, e] += half * total_M[m]
        for d in range(len(mean_D)):
            turned = np.float32(0.0)
            for e in range(len(mean_D)):
                turned += sum_ME[m, e] * inverse_DD[d, e]
            out_MD[m, d] += turned + mass_M[m] * mean_D[d]


@inlined(fastmath=SUMS)
def _worth(base, scale_L, step):
    """What each code of a norm stands for."""
    for code in range(len(scale_L)):
        scale_L[code] = np.exp2(base + np.float32(code) * step)


@inlined()
def _look_up(word_SW, table_L, low, high, quad_SQ, bits):
    """Levels of tokens ``low`` to ``high`` of one page of one head, four in an int32."""
    if bits == 3:
        _three(word_SW, table_L, low, high, quad_SQ)
    else:
        _even(word_SW, table_L, low, high, quad_SQ, bits)


@inlined()
def _three(word_SW, table_L, low, high, quad_SQ):
    u = np.uint32
    nibbles, ones, twos, fours = u(0x7777), u(0x11111111), u(0x22222222), u(0x44444444)
    for n in range(low, high):
        for c in range(word_SW.shape[1] // 3):
            a, b, d = word_SW[n, 3 * c], word_SW[n, 3 * c + 1], word_SW[n, 3 * c + 2]
            spare = ((a >> u(3)) & ones) | ((b >> u(2)) & twos) | ((d >> u(1)) & fours)
            quad_SQ[n, 8 * c] = table_L[a & nibbles]
            quad_SQ[n, 8 * c + 1] = table_L[(a >> u(16)) & nibbles]
            quad_SQ[n, 8 * c + 2] = table_L[b & nibbles]
            quad_SQ[n, 8 * c + 3] = table_L[(b >> u(16)) & nibbles]
            quad_SQ[n, 8 * c + 4] = table_L[d & nibbles]
            quad_SQ[n, 8 * c + 5] = table_L[(d >> u(16)) & nibbles]
            quad_SQ[n, 8 * c + 6] = table_L[spare & u(0xFFFF)]
            quad_SQ[n, 8 * c + 7] = table_L[spare >> u(16)]


@inlined()
def _even(word_SW, table_L, low, high, quad_SQ, bits):
    u = np.uint32
    for n in range(low, high):
        for w in range(word_SW.shape[1]):
            word = word_SW[n, w]
            if bits == 8:
                quad_SQ[n, w] = np.int32(word ^ u(0x80808080))
            elif bits == 4:
                quad_SQ[n, 2 * w] = table_L[word & u(0xFFFF)]
                quad_SQ[n, 2 * w + 1] = table_L[word >> u(16)]
            else:
                for byte in range(4):
                    quad_SQ[n, 4 * w + byte] = table_L[(word >> u(8 * byte)) & u(0xFF)]
