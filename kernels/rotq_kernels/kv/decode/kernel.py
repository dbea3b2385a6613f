# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Split-KV attention of a few query rows over packed pages: the partial results of each split.

A program takes one KV head of one sequence and a run of its tokens, a tile of them at a time:

    scores  = (levels . query) s_t + (signs . residual query) (s_t or g_t) + mean
    weights = exp2(scores - running maximum)
    sums   += values^T (weights s_t)

Coefficients of a mean that turns are fp16 relative to their largest, and the rest of a score is
counted in the same unit until all of it is there. Values meet the weights as 2^-24 of what they are
above the lowest level, see ``unpack``. fp32 queries get three limbs and weights in two halves. What
each split leaves: its maximum, its sum of weights and its weighted sums of rotated values.

Page numbers are loaded a tile ahead, and words of values before the keys are treated; occupancy
hides the rest.

Letters as in ``tile``; also B sequences, H KV heads, R rotary pairs, PAIRS those padded, T query
tokens, TILE = I J tokens of a tile, V_WIDTH columns of its values.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.decode.tile import (
    held_lines,
    key_operand,
    multiply,
    no_sums,
    over_columns,
    per_column,
    query_operand,
    sum_of,
    value_column,
    value_operand,
)
from rotq_kernels.kv.paging import (
    chunk_words,
    load_hidden,
    load_norms,
    load_page,
    past_gaps,
    rows_of,
    seen_tokens,
    value_range,
)
from rotq_kernels.kv.rope_mean_tile import load_angles, load_coefficients, turn
from rotq_kernels.kv.unpack import from_lowest, load_table, quads_of

_NOTHING = tl.constexpr(-1e30)
"""Running maximum before anything was seen; finite, so that no difference is undefined."""


