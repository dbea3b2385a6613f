# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What comes before the packed tokens, in one launch: the query turned, and the dense tokens.

A program takes all query rows of a KV head. Those of the first blocks turn the query into the bases
of the packed keys, as ``kv.query`` defines it, BLOCK columns each; the last one attends to the
tokens that are kept whole, and leaves one more partial result beside those of the splits.

Letters: B sequences, H KV heads, N query rows of a KV head, D head width, WIDTH that padded to a
power of two, BLOCK columns, R rotary pairs, PAIRS those padded, TILE dense tokens at a time.
"""

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-1e30)
"""Maximum where nothing was seen; finite, so that no difference is undefined."""


@triton.jit(do_not_specialize=["rows", "T", "tokens", "partials"])
def turn_kernel(
    q_ptr,
    inverse_ptr,
    residual_matrix_ptr,
    residual_scale_ptr,
    mean_ptr,
    levels_ptr,
    residual_ptr,
    cosine_ptr,
    sine_ptr,
    constant_ptr,
    k_ptr,
    v_ptr,
    k_position_ptr,
    position_ptr,
    sums_ptr,
    peak_ptr,
    weight_ptr,
    H,
    rows,
    T,
    tokens,
    partials,
    scale,
    rotary_scale,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    D: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TURN: tl.constexpr,
    DENSE: tl.constexpr,
):
    """``scale`` brings scores to units of log2; TURN and DENSE are the precisions of products."""
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    bh, block = tl.program_id(0), tl.program_id(1)
    b, head = (bh // H).to(tl.int64), bh % H
    row = bh.to(tl.int64) * rows
    if block < BLOCKS:
        _turn_columns(
            q_ptr + row * D,
            inverse_ptr + head * D * D,
            residual_matrix_ptr,
            residual_scale_ptr,
            levels_ptr + row * D,
            residual_ptr,
            head,
            row,
            block,
            rows,
            scale,
            D,
            N,
            BLOCK,
            TURN,
        )
        if block == 0:
            if constant_ptr is not None:
                _mean_constant(
                    q_ptr + row * D, mean_ptr + head * D, constant_ptr + row, rows, scale, D, R, N
                )
            if cosine_ptr is not None:
                _mean_coefficients(
                    q_ptr + row * D,
                    mean_ptr + head * D,
                    cosine_ptr + row * R,
                    sine_ptr + row * R,
                    rows,
                    scale * rotary_scale,
                    D,
                    R,
                    N,
                )
    else:
        _attend_dense(
            q_ptr + row * D,
            k_ptr + b * stride_kb + head * stride_kh,
            v_ptr + b * stride_vb + head * stride_vh,
            k_position_ptr + b * tokens,
            position_ptr + b * T,
            sums_ptr,
            peak_ptr,
            weight_ptr,
            (bh.to(tl.int64) * partials + partials - 1) * rows,
            rows,
            T,
            tokens,
            scale,
            stride_kn,
            stride_vn,
            D,
            WINDOW,
            N,
            TILE,
            DENSE,
        )


@triton.jit
def _turn_columns(
    q_ptr,
    inverse_ptr,
    residual_matrix_ptr,
    residual_scale_ptr,
    levels_ptr,
    residual_ptr,
    head,
    row,
    block,
    rows,
    scale,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns of x A^-1, and of what meets the signs."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    n, j = tl.arange(0, N), tl.arange(0, WIDTH)
    d = block * BLOCK + tl.arange(0, BLOCK)
    given = (n < rows)[:, None] & (j < D)[None, :]
    x = tl.load(q_ptr + n[:, None] * D + j[None, :], mask=given, other=0.0).to(tl.float32) * scale
    within = (j < D)[:, None] & (d < D)[None, :]
    inside = (n < rows)[:, None] & (d < D)[None, :]
    spot = n[:, None] * D + d[None, :]
    inverse = tl.load(inverse_ptr + j[:, None] * D + d[None, :], mask=within, other=0.0)
    # [N, WIDTH] @ [WIDTH, BLOCK] -> [N, BLOCK]
    levels = tl.dot(x, inverse, input_precision=PRECISION)
    tl.store(levels_ptr + spot, levels, mask=inside)
    if residual_ptr is not None:
        if residual_matrix_ptr is not None:
            place = residual_matrix_ptr + head * D * D + j[:, None] * D + d[None, :]
            # [N, WIDTH] @ [WIDTH, BLOCK] -> [N, BLOCK]
            matrix = tl.load(place, mask=within, other=0.0)
            found = tl.dot(x, matrix, input_precision=PRECISION)
        else:
            found = levels * tl.load(residual_scale_ptr + head)
        tl.store(residual_ptr + row * D + spot, found, mask=inside)


@triton.jit
def _mean_constant(
    q_ptr, mean_ptr, constant_ptr, rows, scale, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr
):
    """The part of the mean's score that is the same everywhere: of elements that RoPE leaves."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    n, j = tl.arange(0, N), tl.arange(0, WIDTH)
    kept = (j >= 2 * R) & (j < D)
    given = (n < rows)[:, None] & kept[None, :]
    x = tl.load(q_ptr + n[:, None] * D + j[None, :], mask=given, other=0.0).to(tl.float32) * scale
    mean = tl.load(mean_ptr + j, mask=kept, other=0.0)
    tl.store(constant_ptr + n, tl.sum(x * mean[None, :], axis=1), mask=n < rows)


