# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Dense keys and values as one more split, and all splits merged into the output.

The sums over packed tokens are in the rotated basis of the values. With weights w of each split
that bring its maximum to that of all,

    out = (A_v^-1 sum w sums_packed + mean sum w weight_packed + w sums_dense) / sum w weight

so that the inverse is applied once to each query row. Rows that see no token become zero.

Letters: B sequences, H KV heads, N query rows of a KV head, P partial results, D head width, WIDTH
that padded to a power of two, TILE dense tokens at a time, BLOCK elements of the output.
"""

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-1e30)
"""Maximum where nothing was seen; finite, so that no difference is undefined."""


@triton.jit
def dense_kernel(
    q_ptr,
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
    """Attention over tokens kept whole, into the last partial result; ``scale`` is in log2."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    bh = tl.program_id(0)
    b, head = (bh // H).to(tl.int64), bh % H
    n, d, i = tl.arange(0, N), tl.arange(0, WIDTH), tl.arange(0, TILE)
    inside = (n < rows)[:, None] & (d < D)[None, :]
    x = tl.load(
        q_ptr + (bh.to(tl.int64) * rows + n)[:, None] * D + d[None, :], mask=inside, other=0.0
    )
    x = x.to(tl.float32)
    position = tl.load(position_ptr + b * T + n % T, mask=n < rows, other=-1)
    k_ptr += b * stride_kb + head * stride_kh
    v_ptr += b * stride_vb + head * stride_vh
    peak = tl.full([N], _NOTHING, tl.float32)
    weight = tl.zeros([N], tl.float32)
    sums = tl.zeros([N, WIDTH], tl.float32)
    for t0 in range(0, tokens, TILE):
        token = t0 + i
        there = (token < tokens)[:, None] & (d < D)[None, :]
        spot = token.to(tl.int64)[:, None]
        k = tl.load(k_ptr + spot * stride_kn + d[None, :], mask=there, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + spot * stride_vn + d[None, :], mask=there, other=0.0).to(tl.float32)
        k_position = tl.load(k_position_ptr + b * tokens + token, mask=token < tokens, other=-1)
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
    spot = (bh.to(tl.int64) * partials + partials - 1) * rows + n
    tl.store(sums_ptr + spot[:, None] * D + d[None, :], sums, mask=inside)
    tl.store(peak_ptr + spot, peak, mask=n < rows)
    tl.store(weight_ptr + spot, weight, mask=n < rows)


@triton.jit
def merge_kernel(
    sums_ptr,
    peak_ptr,
    weight_ptr,
    constant_ptr,
    inverse_ptr,
    mean_ptr,
    out_ptr,
    H,
    rows,
    packed,
    partials,
    D: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK elements of the rows of a head; ``packed`` of the ``partials`` are of packed tokens."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    bh, head = tl.program_id(0), tl.program_id(0) % H
    n, j, p = tl.arange(0, N), tl.arange(0, WIDTH), tl.arange(0, P)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    spot = bh.to(tl.int64) * partials * rows + n
    constant = tl.zeros([N], tl.float32)
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + bh.to(tl.int64) * rows + n, mask=n < rows, other=0.0)

    there = (p < partials)[:, None] & (n < rows)[None, :]
    of_packed = (p < packed)[:, None]
    peak = tl.load(peak_ptr + spot[None, :] + p[:, None] * rows, mask=there, other=_NOTHING)
    peak += tl.where(of_packed, constant[None, :], 0.0)
    weight = tl.load(weight_ptr + spot[None, :] + p[:, None] * rows, mask=there, other=0.0)
    top = tl.max(peak, axis=0)
    weight *= tl.exp2(peak - top[None, :])
    share = tl.sum(tl.where(of_packed, weight, 0.0), axis=0)
    total = tl.sum(weight, axis=0)

    turned = tl.zeros([N, WIDTH], tl.float32)
    inside = (n < rows)[:, None] & (j < D)[None, :]
    for part in range(packed):
        row = spot + part * rows
        fade = tl.exp2(tl.load(peak_ptr + row, mask=n < rows, other=_NOTHING) + constant - top)
        sums = tl.load(sums_ptr + row[:, None] * D + j[None, :], mask=inside, other=0.0)
        turned += fade[:, None] * sums
    within = (j < D)[:, None] & (d < D)[None, :]
    inverse_ptr += head * D * D
    inverse = tl.load(inverse_ptr + d[None, :] * D + j[:, None], mask=within, other=0.0)
    # [N, WIDTH] @ [WIDTH, BLOCK] -> [N, BLOCK]
    out = tl.dot(turned, inverse, input_precision=PRECISION)
    mean = tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)
    out += share[:, None] * mean[None, :]
    inside = (n < rows)[:, None] & (d < D)[None, :]
    if partials > packed:
        row = spot + packed * rows
        fade = tl.exp2(tl.load(peak_ptr + row, mask=n < rows, other=_NOTHING) - top)
        whole = tl.load(sums_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        out += fade[:, None] * whole
    out /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + (bh.to(tl.int64) * rows + n)[:, None] * D + d[None, :], out, mask=inside)
