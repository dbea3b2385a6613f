# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Triton kernels of ``trellis.linear``: levels by arithmetic, no table.

Where rings are whole chunks of 32 rows, levels are made a chunk at a time (``chunks``). Elsewhere a
state is a funnel shift of two words by what its row says, and the last rows of a ring take what is
missing from its first word.

The sum of the four bytes is put below the exponent of 2^23: that is the float 2^23 + sum, without a
conversion, which would run at a quarter of the rate. The unit of levels is a factor of the scale.
All of that is exact.

Shape suffixes: M rows of x, N out features, K in features.
"""

import triton
import triton.language as tl

from rotq_kernels.trellis.chunks import chunk_levels, levels_of_states
from rotq_kernels.trellis.code import UNIT

STEP: tl.constexpr = tl.constexpr(1 / UNIT)


@triton.jit
def _word(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _row_levels(
    weight_ptr,
    n,
    k,
    N,
    K,
    ring,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
):
    """128 times the levels, fp32 (BLOCK_N, BLOCK_K); finite beyond N and K."""
    row = n % ring
    first = (n - row) * BITS // 32  # rings but the last end with their last word
    start = row * BITS
    left = ring * BITS - start
    inside = (n < N)[:, None] & (k < K)[None, :]
    ptrs = weight_ptr + (first + start // 32).to(tl.int64)[:, None] * K + k[None, :]
    shift = (start % 32).to(tl.uint32)
    used = tl.minimum(left, STATE_BITS)
    straddles = start % 32 + used > 32
    state = _word(ptrs, inside) >> shift[:, None]
    high = _word(ptrs + K, inside & straddles[:, None])
    state |= tl.where(straddles[:, None], high << ((32 - shift) & 31)[:, None], 0)
    state &= ((1 << used) - 1).to(tl.uint32)[:, None]
    around = left < STATE_BITS
    head = weight_ptr + first.to(tl.int64)[:, None] * K + k[None, :]
    more = _word(head, inside & around[:, None]) << used.to(tl.uint32)[:, None]
    state |= tl.where(around[:, None], more, 0)
    return levels_of_states(state & (2**STATE_BITS - 1), DOT)


@triton.jit
def _scales(scale_ptr, n, k, N, K, num_groups, GROUP: tl.constexpr):
    """fp32 (BLOCK_N, BLOCK_K), zeros beyond N and K."""
    ptrs = scale_ptr + n.to(tl.int64)[:, None] * num_groups + (k // GROUP)[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    num_groups,
    ring,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All M = BLOCK_M rows times BLOCK_N = 32 rows of the weight, in fp32; no tensor cores.

    A lane owns some columns, and lanes meet at the end only.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_K, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(row_ptrs + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
        if CHUNKED:
            chunk = tl.program_id(0) + tl.arange(0, 1)
            level = chunk_levels(
                weight_ptr,
                chunk,
                k,
                N // 32,
                K,
                ring // 32,
                BITS,
                STATE_BITS,
                DOT,
                1,
                BLOCK_K,
            )
        else:
            level = _row_levels(weight_ptr, n, k, N, K, ring, BITS, STATE_BITS, DOT).T[None, :, :]
        if GROUP > 0:
            level *= _scales(scale_ptr, n, k, N, K, num_groups, GROUP).T[None, :, :]
        # [BLOCK_M, BLOCK_K, 1] * [1, BLOCK_K, BLOCK_N]
        acc += x[:, :, None] * level
    y = tl.sum(acc, axis=1) * STEP
    if GROUP == 0:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    num_groups,
    ring,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y^T = W x^T; weights are rounded to x's dtype after scaling, as dense ones are."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if GROUP == 0:
        row_scale = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None] * STEP
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(row_ptrs + k[None, :], mask=inside, other=0.0)
        if CHUNKED:
            C: tl.constexpr = BLOCK_N // 32
            chunk = tl.program_id(0) * C + tl.arange(0, C)
            level = chunk_levels(
                weight_ptr,
                chunk,
                k,
                N // 32,
                K,
                ring // 32,
                BITS,
                STATE_BITS,
                DOT,
                C,
                BLOCK_K,
            )
            level = tl.reshape(tl.permute(level, (0, 2, 1)), (BLOCK_N, BLOCK_K))
        else:
            level = _row_levels(weight_ptr, n, k, N, K, ring, BITS, STATE_BITS, DOT)
        if GROUP > 0:
            level *= _scales(scale_ptr, n, k, N, K, num_groups, GROUP) * STEP
        else:
            level *= row_scale
        # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        acc = tl.dot(level.to(x.dtype), x.T, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptrs, acc.T.to(y_ptr.dtype.element_ty), mask=mask)
