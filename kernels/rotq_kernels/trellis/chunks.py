# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""Levels of 32 rows at a time, for Triton kernels.

32 symbols take ``bits`` words whatever the width, so a chunk of 32 rows is that many words of each
column and the one after them: the next chunk's first, or the ring's. Every word is loaded once, and
every state is a shift by a constant (a funnel shift where it straddles words). Rows of a chunk stay
in one lane, side by side.

With DOT, a product of four bytes by ones is added to the bits of 2^23 by one instruction (dp4a of
NVIDIA's GPUs); the result is the float 2^23 + sum as it is.

Shape suffixes: C chunks, K columns, J = 32 rows of a chunk.
"""

import triton
import triton.language as tl

from rotq_kernels.trellis.code import CENTRE, MULTIPLIER

PAIRS: tl.constexpr = tl.constexpr(0x00FF00FF)
MULTIPLY: tl.constexpr = tl.constexpr(MULTIPLIER)
MAGIC: tl.constexpr = tl.constexpr(0x4B000000)
ZERO: tl.constexpr = tl.constexpr(8388608.0 + CENTRE)


@triton.jit
def levels_of_states(state, DOT: tl.constexpr):
    """128 times the levels, fp32, of uint32 states."""
    y = state * MULTIPLY
    if DOT:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;",
            "=r,r",
            [y],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        halves = (y & PAIRS) + ((y >> 8) & PAIRS)
        total = ((halves + (halves >> 16)) & 0xFFFF) | MAGIC
    return total.to(tl.float32, bitcast=True) - ZERO


@triton.jit
def _row(words, ROW: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr, DOT: tl.constexpr):
    FIRST: tl.constexpr = ROW * BITS // 32
    SHIFT: tl.constexpr = ROW * BITS % 32
    state = words[FIRST] >> SHIFT
    if SHIFT + STATE_BITS > 32:
        state |= words[FIRST + 1] << (32 - SHIFT)
    return levels_of_states(state & (2**STATE_BITS - 1), DOT)


@triton.jit
def _four(
    words,
    ROW: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Rows ROW, ROW + STEP, ... along two new axes, in order."""
    return tl.join(
        tl.join(
            _row(words, ROW, BITS, STATE_BITS, DOT),
            _row(words, ROW + 2 * STEP, BITS, STATE_BITS, DOT),
        ),
        tl.join(
            _row(words, ROW + STEP, BITS, STATE_BITS, DOT),
            _row(words, ROW + 3 * STEP, BITS, STATE_BITS, DOT),
        ),
    )


@triton.jit
def _sixteen(
    words,
    ROW: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
):
    return tl.join(
        tl.join(
            _four(words, ROW, 4 * STEP, BITS, STATE_BITS, DOT),
            _four(words, ROW + 2 * STEP, 4 * STEP, BITS, STATE_BITS, DOT),
        ),
        tl.join(
            _four(words, ROW + STEP, 4 * STEP, BITS, STATE_BITS, DOT),
            _four(words, ROW + 3 * STEP, 4 * STEP, BITS, STATE_BITS, DOT),
        ),
    )


@triton.jit
def chunk_levels(
    weight_ptr,
    chunk,
    k,
    num_chunks,
    K,
    ring_chunks,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DOT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """128 times the levels, fp32 (C, BLOCK_K, 32); finite beyond the weight."""
    inside = (chunk < num_chunks)[:, None] & (k < K)[None, :]
    ptrs = weight_ptr + (chunk * BITS).to(tl.int64)[:, None] * K + k[None, :]
    words = ()
    for i in tl.static_range(BITS):
        loaded = tl.load(ptrs + i * K, mask=inside, other=0)
        words = words + (loaded.to(tl.uint32, bitcast=True),)  # noqa: RUF005
    is_last = chunk % ring_chunks == ring_chunks - 1
    after = tl.where(is_last, chunk + 1 - ring_chunks, chunk + 1)
    ptrs = weight_ptr + (after * BITS).to(tl.int64)[:, None] * K + k[None, :]
    loaded = tl.load(ptrs, mask=inside, other=0)
    words = words + (loaded.to(tl.uint32, bitcast=True),)  # noqa: RUF005
    level = tl.join(
        _sixteen(words, 0, 2, BITS, STATE_BITS, DOT), _sixteen(words, 1, 2, BITS, STATE_BITS, DOT)
    )
    return tl.reshape(level, (C, BLOCK_K, 32))
