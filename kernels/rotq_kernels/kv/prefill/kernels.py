# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels of ``prefill.launch``: many query rows over packed pages, then over dense tokens.

A program takes N query rows of one KV head, query heads by tokens, and walks over the tokens in
tiles (``prefill.tile``). The keys' mean is turned to a tile's tokens once for all rows: from its
pairs at the tile's first token, by a table of the angles that follow.

Letters: N query rows of a program, TILE tokens of a tile, D head width, WIDTH that padded (to
chunks of 32, a power of two of them; for dense tokens to a power of two), R rotary pairs, PAIRS
those padded, T query tokens, H KV heads.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.paging import load_hidden, load_norms, load_page, past_gaps, rows_of
from rotq_kernels.kv.prefill.tile import (
    element_of,
    load_levels,
    load_query,
    load_query_pairs,
    load_value_norms,
    turned_mean,
    value_worth,
)
from rotq_kernels.kv.unpack import load_table

_NOTHING = tl.constexpr(-1e30)
"""Running maximum before anything was seen; finite, so that no difference is undefined."""


@triton.jit(do_not_specialize=["rows", "T", "table_width", "tiles"])
def packed_kernel(
    q_ptr,
    levels_ptr,
    residual_ptr,
    constant_ptr,
    mean_ptr,
    angle_ptr,
    origin_ptr,
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
    tiles,
    mean_scale,
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
    EXACT: tl.constexpr,
    PTX: tl.constexpr,
):
    """The packed tokens' part: rotated sums (rows, D), maxima in log2, sums of weights."""
    WIDTH: tl.constexpr = 32 * triton.next_power_of_2((D + 31) // 32)
    PRECISION: tl.constexpr = "tf32x3" if PTX else "ieee"
    KIND: tl.constexpr = tl.float32 if EXACT else tl.float16
    bh = tl.program_id(1)
    b, head = bh // H, bh % H
    n, i = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, TILE)
    query_row = bh.to(tl.int64) * rows
    length, start = tl.load(length_ptr + b), tl.load(start_ptr + b)

    # tokens that each row sees; none for rows at -1
    position = tl.load(position_ptr + b * T + n % T, mask=n < rows, other=-1)
    last = tl.where(position >= 0, tl.minimum(length, position - start + 1), 0)
    hidden = load_hidden(hidden_ptr, b)
    first = tl.zeros_like(last) + hidden
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1 - start, hidden)
    if WINDOW > 0 or hidden_ptr is not None:
        last = tl.where(last > first, last, 0)
    end = tl.maximum(tl.max(last, axis=0), 0)
    begin = tl.min(tl.where(last > 0, first, end), axis=0) // TILE * TILE

    x, unit = load_query(levels_ptr + query_row * D, n, rows, D, K_BITS, EXACT)
    k_table = load_table(k_table_ptr, head, K_BITS)
    v_table = load_table(v_table_ptr, head, V_BITS)
    k_base, v_base = tl.load(k_base_ptr + head), tl.load(v_base_ptr + head)
    if k_sign_ptr is not None:
        r_x, r_unit = load_query(residual_ptr + query_row * D, n, rows, D, 1, EXACT)
        sign_table = load_table(None, head, 1)
    if k_gamma_ptr is not None:
        gamma_base = tl.load(gamma_base_ptr + head)
    if mean_ptr is not None:
        q, q_unit = load_query_pairs(q_ptr + query_row * D, n, rows, D, R, EXACT)
        mean_ptr += head * D
        origin_ptr += b.to(tl.int64) * tiles * (2 * R)
    constant = tl.zeros([N], tl.float32)
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + query_row + n, mask=n < rows, other=0.0)

    page_table_ptr += b.to(tl.int64) * table_width
    # what pages hold beyond a length is finite, and so harmless
    everywhere = tl.full([TILE], 1, tl.int1)
    peak = tl.full([N], _NOTHING, tl.float32)
    weight = tl.zeros([N], tl.float32)
    sums = tl.zeros([N, WIDTH], tl.float32)
    for t0 in range(begin, end, TILE):
        page = load_page(page_table_ptr, t0, i, length, PAGE, TILE)
        row = rows_of(page, t0, i, head, H, PAGE, TILE)
        token = t0 + i
        k_codes = past_gaps(k_codes_ptr, page, gap_k_codes)
        k_norm = load_norms(k_norm_ptr, page, gap_k_norm, row, everywhere, k_base, 1.0)
        levels = load_levels(k_codes, row, k_table, D, K_BITS, EXACT, PTX)
        # [N, WIDTH] @ [WIDTH, TILE] -> [N, TILE]
        score = tl.dot(x, tl.trans(levels), input_precision=PRECISION)
        score *= unit[:, None] * k_norm[None, :]
        if k_sign_ptr is not None:
            k_signs = past_gaps(k_sign_ptr, page, gap_k_sign)
            signs = load_levels(k_signs, row, sign_table, D, 1, EXACT, PTX)
            # [N, WIDTH] @ [WIDTH, TILE] -> [N, TILE]
            found = tl.dot(r_x, tl.trans(signs), input_precision=PRECISION)
            if k_gamma_ptr is not None:
                k_norm = load_norms(
                    k_gamma_ptr, page, gap_k_gamma, row, everywhere, gamma_base, 1.0
                )
            score += found * (r_unit[:, None] * k_norm[None, :])
        if mean_ptr is not None:
            origin = origin_ptr + (t0 // TILE) * (2 * R)
            # adding 0 keeps the compiler from holding the table in registers, which then spill
            turned = turned_mean(mean_ptr, origin, angle_ptr + t0 % TILE, i, R, TILE)
            # [N, 2 PAIRS] @ [2 PAIRS, TILE] -> [N, TILE]
            found = tl.dot(q, tl.trans(turned.to(KIND)), input_precision=PRECISION)
            score += found * (q_unit * mean_scale)[:, None]
        score += constant[:, None]

        seen = token[None, :] < last[:, None]
        if WINDOW > 0 or hidden_ptr is not None:
            seen &= token[None, :] >= first[:, None]
        score = tl.where(seen, score, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        fade = tl.exp2(peak - new_peak)
        peak = new_peak
        share = tl.exp2(score - peak[:, None])
        weight = weight * fade + tl.sum(share, axis=1)
        v_codes = past_gaps(v_codes_ptr, page, gap_v_codes)
        values = load_levels(v_codes, row, v_table, D, V_BITS, EXACT, PTX)
        values *= load_value_norms(v_norm_ptr, page, gap_v_norm, row, EXACT)[:, None]
        sums *= fade[:, None]
        # [N, TILE] @ [TILE, WIDTH] -> [N, WIDTH]
        sums = tl.dot(share.to(KIND), values, sums, input_precision=PRECISION)

    v_worth = value_worth(v_norm_ptr, v_base)
    d = element_of(tl.arange(0, WIDTH), V_BITS)
    inside = (n < rows)[:, None] & (d < D)[None, :]
    tl.store(sums_ptr + (query_row + n)[:, None] * D + d[None, :], sums * v_worth, mask=inside)
    tl.store(peak_ptr + query_row + n, peak, mask=n < rows)
    tl.store(weight_ptr + query_row + n, weight, mask=n < rows)


@triton.jit(do_not_specialize=["rows", "T", "tokens"])
def dense_chunk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_position_ptr,
    position_ptr,
    sums_ptr,
    peak_ptr,
    weight_ptr,
    out_ptr,
    H,
    rows,
    T,
    tokens,
    scale,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with dense tokens, from sums (rows, D) that are no longer rotated, and divide."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    bh = tl.program_id(1)
    b, head = (bh // H).to(tl.int64), bh % H
    n, i, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, TILE), tl.arange(0, WIDTH)
    row = bh.to(tl.int64) * rows + n
    inside = (n < rows)[:, None] & (d < D)[None, :]
    spot = row[:, None] * D + d[None, :]
    q = tl.load(q_ptr + spot, mask=inside, other=0.0)
    position = tl.load(position_ptr + b * T + n % T, mask=n < rows, other=-1)
    latest = tl.max(position, axis=0)
    earliest = tl.min(tl.where(position >= 0, position, latest), axis=0)
    sums = tl.load(sums_ptr + spot, mask=inside, other=0.0)
    peak = tl.load(peak_ptr + row, mask=n < rows, other=_NOTHING)
    weight = tl.load(weight_ptr + row, mask=n < rows, other=0.0)
    k_ptr += b * stride_kb + head * stride_kh
    v_ptr += b * stride_vb + head * stride_vh
    for t0 in range(0, tokens, TILE):
        token = t0 + i
        k_position = tl.load(k_position_ptr + b * tokens + token, mask=token < tokens, other=-1)
        there = k_position >= 0
        visible = there & (k_position <= latest)
        if WINDOW > 0:
            visible &= earliest - k_position < WINDOW
        # above the diagonal, and before the window, there is nothing to do
        if tl.max(visible.to(tl.int32), axis=0) > 0:
            readable = there[:, None] & (d < D)[None, :]
            line = token.to(tl.int64)[:, None]
            k = tl.load(k_ptr + line * stride_kn + d[None, :], mask=readable, other=0.0)
            v = tl.load(v_ptr + line * stride_vn + d[None, :], mask=readable, other=0.0)
            ahead = position[:, None] - k_position[None, :]
            seen = there[None, :] & (ahead >= 0)
            if WINDOW > 0:
                seen &= ahead < WINDOW
            # [N, WIDTH] @ [WIDTH, TILE] -> [N, TILE]
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
            score = tl.where(seen, score, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(score, axis=1))
            fade = tl.exp2(peak - new_peak)
            peak = new_peak
            share = tl.exp2(score - peak[:, None])
            weight = weight * fade + tl.sum(share, axis=1)
            share = share.to(q.dtype)
            # [N, TILE] @ [TILE, WIDTH] -> [N, WIDTH]
            sums = tl.dot(share, v.to(q.dtype), sums * fade[:, None], input_precision=PRECISION)
    sums /= tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out_ptr + spot, sums.to(out_ptr.dtype.element_ty), mask=inside)
