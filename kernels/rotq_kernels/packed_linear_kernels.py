# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Triton kernels of ``packed_linear``.

32 codes take ``bits`` words, whatever the width, so a tile is read as chunks of ``bits`` words. A
chunk is cut into pieces of a few codes by constant shifts (a funnel shift where a piece straddles
words); a piece's codes stay where they are in it: with the rest masked away and the bits of 2^23
put on top, the word is the float 2^23 + q 2^s, s the place of the code. That is one instruction for
each code, without the conversion, which would run at a quarter of the rate. Subtracting
2^23 + (2^(bits-1) + z) 2^s takes the zero point along, and 2^-s is a factor of x (GEMV) or of the
scale (GEMM). All of that is exact.

Scales belong to runs: RUN is the largest power of two up to 32 that divides the group.

Shape suffixes: M rows of x, N out features, K in features, C chunks of a tile, R runs of a tile.
"""

import triton
import triton.language as tl

MAGIC = 0x4B000000
"""Bits of 2^23 in fp32, whose unit in the last place is 1. An argument of the kernels, so that it
stays in a register: an instruction takes one constant, and that is the mask."""


@triton.jit
def _piece(words, INDEX: tl.constexpr, WIDTH: tl.constexpr):
    """Bits [INDEX * WIDTH, (INDEX + 1) * WIDTH) of a chunk; what lies above them is undefined."""
    FIRST: tl.constexpr = INDEX * WIDTH // 32
    SHIFT: tl.constexpr = INDEX * WIDTH % 32
    if SHIFT + WIDTH <= 32:
        return words[FIRST] >> SHIFT
    else:
        return (words[FIRST] >> SHIFT) | (words[FIRST + 1] << (32 - SHIFT))


@triton.jit
def _four_pieces(words, FIRST: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Pieces FIRST, FIRST + STEP, ... along two new axes, in order."""
    return tl.join(
        tl.join(_piece(words, FIRST, WIDTH), _piece(words, FIRST + 2 * STEP, WIDTH)),
        tl.join(_piece(words, FIRST + STEP, WIDTH), _piece(words, FIRST + 3 * STEP, WIDTH)),
    )