@triton.jit(do_not_specialize=["rows", "T", "table_width", "partials", "run"])
def decode_kernel(
    levels_ptr,
    residual_ptr,
    cosine_ptr,
    sine_ptr,
    angle_ptr,
    frequency_ptr,
    k_codes_ptr,
    k_norm_ptr,
    k_sign_ptr,
    k_gamma_ptr,
    k_table_ptr,
    k_base_ptr,
    gamma_base_ptr,
    v_codes_ptr,
    v_norm_ptr,
    v_table_ptr,
    v_base_ptr,
    page_table_ptr,
    length_ptr,
    start_ptr,
    hidden_ptr,
    position_ptr,
    sums_ptr,
    peak_ptr,
    weight_ptr,
    H,
    rows,
    T,
    table_width,
    partials,
    run,
    gap_k_codes,
    gap_k_norm,
    gap_k_sign,
    gap_k_gamma,
    gap_v_codes,
    gap_v_norm,
    D: tl.constexpr,
    R: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    LIMBS: tl.constexpr,
    PTX: tl.constexpr,
    PAIRS: tl.constexpr,
    TURNED: tl.constexpr,
    WARPS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + 31) // 32
    J: tl.constexpr = 4 // CHUNKS if CHUNKS <= 2 else 1
    BLOCKS: tl.constexpr = (CHUNKS + 3) // 4
    LINES: tl.constexpr = TILE // J
    V_WIDTH: tl.constexpr = 128 * BLOCKS // J
    PRECISION: tl.constexpr = "tf32x3" if PTX else "ieee"
    bh, split = tl.program_id(0), tl.program_id(1)
    b, head = bh // H, bh % H
    length, start = tl.load(length_ptr + b), tl.load(start_ptr + b)

    # the tokens of this split, whole tiles of those that any query row sees; beyond the last one
    # there is nothing to do, and nothing is left but that
    hidden = load_hidden(hidden_ptr, b)
    seen_first, seen_end = seen_tokens(
        position_ptr + b * T, rows, T, start, hidden, length, WINDOW, N
    )
    end = tl.maximum(tl.max(seen_end, axis=0), 0)
    begin = tl.min(tl.where(seen_end > 0, seen_first, end), axis=0) // TILE * TILE
    begin += split * run
    end = tl.minimum(begin + run, end)
    first, last = per_column(seen_first, J, N), per_column(seen_end, J, N)
    if begin >= end:
        n = tl.arange(0, N)
        spot = (bh.to(tl.int64) * partials + split) * rows + n
        tl.store(peak_ptr + spot, tl.full([N], _NOTHING, tl.float32), mask=n < rows)
        tl.store(weight_ptr + spot, tl.zeros([N], tl.float32), mask=n < rows)
        return

    query_row = bh.to(tl.int64) * rows
    unit, total, low, high = query_operand(
        levels_ptr + query_row * D, rows, D, K_BITS, J, N, LIMBS, PAIRS
    )
    k_table = load_table(k_table_ptr, head, K_BITS)
    v_table, lowest = from_lowest(load_table(v_table_ptr, head, V_BITS), V_BITS)
    k_base = tl.load(k_base_ptr + head)
    v_base, v_factor, v_worth = value_range(v_norm_ptr, tl.load(v_base_ptr + head))
    if k_sign_ptr is not None:
        r_unit, _, r_low, r_high = query_operand(
            residual_ptr + query_row * D, rows, D, 1, J, N, LIMBS, PAIRS
        )
        sign_table = load_table(None, head, 1)
    if k_gamma_ptr is not None:
        gamma_base = tl.load(gamma_base_ptr + head)

    lane = tl.arange(0, 4)
    lane_first = J * tl.arange(0, LINES)[:, None]
    lane_token = lane_first + (lane // (4 // J))[None, :]
    held_first = J * held_lines(LINES, WARPS)[:, None]
    held_token = held_first + tl.arange(0, J)[None, :]
    if cosine_ptr is not None:
        cosine, sine, worth, cos_step, sin_step = load_coefficients(
            cosine_ptr + query_row * R,
            sine_ptr + query_row * R,
            frequency_ptr,
            start + begin,
            rows,
            R,
            J,
            N,
            TILE,
        )
        cos_tile, sin_tile = load_angles(angle_ptr, J * held_lines(LINES, WARPS), R, TILE)
        unit /= worth
        if k_sign_ptr is not None:
            r_unit /= worth

    page_table_ptr += b.to(tl.int64) * table_width
    peak = tl.full([N], _NOTHING, tl.float32)
    weight = tl.zeros([LINES, J * N], tl.float32)
    bias = tl.zeros([LINES, J * N], tl.float32)
    sums = tl.zeros([V_WIDTH, N], tl.float32)
    page = load_page(page_table_ptr, begin, lane_first, length, PAGE, TILE)
    held_page = load_page(page_table_ptr, begin, held_first, length, PAGE, TILE)
    for t0 in range(begin, end, TILE):
        page_row = rows_of(page, t0, lane_token, head, H, PAGE, TILE)
        norm_row = rows_of(held_page, t0, held_token, head, H, PAGE, TILE)
        k_codes = past_gaps(k_codes_ptr, page, gap_k_codes)
        v_codes = past_gaps(v_codes_ptr, page, gap_v_codes)
        here, held_here = page, held_page
        page = load_page(page_table_ptr, t0 + TILE, lane_first, length, PAGE, TILE)
        held_page = load_page(page_table_ptr, t0 + TILE, held_first, length, PAGE, TILE)
        token = t0 + held_token
        there = token < length
        k_words = chunk_words(k_codes, page_row, 0, CHUNKS, J, K_BITS, TURNED)
        v_words = chunk_words(v_codes, page_row, 0, CHUNKS, J, V_BITS, TURNED)
        k_norm = load_norms(k_norm_ptr, held_here, gap_k_norm, norm_row, there, k_base, 1.0)
        v_norm = load_norms(v_norm_ptr, held_here, gap_v_norm, norm_row, there, v_base, v_factor)

        # [I, 128] @ [128, J N] -> [I, J N]
        keys = key_operand(quads_of(k_words, k_table, K_BITS, PTX), LINES, K_BITS, WARPS, PAIRS)
        found = multiply(keys, low, no_sums(LINES, J * N, LIMBS), LIMBS)
        if BLOCKS == 2:
            # the same with the other half of the head
            k_words = chunk_words(k_codes, page_row, 1, CHUNKS, J, K_BITS, TURNED)
            keys = key_operand(quads_of(k_words, k_table, K_BITS, PTX), LINES, K_BITS, WARPS, PAIRS)
            found = multiply(keys, high, found, LIMBS)
        score = sum_of(found, LIMBS)
        if K_BITS > 4:
            shift: tl.constexpr = 0.5 if K_BITS == 8 else -(2**K_BITS - 1) / 2
            score += (shift * total)[None, :]
        score *= over_columns(k_norm, N) * unit[None, :]
        if k_sign_ptr is not None:
            # [I, 128] @ [128, J N] -> [I, J N], once for each half of the head
            k_signs = past_gaps(k_sign_ptr, here, gap_k_sign)
            words = chunk_words(k_signs, page_row, 0, CHUNKS, J, 1, TURNED)
            keys = key_operand(quads_of(words, sign_table, 1, PTX), LINES, 1, WARPS, PAIRS)
            found = multiply(keys, r_low, no_sums(LINES, J * N, LIMBS), LIMBS)
            if BLOCKS == 2:
                words = chunk_words(k_signs, page_row, 1, CHUNKS, J, 1, TURNED)
                keys = key_operand(quads_of(words, sign_table, 1, PTX), LINES, 1, WARPS, PAIRS)
                found = multiply(keys, r_high, found, LIMBS)
            if k_gamma_ptr is not None:
                k_norm = load_norms(
                    k_gamma_ptr, held_here, gap_k_gamma, norm_row, there, gamma_base, 1.0
                )
            score += sum_of(found, LIMBS) * (over_columns(k_norm, N) * r_unit[None, :])
        if cosine_ptr is not None:
            kind: tl.constexpr = cos_tile.dtype
            # [I, PAIRS] @ [PAIRS, J N] -> [I, J N]
            score = tl.dot(cos_tile, cosine.to(kind), score, input_precision=PRECISION)
            score = tl.dot(sin_tile, sine.to(kind), score, input_precision=PRECISION)
            score *= worth[None, :]
            cosine, sine = turn(cosine, sine, cos_step, sin_step)

        token_all = over_columns(token, N)
        seen = token_all < last[None, :]
        if WINDOW > 0 or hidden_ptr is not None:
            seen &= token_all >= first[None, :]
        score = tl.where(seen, score, -float("inf"))
        # over the tokens of a line first, which are one lane's: [I, J N] -> [I, J, N] -> [I, N]
        line_peak = tl.max(score.reshape(LINES, J, N), axis=1)
        new_peak = tl.maximum(peak, tl.max(line_peak, axis=0))
        fade = tl.exp2(peak - new_peak)
        peak = new_peak
        fade_all = per_column(fade, J, N)[None, :]
        share = tl.exp2(score - per_column(peak, J, N)[None, :])
        weight = weight * fade_all + share
        share *= over_columns(v_norm, N)
        share16 = share.to(tl.float16)
        bias = bias * fade_all + share16.to(tl.float32)

        # [TILE, 128 / J]
        values = value_operand(quads_of(v_words, v_table, V_BITS, PTX), LINES, J, WARPS, PTX)
        if BLOCKS == 2:
            v_words = chunk_words(v_codes, page_row, 1, CHUNKS, J, V_BITS, TURNED)
            more = value_operand(quads_of(v_words, v_table, V_BITS, PTX), LINES, J, WARPS, PTX)
            # J is 1: [TILE, 128, 2] -> [TILE, 2, 128] -> [TILE, V_WIDTH]
            values = tl.join(values, more).permute(0, 2, 1).reshape(TILE, V_WIDTH)
        sums *= fade[None, :]
        # [I, J N] -> [TILE, N]; [V_WIDTH, TILE] @ [TILE, N] -> [V_WIDTH, N]
        sums = tl.dot(tl.trans(values), share16.reshape(TILE, N), sums)
        if LIMBS == 3:
            rest16 = (share - share16.to(tl.float32)).to(tl.float16)
            bias += rest16.to(tl.float32)
            # [V_WIDTH, TILE] @ [TILE, N] -> [V_WIDTH, N]
            sums = tl.dot(tl.trans(values), rest16.reshape(TILE, N), sums)

    # [I, J N] -> [J N] -> [J, N] -> [N]
    bias_N = tl.sum(tl.sum(bias, axis=0).reshape(J, N), axis=0)
    sums = sums * 16777216.0 + (lowest * bias_N)[None, :]
    d, n = value_column(tl.arange(0, V_WIDTH), J, V_BITS), tl.arange(0, N)
    spot = (bh.to(tl.int64) * partials + split) * rows + n
    inside = (d < D)[:, None] & (n < rows)[None, :]
    tl.store(sums_ptr + spot[None, :] * D + d[:, None], sums * v_worth, mask=inside)
    tl.store(peak_ptr + spot, peak, mask=n < rows)
    # [I, J N] -> [J N] -> [J, N] -> [N]
    weight_N = tl.sum(tl.sum(weight, axis=0).reshape(J, N), axis=0)
    tl.store(weight_ptr + spot, weight_N, mask=n < rows)
