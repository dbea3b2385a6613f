# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Tiles of the decode kernel: packed codes and query rows as operands of the tensor cores.

Operands are swapped, tokens are rows and the few query rows are columns, so that dequantized keys
go from registers to the tensor cores. Levels of keys are integers, so the query becomes integers
too: fixed point of 15 bits relative to its largest element (22 for fp32 queries), in limbs of 7
bits, an int8 product each. That is finer than fp16, and the bytes of the look-up are the operand.

Four chunks of 32 codes, side by side in four lanes, make a line of 128. Where a head has fewer, a
line holds J = 4 or 2 tokens and the query is laid out block by block: its row (j, n) is zero where
the codes of other tokens are. In which order a line holds its codes is chosen so that what a lane
loaded is its part of the operand; the query is loaded and the sums are stored accordingly.

Letters: I or LINES lines of a tile, J tokens of a line, N query rows of a KV head, D head width.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.unpack import bytes_of, code_of, flip_tops, halves_of, join_quads


@triton.jit
def held_lines(LINES: tl.constexpr, WARPS: tl.constexpr):
    """Numbers of lines as lanes hold the operand's rows, of lines loaded in order."""
    # [I] -> [I / (16 WARPS), 2, WARPS, 8] -> [I / (16 WARPS), WARPS, 2, 8] -> [I]
    line = tl.arange(0, LINES).reshape(LINES // (16 * WARPS), 2, WARPS, 8)
    return line.permute(0, 2, 1, 3).reshape(LINES)


@triton.jit
def _signed(quad, BITS: tl.constexpr):
    """int8 bytes; of 8-bit codes q they are q - 128, of 5 to 7 bits q itself."""
    if BITS == 8:
        quad = flip_tops(quad)
    return bytes_of(quad)


@triton.jit
def key_operand(
    quads, LINES: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, PAIRS: tl.constexpr
):
    """int8 (I, 128) of eight (I, 4), byte e of quad k of chunk c at column 16 k + 4 c + e.

    With PAIRS, at 32 (k / 2) + 8 c + 4 (k % 2) + e; see ``sizes.lane_order``.
    """
    joined = join_quads(
        _signed(quads[0], BITS),
        _signed(quads[1], BITS),
        _signed(quads[2], BITS),
        _signed(quads[3], BITS),
        _signed(quads[4], BITS),
        _signed(quads[5], BITS),
        _signed(quads[6], BITS),
        _signed(quads[7], BITS),
    )
    # [I, chunk 4, byte 2, 2, quad 2, 2, 2], I split as in ``held_lines``; then the held order of
    # lines, [I, quad 2, 2, 2, chunk 4, byte 2, 2] -> [I, 128]
    joined = joined.reshape(LINES // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2, 2, 2)
    if PAIRS:
        # [I, quad 2, 2, chunk 4, quad 2, byte 2, 2] -> [I, 128]
        return joined.permute(0, 2, 1, 3, 7, 8, 4, 9, 5, 6).reshape(LINES, 128)
    else:
        return joined.permute(0, 2, 1, 3, 7, 8, 9, 4, 5, 6).reshape(LINES, 128)


@triton.jit
def value_operand(
    quads, LINES: tl.constexpr, J: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr
):
    """fp16 (I J, 128 / J), 2^-24 of bytes, of eight (I, 4); columns as in ``value_column``."""
    joined = join_quads(
        halves_of(quads[0], PTX),
        halves_of(quads[1], PTX),
        halves_of(quads[2], PTX),
        halves_of(quads[3], PTX),
        halves_of(quads[4], PTX),
        halves_of(quads[5], PTX),
        halves_of(quads[6], PTX),
        halves_of(quads[7], PTX),
    )
    # [I, J, chunk 4 / J, byte 2, 2, quad 2, 2, 2], I split as in ``held_lines``
    joined = joined.reshape(LINES // (16 * WARPS), 2, WARPS, 8, J, 4 // J, 2, 2, 2, 2, 2)
    if J == 1:
        # lanes that store together then meet different banks of shared memory:
        # [I, 1, quad 2, chunk 4, quad 2, 2, byte 2, 2] -> [I, 128]
        return joined.permute(0, 2, 1, 3, 4, 8, 5, 9, 10, 6, 7).reshape(LINES, 128)
    else:
        # [I, J, chunk 4 / J, quad 2, 2, 2, byte 2, 2] -> [I J, 128 / J]
        return joined.permute(0, 2, 1, 3, 4, 5, 8, 9, 10, 6, 7).reshape(LINES * J, 128 // J)


@triton.jit
def value_column(p, J: tl.constexpr, BITS: tl.constexpr):
    """The element of a head that is column p of its value operands, laid side by side."""
    if J == 1:
        chunk = p // 128 * 4 + p // 16 % 4
        k = p // 64 % 2 * 4 + p // 4 % 4
    else:
        chunk = p // 32
        k = p // 4 % 8
    return 32 * chunk + code_of(k, p % 4, BITS)


@triton.jit
def _load_block(
    x_ptr,
    rows,
    D,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    J: tl.constexpr,
    N: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """fp32 (J N, 128): query rows as they meet key operand BLOCK; zeros beyond ``rows`` and D."""
    row, p = tl.arange(0, J * N), tl.arange(0, 128)
    n = row % N
    c, k = p // 4 % 4, p // 16
    if PAIRS:
        c, k = p // 8 % 4, p // 32 * 2 + p // 4 % 2
    d = (4 * BLOCK + c % (4 // J)) * 32 + code_of(k, p % 4, BITS)
    mine = (row // N)[:, None] == (c // (4 // J))[None, :]
    there = mine & (n < rows)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + n[:, None] * D + d[None, :], mask=there, other=0.0)


@triton.jit
def _fixed_point(x, unit):
    """int32 x / unit, rounded, for rows of x; below 2^22."""
    # adding and removing 1.5 * 2^23 rounds
    return ((x / unit[:, None] + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def _limbs_of(number, LIMBS: tl.constexpr):
    """int8 columns, 2 or 3 for each row of ``number``; the first is worth most."""
    upper = (number + 64) >> 7
    low = tl.trans((number - (upper << 7)).to(tl.int8))
    if LIMBS == 2:
        return tl.trans(upper.to(tl.int8)), low
    else:
        top = (upper + 64) >> 7
        return tl.trans(top.to(tl.int8)), tl.trans((upper - (top << 7)).to(tl.int8)), low


@triton.jit
def query_operand(
    x_ptr,
    rows,
    D: tl.constexpr,
    BITS: tl.constexpr,
    J: tl.constexpr,
    N: tl.constexpr,
    LIMBS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A query as integers.

    Args:
        x_ptr: fp32 (rows, D).
        rows: Of the query, at most N.
        D: At most 256.
        BITS: Of the codes that it will meet.
        J: Tokens of a line of codes.
        N: Power of two.
        LIMBS: 2 or 3.
        PAIRS: As of ``key_operand``.

    Returns:
        What 1 is worth and the sum of the integers, fp32 (J N); limbs, int8 (128, J N) each, of
        the first 128 elements and of the others, which repeat the first where there are none.
    """
    x = _load_block(x_ptr, rows, D, 0, BITS, J, N, PAIRS)
    top = tl.max(tl.abs(x), axis=1)
    if D > 128:
        more = _load_block(x_ptr, rows, D, 1, BITS, J, N, PAIRS)
        top = tl.maximum(top, tl.max(tl.abs(more), axis=1))
    unit = tl.maximum(top, 1e-30) / (127 * 128 ** (LIMBS - 1))
    number = _fixed_point(x, unit)
    total = tl.sum(number, axis=1)
    limbs = _limbs_of(number, LIMBS)
    if D > 128:
        number = _fixed_point(more, unit)
        total += tl.sum(number, axis=1)
        others = _limbs_of(number, LIMBS)
    else:
        others = limbs
    return unit, total.to(tl.float32), limbs, others


@triton.jit
def multiply(keys, limbs, sums, LIMBS: tl.constexpr):
    """Add the products of ``keys`` (I, 128) with each limb to ``sums``, int32 (I, J N)."""
    # [I, 128] @ [128, J N] -> [I, J N], for each limb
    first = tl.dot(keys, limbs[0], sums[0], out_dtype=tl.int32)
    second = tl.dot(keys, limbs[1], sums[1], out_dtype=tl.int32)
    if LIMBS == 2:
        return first, second
    else:
        return first, second, tl.dot(keys, limbs[2], sums[2], out_dtype=tl.int32)


@triton.jit
def no_sums(LINES: tl.constexpr, COLUMNS: tl.constexpr, LIMBS: tl.constexpr):
    """What ``multiply`` starts from."""
    zero = tl.zeros([LINES, COLUMNS], tl.int32)
    if LIMBS == 2:
        return zero, zero
    else:
        return zero, zero, zero


@triton.jit
def sum_of(sums, LIMBS: tl.constexpr):
    """fp32 sum of products, in units of the fixed point."""
    total = (sums[0] * 128 + sums[1]).to(tl.float32)
    if LIMBS == 3:
        total = total * 128.0 + sums[2].to(tl.float32)
    return total


@triton.jit
def over_columns(x, N: tl.constexpr):
    """(I, J) to (I, J N): each token's number under its columns."""
    LINES: tl.constexpr = x.shape[0]
    J: tl.constexpr = x.shape[1]
    # [I, J, N] -> [I, J N]
    return tl.broadcast_to(x[:, :, None], (LINES, J, N)).reshape(LINES, J * N)


@triton.jit
def per_column(x, J: tl.constexpr, N: tl.constexpr):
    """(N) to (J N)."""
    # [J, N] -> [J N]
    return tl.broadcast_to(x[None, :], (J, N)).reshape(J * N)
