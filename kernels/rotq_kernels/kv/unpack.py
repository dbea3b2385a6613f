# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-redef,assignment"
"""Packed codes to bytes and fp16 inside Triton kernels; the layout is ``layout.pack_kv``'s.

The work goes by quads, int32 words of four bytes: a chunk of 32 codes is eight quads. Up to 4 bits
a byte is an entry of a table of int8, looked up four at a time by PTX's ``prmt``, whose selector of
four nibbles is what half a word of packed codes already is (3 bits), or nearly is. Above, a byte is
the code itself. ``prmt`` and its portable double are the only difference between the paths.

Byte e of quad k is not always code 4 k + e: bits are moved as little as possible, and ``code_of``
names the code. Order costs nothing, as the reader permutes the query and the output instead.

For the second product a byte becomes fp16 without arithmetic: as the low byte of a subnormal
number it is worth 2^-24 times itself, which tensor cores take like any other (those of MI200 do
not). It is not signed then, so levels are stored from the lowest one up, and the reader adds the
lowest times the sum of the weights at the end.
"""

import triton
import triton.language as tl

_SIGN_TABLE = tl.constexpr(0x01FF)
"""Bytes -1 and +1."""


@triton.jit
def permute(a, b, selector, PTX: tl.constexpr):
    """Four of the eight bytes of a (0 to 3) and b (4 to 7).

    Args:
        a: int32.
        b: int32.
        selector: int32; nibble i < 4, at most 7, names the byte that goes to i. Higher nibbles are
            ignored.
        PTX: Use the instruction.
    """
    if PTX:
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, selector],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        both = (b.to(tl.int64) << 32) | (a.to(tl.int64) & 0xFFFFFFFF)
        chosen = ((both >> ((selector & 7) * 8).to(tl.int64)) & 255).to(tl.int32)
        for i in tl.static_range(1, 4):
            byte = (both >> (((selector >> 4 * i) & 7) * 8).to(tl.int64)) & 255
            chosen |= byte.to(tl.int32) << 8 * i
    return chosen


@triton.jit
def load_table(levels_ptr, head, BITS: tl.constexpr):
    """The int8 levels of a head as four int32, repeated where there are fewer.

    Args:
        levels_ptr: int32, (H, 2^BITS / 4). Not read for 1 bit, whose levels are -1 and +1, nor
            above 4 bits, where there is no table.
        head: Which.
        BITS: Bits of a code.
    """
    if BITS == 1 or BITS > 4:
        constant = head * 0 + _SIGN_TABLE
        return constant, constant, constant, constant
    else:
        WORDS: tl.constexpr = 2**BITS // 4
        row_ptr = levels_ptr + head * WORDS
        return (
            tl.load(row_ptr),
            tl.load(row_ptr + 1 % WORDS),
            tl.load(row_ptr + 2 % WORDS),
            tl.load(row_ptr + 3 % WORDS),
        )


@triton.jit
def _look_up(selector, table, BITS: tl.constexpr, PTX: tl.constexpr):
    """Levels of the codes in the lower four nibbles, which above 3 bits may be up to 15."""
    if BITS < 4:
        return permute(table[0], table[1], selector, PTX)
    else:
        index = selector & 0x7777
        low = permute(table[0], table[1], index, PTX)
        high = permute(table[2], table[3], index, PTX)
        # byte i is byte i of low, or of high where bit 3 of nibble i is set
        return permute(low, high, ((selector >> 1) & 0x4444) | 0x3210, PTX)


@triton.jit
def _look_up_words(s0, s1, s2, s3, table, BITS: tl.constexpr, PTX: tl.constexpr):
    """Eight quads of four words of nibbles."""
    return (
        _look_up(s0, table, BITS, PTX),
        _look_up(s0 >> 16, table, BITS, PTX),
        _look_up(s1, table, BITS, PTX),
        _look_up(s1 >> 16, table, BITS, PTX),
        _look_up(s2, table, BITS, PTX),
        _look_up(s2 >> 16, table, BITS, PTX),
        _look_up(s3, table, BITS, PTX),
        _look_up(s3 >> 16, table, BITS, PTX),
    )


@triton.jit
def _plane_bits(plane, shift: tl.constexpr, bit: tl.constexpr):
    """Bits shift, shift + 2, + 4, + 6 of a word, each as bit ``bit`` of its own byte."""
    # bit 2 m is wanted at 8 m; the product's other bits, carries included, miss the mask
    spread = ((plane >> shift) & 0x55) * (1 | 1 << 6 | 1 << 12 | 1 << 18)
    return (spread & 0x01010101) << bit


