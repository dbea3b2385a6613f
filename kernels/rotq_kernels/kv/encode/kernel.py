# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel that turns keys or values into codes, norms and residual bits.

One program takes a tile of tokens of one KV head: y = A (x - m) by blocks of A's columns, then
everything on the tile in registers, as ``one_side.quantize_side`` defines it, then words as
``layout.pack_kv`` does. Prefill and append are the same, but for the height of a narrow tile.

Sums are in fp32 and of another order than PyTorch's, so that y differs by roundings and a y on a
threshold may fall to either side; where sums are exact, codes and norms are bitwise the same.

Shape suffixes: N tokens of a tile, D head width padded to a power of two, K block of the head
width.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.encode.one_side import SMALLEST_RMS
from rotq_kernels.kv.encode.search_tile import search as search_tile
from rotq_kernels.kv.encode.tile import (
    quantize,
    store_norm,
    store_sketch,
    store_words,
    turned_mean,
)
from rotq_kernels.kv.paging import past_gaps

_SMALLEST_RMS = tl.constexpr(SMALLEST_RMS)


@triton.jit(do_not_specialize=["num_positions", "num_tokens"])
def encode_kernel(
    x_ptr,
    position_ptr,
    slot_ptr,
    matrix_ptr,
    mean_ptr,
    levels_ptr,
    thresholds_ptr,
    base_ptr,
    unit_ptr,
    inv_freq_ptr,
    sketch_ptr,
    gamma_base_ptr,
    metric_ptr,
    codes_ptr,
    norm_ptr,
    sign_ptr,
    gamma_ptr,
    stride_b,
    stride_h,
    stride_t,
    rotary_scale,
    num_positions,
    num_tokens,
    gap_codes,
    gap_norm,
    gap_sign,
    gap_gamma,
    D: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    GAIN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot_N = tl.load(slot_ptr + n, mask=n < num_tokens, other=-1).to(tl.int64)
    keep_N = slot_N >= 0
    from_N = (n // num_positions).to(tl.int64) * stride_b + (n % num_positions).to(
        tl.int64
    ) * stride_t
    from_N += x_ptr + h * stride_h
    page_N = slot_N // PAGE
    row_N = (page_N * num_heads + h) * PAGE + slot_N % PAGE
    position_N = tl.load(position_ptr + n, mask=keep_N, other=0)
    d = tl.arange(0, BLOCK_D)

    y_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_K):
        d_K = start + tl.arange(0, BLOCK_K)
        x_NK = tl.load(
            from_N[:, None] + d_K[None, :], mask=keep_N[:, None] & (d_K < D)[None, :], other=0.0
        ).to(tl.float32)
        if R > 0:
            x_NK -= turned_mean(mean_ptr + h * D, inv_freq_ptr, position_N, d_K, rotary_scale, D, R)
        else:
            x_NK -= tl.load(mean_ptr + h * D + d_K, mask=d_K < D, other=0.0)[None, :]
        matrix_KD = tl.load(
            matrix_ptr + (h * D + d[None, :]) * D + d_K[:, None],
            mask=(d_K < D)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        # [N, K] @ [K, D] -> [N, D]
        y_ND = tl.dot(x_NK, matrix_KD, y_ND, input_precision=PRECISION)

    # columns beyond D are zero, and stay out of every sum
    u_ND = y_ND
    if NORM != "none":
        energy_N = tl.sum(y_ND * y_ND, axis=1)
        rms_N = tl.sqrt_rn(tl.div_rn(energy_N, D * 1.0))
        u_ND = y_ND * tl.div_rn(1.0, tl.maximum(rms_N, _SMALLEST_RMS))[:, None]
    codes = 2**BITS
    code_ND, level_ND = quantize(
        u_ND, levels_ptr + h * codes, thresholds_ptr + h * (codes - 1), BITS
    )
    code_ND = tl.where((d < D)[None, :], code_ND, 0)
    level_ND = tl.where((d < D)[None, :], level_ND, 0.0)
    if SEARCH > 0:
        code_ND, level_ND, searched_N = search_tile(
            y_ND,
            code_ND,
            level_ND,
            metric_ptr + h * D * D,
            levels_ptr + h * codes,
            thresholds_ptr + h * (codes - 1),
            tl.load(unit_ptr + h),
            D,
            BITS,
            SEARCH,
            PRECISION,
        )
    store_words(past_gaps(codes_ptr, page_N, gap_codes), row_N, keep_N, code_ND, D, BITS)

    base = tl.load(base_ptr + h)
    if NORM == "none":
        kept_N = tl.exp2(base + tl.zeros([BLOCK_N], tl.float32))
    else:
        if SEARCH > 0:
            scale_N = searched_N
        elif GAIN == "none":
            scale_N = tl.load(unit_ptr + h) * rms_N
        elif GAIN == "lsq":
            scale_N = tl.div_rn(
                tl.sum(y_ND * level_ND, axis=1), tl.sum(level_ND * level_ND, axis=1)
            )
        else:
            scale_N = tl.sqrt_rn(tl.div_rn(energy_N, tl.sum(level_ND * level_ND, axis=1)))
        # as the reference: a row that is not finite gets the largest norm; asked of y, which is
        # still held, as another number to hold would spill
        is_finite_N = tl.sum(tl.abs(y_ND), axis=1) < float("inf")
        scale_N = tl.where(is_finite_N, tl.maximum(scale_N, 0.0), float("inf"))
        kept_N = store_norm(
            past_gaps(norm_ptr, page_N, gap_norm), row_N, keep_N, scale_N, base, NORM
        )

    if RESIDUAL != "none":
        signs = past_gaps(sign_ptr, page_N, gap_sign)
        left_ND = y_ND - kept_N[:, None] * level_ND
        if RESIDUAL == "sign":
            bit_ND = ((left_ND >= 0) & (d < D)[None, :]).to(tl.int32)
            store_words(signs, row_N, keep_N, bit_ND, D, 1)
        else:
            store_sketch(signs, sketch_ptr, row_N, keep_N, left_ND, D, PRECISION)
            if NORM != "none":
                left_N = tl.sqrt_rn(tl.div_rn(tl.sum(left_ND * left_ND, axis=1), D * 1.0))
                gammas = past_gaps(gamma_ptr, page_N, gap_gamma)
                store_norm(gammas, row_N, keep_N, left_N, tl.load(gamma_base_ptr + h), NORM)