@triton.jit
def _place(k, BITS: tl.constexpr):
    """Bits below code k in the word that ``_floats_of_codes`` makes of it."""
    CODES: tl.constexpr = 8 if BITS == 2 else (4 if BITS <= 5 else 2)
    return (k % CODES) * BITS


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _floats_of_codes(
    words, magic, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """2^23 + stored code * 2^place, fp32 (BLOCK_N, BLOCK_K); words are BITS tiles (BLOCK_N, C)."""
    CODES: tl.constexpr = 8 if BITS == 2 else (4 if BITS <= 5 else 2)
    if BITS == 2:
        pieces = _four_pieces(words, 0, 1, 16)
    else:
        pieces = tl.join(_four_pieces(words, 0, 2, 4 * BITS), _four_pieces(words, 1, 2, 4 * BITS))
    if BITS > 5:
        # four codes would not fit the 23 bits below the exponent
        pieces = tl.reshape(pieces, (BLOCK_N, BLOCK_K // 4, 1))
        pieces = pieces >> (tl.arange(0, 2) * (2 * BITS)).to(tl.uint32)[None, None, :]
    pieces = tl.reshape(pieces, (BLOCK_N, BLOCK_K // CODES, 1))
    mask = (2**BITS - 1) << (tl.arange(0, CODES) * BITS)
    bits = (pieces & mask.to(tl.uint32)[None, None, :]) | magic.to(tl.uint32)
    return tl.reshape(bits, (BLOCK_N, BLOCK_K)).to(tl.float32, bitcast=True)


@triton.jit
def _zero_points(zero_ptr, n, group, num_groups, mask, BITS: tl.constexpr):
    """z + 2^(bits-1), fp32, of rows n and groups, both broadcast; packed along n."""
    bit = n * BITS
    shift = (bit % 32).to(tl.uint32)
    ptrs = zero_ptr + (bit // 32) * num_groups + group
    low = tl.load(ptrs, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    straddles = shift + BITS > 32
    high = tl.load(ptrs + num_groups, mask=mask & straddles, other=0)
    high = high.to(tl.uint32, bitcast=True) << ((32 - shift) & 31)
    stored = (low | tl.where(straddles, high, 0)) & (2**BITS - 1)
    return stored.to(tl.float32)


@triton.jit
def _load_weight(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    n,
    k0,
    N,
    K,
    stride_wn,
    num_groups,
    magic,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(q - z) * 2^place, fp32 (BLOCK_N, R, RUN), and scales, fp32 (BLOCK_N, R, 1).

    Beyond K scales are zeros and codes are finite. k0 is a multiple of 32.
    """
    in_rows = (n < N)[:, None]
    num_words = (K * BITS + 31) // 32
    word = (k0 // 32 + tl.arange(0, BLOCK_K // 32))[None, :] * BITS
    ptrs = weight_ptr + n.to(tl.int64)[:, None] * stride_wn + word
    words = ()
    for i in tl.static_range(BITS):
        loaded = tl.load(ptrs + i, mask=in_rows & (word + i < num_words), other=0)
        words = words + (loaded.to(tl.uint32, bitcast=True),)  # noqa: RUF005
    q = tl.reshape(
        _floats_of_codes(words, magic, BITS, BLOCK_N, BLOCK_K), (BLOCK_N, BLOCK_K // RUN, RUN)
    )
    k = k0 + tl.arange(0, BLOCK_K // RUN) * RUN
    group = (k // GROUP)[None, :]
    mask = in_rows & (k < K)[None, :]
    scale_ptrs = scale_ptr + n.to(tl.int64)[:, None] * num_groups + group
    scale = tl.load(scale_ptrs, mask=mask, other=0.0).to(tl.float32)
    unit = tl.reshape(_power_of_two(_place(tl.arange(0, BLOCK_K), BITS)), (1, BLOCK_K // RUN, RUN))
    if HAS_ZERO:
        zero = _zero_points(zero_ptr, n[:, None], group, num_groups, mask, BITS)
        q -= zero[:, :, None] * unit + 8388608.0
    else:
        q -= unit * 2 ** (BITS - 1) + 8388608.0
    return q, scale[:, :, None]


@triton.jit
def _load_rows(row_ptrs, k0, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 (BLOCK_M, BLOCK_K), zeros beyond K, read so that a lane gets whole chunks of 32."""
    chunk = (tl.arange(0, BLOCK_K // 32) * 32)[None, :, None]
    ks = k0 + chunk + tl.arange(0, 8)[None, None, :]
    x0 = tl.load(row_ptrs + ks, mask=ks < K, other=0.0)
    x1 = tl.load(row_ptrs + ks + 8, mask=ks + 8 < K, other=0.0)
    x2 = tl.load(row_ptrs + ks + 16, mask=ks + 16 < K, other=0.0)
    x3 = tl.load(row_ptrs + ks + 24, mask=ks + 24 < K, other=0.0)
    # [BLOCK_M, C, 8, 2, 2] -> [BLOCK_M, C, 2, 2, 8]
    x = tl.permute(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (0, 1, 3, 4, 2))
    return tl.reshape(x, (BLOCK_M, BLOCK_K)).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    num_groups,
    magic,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All M = BLOCK_M rows times BLOCK_N rows of the weight, in fp32; no tensor cores.

    For one warp: a lane owns a chunk of each row, and lanes meet at the end only.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row_ptrs = (x_ptr + m.to(tl.int64) * stride_xm)[:, None, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // RUN), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = _load_rows(row_ptrs, k0, K, BLOCK_M, BLOCK_K)
        x *= _power_of_two(-_place(tl.arange(0, BLOCK_K), BITS))[None, :]
        x = tl.reshape(x, (BLOCK_M, 1, BLOCK_K // RUN, RUN))
        q, scale = _load_weight(
            weight_ptr,
            scale_ptr,
            zero_ptr,
            n,
            k0,
            N,
            K,
            stride_wn,
            num_groups,
            magic,
            BITS,
            GROUP,
            RUN,
            HAS_ZERO,
            BLOCK_N,
            BLOCK_K,
        )
        # [BLOCK_M, 1, R, RUN] * [1, BLOCK_N, R, RUN] -> [BLOCK_M, BLOCK_N, R]
        products = tl.sum(x * q[None, :, :, :], axis=3)
        acc += products * tl.reshape(scale, (1, BLOCK_N, BLOCK_K // RUN))
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(n < N)[None, :])


@triton.jit(do_not_specialize=["M", "blocks"])
def gemm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    num_groups,
    magic,
    blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y^T = W x^T: weights are the left operand, so that 16 rows of x fill a tile.

    Of so many blocks of the weight's columns, a run; y has a part for each run, program_id(2).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # as blocks, so that the compiler sees what divides k0
    begin = tl.program_id(2) * blocks * BLOCK_K
    for k0 in range(begin, tl.minimum(begin + blocks * BLOCK_K, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(row_ptrs + k[None, :], mask=inside, other=0.0)
        q, scale = _load_weight(
            weight_ptr,
            scale_ptr,
            zero_ptr,
            n,
            k0,
            N,
            K,
            stride_wn,
            num_groups,
            magic,
            BITS,
            GROUP,
            RUN,
            HAS_ZERO,
            BLOCK_N,
            BLOCK_K,
        )
        unit = _power_of_two(-_place(tl.arange(0, BLOCK_K), BITS))
        q *= scale * tl.reshape(unit, (1, BLOCK_K // RUN, RUN))
        weight = tl.reshape(q, (BLOCK_N, BLOCK_K)).to(x.dtype)
        # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        acc = tl.dot(weight, x.T, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    m = m.to(tl.int64)
    y_ptrs = y_ptr + (tl.program_id(2) * M + m)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptrs, acc.T.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    dense_ptr,
    N,
    K,
    stride_wn,
    num_groups,
    magic,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the dense weight (N, K), as ``gemm_kernel`` multiplies with it."""
    n, k0 = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    q, scale = _load_weight(
        weight_ptr,
        scale_ptr,
        zero_ptr,
        n,
        k0,
        N,
        K,
        stride_wn,
        num_groups,
        magic,
        BITS,
        GROUP,
        RUN,
        HAS_ZERO,
        BLOCK_N,
        BLOCK_K,
    )
    unit = _power_of_two(-_place(tl.arange(0, BLOCK_K), BITS))
    q *= scale * tl.reshape(unit, (1, BLOCK_K // RUN, RUN))
    k = k0 + tl.arange(0, BLOCK_K)
    dense_ptrs = dense_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    weight = tl.reshape(q, (BLOCK_N, BLOCK_K)).to(dense_ptr.dtype.element_ty)
    tl.store(dense_ptrs, weight, mask=(n < N)[:, None] & (k < K)[None, :])