@triton.jit
def _wide_quad(words, k: tl.constexpr, BITS: tl.constexpr):
    """Quad k of 5- to 7-bit codes: every other nibble of a word, and bits of the planes."""
    quad = (words[k // 2] >> 4 * (k % 2)) & 0x0F0F0F0F
    for bit in tl.static_range(4, BITS):
        quad |= _plane_bits(words[bit], 8 * (k // 2) + k % 2, bit)
    return quad


@triton.jit
def load_words(words_ptr, mask, BITS: tl.constexpr):
    """The BITS words of chunks of 32 codes, a tuple of int32 tensors.

    Args:
        words_ptr: Tensor of pointers, each to the first word of a chunk.
        mask: Where to read, or None for everywhere; elsewhere words are arbitrary.
        BITS: 1 to 8.
    """
    words = (tl.load(words_ptr, mask=mask),)
    for i in tl.static_range(1, BITS):
        # Triton has no unpacking into a tuple
        words = words + (tl.load(words_ptr + i, mask=mask),)  # noqa: RUF005
    return words


@triton.jit
def quads_of(words, table, BITS: tl.constexpr, PTX: tl.constexpr):
    """Eight int32 tensors, the quads of a chunk each: levels up to 4 bits, codes above.

    Args:
        words: Of ``load_words``.
        table: Of ``load_table``.
        BITS: 1 to 8.
        PTX: Whether inline PTX can be used.
    """
    if BITS == 1:
        w = words[0]
        m: tl.constexpr = 0x11111111
        return _look_up_words(w & m, (w >> 1) & m, (w >> 2) & m, (w >> 3) & m, table, BITS, PTX)
    elif BITS == 2:
        w0, w1 = words
        m: tl.constexpr = 0x33333333
        return _look_up_words(w0 & m, (w0 >> 2) & m, w1 & m, (w1 >> 2) & m, table, BITS, PTX)
    elif BITS == 3:
        w0, w1, w2 = words
        m: tl.constexpr = 0x77777777
        w3 = ((w0 >> 3) & 0x11111111) | ((w1 >> 2) & 0x22222222) | ((w2 >> 1) & 0x44444444)
        return _look_up_words(w0 & m, w1 & m, w2 & m, w3, table, BITS, PTX)
    elif BITS == 4:
        return _look_up_words(words[0], words[1], words[2], words[3], table, BITS, PTX)
    elif BITS == 8:
        return words
    else:
        return (
            _wide_quad(words, 0, BITS),
            _wide_quad(words, 1, BITS),
            _wide_quad(words, 2, BITS),
            _wide_quad(words, 3, BITS),
            _wide_quad(words, 4, BITS),
            _wide_quad(words, 5, BITS),
            _wide_quad(words, 6, BITS),
            _wide_quad(words, 7, BITS),
        )


@triton.jit
def code_of(k, e, BITS: tl.constexpr):
    """Which of a chunk's 32 codes is byte e of quad k."""
    if BITS == 1:
        return 16 * (k % 2) + 4 * e + k // 2
    elif BITS == 2:
        return 16 * (k // 4) + 8 * (k % 2) + 2 * e + k // 2 % 2
    elif BITS > 4 and BITS < 8:
        return 8 * (k // 2) + 2 * e + k % 2
    else:
        return 4 * k + e


@triton.jit
def flip_tops(quad):
    """Bytes with their top bits flipped: between signed and 128 more, not signed."""
    return quad ^ -0x7F7F7F80


@triton.jit
def from_lowest(table, BITS: tl.constexpr):
    """A table of differences from the lowest level, not signed, and that level, fp32.

    Above 4 bits there is no table, codes are the differences and levels are symmetric.
    """
    if BITS > 4:
        return table, -(2.0**BITS - 1) / 2
    else:
        lowest = (table[0] << 24) >> 24
        each = ((lowest + 128).to(tl.int64) * 0x01010101).to(tl.int32)
        return (
            flip_tops(table[0]) - each,
            flip_tops(table[1]) - each,
            flip_tops(table[2]) - each,
            flip_tops(table[3]) - each,
        ), lowest.to(tl.float32)


@triton.jit
def bytes_of(quad):
    """int8 (..., 2, 2): byte 2 i + j at (i, j)."""
    even = tl.join(quad.to(tl.int8), (quad >> 16).to(tl.int8))
    odd = tl.join((quad >> 8).to(tl.int8), (quad >> 24).to(tl.int8))
    return tl.join(even, odd)


@triton.jit
def halves_of(quad, PTX: tl.constexpr):
    """fp16 (..., 2, 2): 2^-24 times byte 2 i + j, not signed, at (i, j)."""
    zero = tl.zeros(quad.shape, tl.int32)
    low = permute(quad, zero, tl.full(quad.shape, 0x4140, tl.int32), PTX)
    high = permute(quad, zero, tl.full(quad.shape, 0x4342, tl.int32), PTX)
    even = tl.join(_float16(low), _float16(high))
    odd = tl.join(_float16(low >> 16), _float16(high >> 16))
    return tl.join(even, odd)


@triton.jit
def _float16(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def join_quads(a, b, c, d, e, f, g, h):
    """Stack eight (..., 2, 2) tensors to (..., 2, 2, 2, 2, 2): element 2 i + j of number
    4 x + 2 y + z at (i, j, x, y, z)."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)
