# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Tiles of the prefill kernels: packed tokens and query rows as plain operands.

With many query rows a tile's unpacking is paid once for N x TILE products, so tiles become fp16, or
for fp32 queries fp32, in which levels are exact. Norms of keys multiply scores; those of values go
into the operand, whose rounding is then that of fp16 values. Columns are in the order in which
codes come out, and queries are loaded in that order too.

Letters: N query rows of a program, TILE tokens of a tile, D head width, R rotary pairs.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.paging import load_norms
from rotq_kernels.kv.rope_mean_tile import load_angles
from rotq_kernels.kv.unpack import (
    code_of,
    from_lowest,
    join_quads,
    load_words,
    permute,
    quads_of,
)

_MIDDLE = tl.constexpr(8.0)
"""Octaves from the smallest ``log8`` norm to the one that becomes 1 in fp16."""


@triton.jit
def element_of(p, BITS: tl.constexpr):
    """The element of a head that is column p of ``load_levels``."""
    return p // 32 * 32 + code_of(p // 4 % 8, p % 4, BITS)


@triton.jit
def _halves(quad, PTX: tl.constexpr):
    """fp16 (..., 2, 2): 1024 and byte 2 i + j, not signed, at (i, j); the byte is its low one."""
    thousand = tl.full(quad.shape, 0x64646464, tl.int32)
    low = permute(quad, thousand, tl.full(quad.shape, 0x4140, tl.int32), PTX)
    high = permute(quad, thousand, tl.full(quad.shape, 0x4342, tl.int32), PTX)
    even = tl.join(low.to(tl.int16), high.to(tl.int16))
    odd = tl.join((low >> 16).to(tl.int16), (high >> 16).to(tl.int16))
    return tl.join(even, odd).to(tl.float16, bitcast=True)


@triton.jit
def load_levels(
    codes_ptr,
    row,
    table,
    D: tl.constexpr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Levels of tokens at ``row``, fp32 if EXACT, else fp16, (TILE, chunks * 32).

    Chunks are padded to a power of two; columns beyond D are finite.
    """
    CHUNKS: tl.constexpr = (D + 31) // 32
    PADDED: tl.constexpr = triton.next_power_of_2(CHUNKS)
    chunk = tl.arange(0, PADDED)
    words_ptr = (codes_ptr + row * (CHUNKS * BITS))[:, None] + (chunk * BITS)[None, :]
    if PADDED > CHUNKS:
        there = tl.broadcast_to((chunk < CHUNKS)[None, :], words_ptr.shape)
        words = load_words(words_ptr, there, BITS)
    else:
        words = load_words(words_ptr, None, BITS)
    differences, lowest = from_lowest(table, BITS)
    quads = quads_of(words, differences, BITS, PTX)
    joined = join_quads(
        _halves(quads[0], PTX),
        _halves(quads[1], PTX),
        _halves(quads[2], PTX),
        _halves(quads[3], PTX),
        _halves(quads[4], PTX),
        _halves(quads[5], PTX),
        _halves(quads[6], PTX),
        _halves(quads[7], PTX),
    )
    # [TILE, PADDED, byte 2, 2, quad 2, 2, 2] -> [TILE, PADDED, quad 2, 2, 2, byte 2, 2]
    # -> [TILE, 32 PADDED], columns 32 chunk + 4 quad + byte
    levels = joined.permute(0, 1, 4, 5, 6, 2, 3).reshape(row.shape[0], 32 * PADDED)
    # in two steps, as fp16 has no halves above 1024
    levels = (levels - 1024.0) + (tl.zeros([1, 1], tl.float32) + lowest).to(tl.float16)
    return levels.to(tl.float32) if EXACT else levels


@triton.jit
def load_query(x_ptr, n, rows, D: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr):
    """Query rows (N, WIDTH) in the order of ``load_levels``, and what 1 is worth.

    fp32 if EXACT, else fp16 relative to the largest of the row. Zeros beyond ``rows`` and D.
    """
    WIDTH: tl.constexpr = 32 * triton.next_power_of_2((D + 31) // 32)
    d = element_of(tl.arange(0, WIDTH), BITS)
    there = (n < rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=there, other=0.0)
    if EXACT:
        return x, tl.zeros_like(n).to(tl.float32) + 1.0
    else:
        unit = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
        return (x / unit[:, None]).to(tl.float16), unit


@triton.jit
def load_value_norms(norm_ptr, page, gap, row, EXACT: tl.constexpr):
    """Norms of values as an operand may hold them, in units of ``value_worth``."""
    everywhere = tl.full(row.shape, 1, tl.int1)
    if norm_ptr is None:
        norm = tl.full(row.shape, 1.0, tl.float32)
    elif norm_ptr.dtype.element_ty == tl.uint8:
        norm = load_norms(norm_ptr, page, gap, row, everywhere, -_MIDDLE, 1.0)
    else:
        norm = load_norms(norm_ptr, page, gap, row, everywhere, 0.0, 1.0)
    return norm if EXACT else norm.to(tl.float16)


@triton.jit
def value_worth(norm_ptr, base):
    """What sums of values are multiplied by in the end."""
    if norm_ptr is None:
        return tl.exp2(base)
    elif norm_ptr.dtype.element_ty == tl.uint8:
        return tl.exp2(base + _MIDDLE)
    else:
        return 1.0


@triton.jit
def load_query_pairs(q_ptr, n, rows, D: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """Rotary pairs of query rows (N, 2 R), pair by pair, and what 1 is worth; R is padded.

    As they are if EXACT; else fp16 relative to a power of two, which rounds no fp16 or bf16.
    """
    PAIRS: tl.constexpr = 16 if R <= 16 else triton.next_power_of_2(R)
    p = tl.arange(0, 2 * PAIRS)
    there = (n < rows)[:, None] & (p // 2 < R)[None, :]
    q = tl.load(q_ptr + n[:, None] * D + (p // 2 + p % 2 * R)[None, :], mask=there, other=0.0)
    q = q.to(tl.float32)
    if EXACT:
        return q, tl.zeros_like(n).to(tl.float32) + 1.0
    else:
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), axis=1), 1e-30))))
        return (q / unit[:, None]).to(tl.float16), unit


@triton.jit
def turned_mean(mean_ptr, origin_ptr, angle_ptr, i, R: tl.constexpr, TILE: tl.constexpr):
    """The mean at a tile's tokens, fp32 (TILE, 2 R), pair by pair; R is padded.

    Args:
        mean_ptr: fp32 (D,), of a head, before RoPE.
        origin_ptr: fp32 (2, R), cos and sin of the angles of the tile's first token.
        angle_ptr: (2, TILE, R), cos and sin of the angles from there on.
        i: 0 to TILE - 1.
        R: Rotary pairs.
        TILE: Tokens of a tile.
    """
    PAIRS: tl.constexpr = 16 if R <= 16 else triton.next_power_of_2(R)
    r = tl.arange(0, PAIRS)
    first = tl.load(mean_ptr + r, mask=r < R, other=0.0)
    second = tl.load(mean_ptr + R + r, mask=r < R, other=0.0)
    cos = tl.load(origin_ptr + r, mask=r < R, other=0.0)
    sin = tl.load(origin_ptr + R + r, mask=r < R, other=0.0)
    first, second = (first * cos - second * sin)[None, :], (second * cos + first * sin)[None, :]
    cos, sin = load_angles(angle_ptr, i, R, TILE)
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    # [TILE, PAIRS, 2] -> [TILE, 2 PAIRS]
    return turned.reshape(TILE, 2 * PAIRS)