@triton.jit
def _mean_coefficients(
    q_ptr,
    mean_ptr,
    cosine_ptr,
    sine_ptr,
    rows,
    scale,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Coefficients of cos and sin, (rows, R); see ``kv.rope_mean``."""
    PAIRS: tl.constexpr = triton.next_power_of_2(R)
    n, r = tl.arange(0, N), tl.arange(0, PAIRS)
    given = (n < rows)[:, None] & (r < R)[None, :]
    place = q_ptr + n[:, None] * D + r[None, :]
    first = tl.load(place, mask=given, other=0.0).to(tl.float32) * scale
    second = tl.load(place + R, mask=given, other=0.0).to(tl.float32) * scale
    mean1 = tl.load(mean_ptr + r, mask=r < R, other=0.0)[None, :]
    mean2 = tl.load(mean_ptr + R + r, mask=r < R, other=0.0)[None, :]
    spot = n[:, None] * R + r[None, :]
    tl.store(cosine_ptr + spot, first * mean1 + second * mean2, mask=given)
    tl.store(sine_ptr + spot, second * mean1 - first * mean2, mask=given)


@triton.jit
def _attend_dense(
    q_ptr,
    k_ptr,
    v_ptr,
    k_position_ptr,
    position_ptr,
    sums_ptr,
    peak_ptr,
    weight_ptr,
    spot,
    rows,
    T,
    tokens,
    scale,
    stride_kn,
    stride_vn,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention over tokens kept whole, into the last partial result."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    n, d, i = tl.arange(0, N), tl.arange(0, WIDTH), tl.arange(0, TILE)
    inside = (n < rows)[:, None] & (d < D)[None, :]
    x = tl.load(q_ptr + n[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + n % T, mask=n < rows, other=-1)
    peak = tl.full([N], _NOTHING, tl.float32)
    weight = tl.zeros([N], tl.float32)
    sums = tl.zeros([N, WIDTH], tl.float32)
    for t0 in range(0, tokens, TILE):
        token = t0 + i
        there = (token < tokens)[:, None] & (d < D)[None, :]
        line = token.to(tl.int64)[:, None]
        k = tl.load(k_ptr + line * stride_kn + d[None, :], mask=there, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + line * stride_vn + d[None, :], mask=there, other=0.0).to(tl.float32)
        k_position = tl.load(k_position_ptr + token, mask=token < tokens, other=-1)
        ahead = position[:, None] - k_position[None, :]
        seen = (k_position >= 0)[None, :] & (ahead >= 0)
        if WINDOW > 0:
            seen &= ahead < WINDOW
        # [N, WIDTH] @ [WIDTH, TILE] -> [N, TILE]
        score = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale
        score = tl.where(seen, score, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        fade = tl.exp2(peak - new_peak)
        peak = new_peak
        share = tl.exp2(score - peak[:, None])
        weight = weight * fade + tl.sum(share, axis=1)
        # what is not there must not be multiplied
        v = tl.where((k_position >= 0)[:, None], v, 0.0)
        # [N, TILE] @ [TILE, WIDTH] -> [N, WIDTH]
        sums = tl.dot(share, v, sums * fade[:, None], input_precision=PRECISION)
    tl.store(sums_ptr + (spot + n)[:, None] * D + d[None, :], sums, mask=inside)
    tl.store(peak_ptr + spot + n, peak, mask=n < rows)
    tl.store(weight_ptr + spot + n, weight, mask=n < rows)
