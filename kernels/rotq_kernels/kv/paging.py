# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What kernels read of packed pages: which tokens, where they are, their words and norms.

A token's place among all pages' (P, H, S) rows is its row; each stored tensor has a line of words
or a norm there, and where pages are parts of a larger store's blocks, a gap between them. Letters
as in ``decode.tile``; also P pages, H KV heads, S tokens of a page.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.unpack import load_words


@triton.jit
def load_hidden(hidden_ptr, b):
    """Packed tokens at the start of sequence b that nobody sees; 0 without a pointer."""
    if hidden_ptr is None:
        return 0
    else:
        return tl.load(hidden_ptr + b)


@triton.jit
def seen_tokens(
    position_ptr, rows, T, start, hidden, length, WINDOW: tl.constexpr, N: tl.constexpr
):
    """First and end of the packed tokens that each query row sees; the end is 0 if none.

    Args:
        position_ptr: int32 (T,), positions of the query's tokens.
        rows: Of the query, at most N; row n is token n % T of a head.
        T: Query tokens.
        start: Position of packed token 0.
        hidden: Packed tokens at the start that nobody sees.
        length: Packed tokens.
        WINDOW: Of sliding attention, 0 for none.
        N: Power of two.
    """
    n = tl.arange(0, N)
    position = tl.load(position_ptr + n % T, mask=n < rows, other=-1)
    first = tl.zeros_like(position) + hidden
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1 - start, hidden)
    end = tl.minimum(length, position - start + 1)
    return first, tl.where((position >= 0) & (end > first), end, 0)


@triton.jit
def load_page(table_ptr, t0, offset, length, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Pages of tokens t0 + offset; page 0, where t0, or the token, is beyond the length.

    Args:
        table_ptr: int32, the sequence's pages.
        t0: First token of a tile, or any of its tokens if a page holds a whole tile.
        offset: In [0, TILE).
        length: Packed tokens.
        PAGE: Tokens of a page, a power of two.
        TILE: Tokens of a tile, a power of two.
    """
    if PAGE >= TILE:
        return tl.load(table_ptr + t0 // PAGE, mask=t0 < length, other=0)
    elif 2 * PAGE == TILE:
        page = tl.load(table_ptr + t0 // PAGE, mask=t0 < length, other=0)
        other = tl.load(table_ptr + t0 // PAGE + 1, mask=t0 + PAGE < length, other=0)
        return tl.where(offset < PAGE, page, other)
    else:
        token = t0 + offset
        return tl.load(table_ptr + token // PAGE, mask=token < length, other=0)


@triton.jit
def rows_of(page, t0, offset, head, H, PAGE: tl.constexpr, TILE: tl.constexpr):
    """int64 rows of tokens t0 + offset on pages that ``load_page`` gave."""
    first = (page.to(tl.int64) * H + head) * PAGE
    if PAGE >= TILE:
        return (first + t0 % PAGE) + offset
    else:
        return first + (t0 + offset) % PAGE


@triton.jit
def past_gaps(stored_ptr, page, gap):
    """The pointer that rows of a page are counted from: as many gaps further as its number."""
    if gap is None:
        return stored_ptr
    else:
        return stored_ptr + page.to(tl.int64) * gap


@triton.jit
def turned_words(words, BITS: tl.constexpr):
    """(4, I) to (I, 4), each."""
    turned = (tl.trans(words[0]),)
    for i in tl.static_range(1, BITS):
        # Triton has no unpacking into a tuple
        turned = turned + (tl.trans(words[i]),)  # type: ignore[assignment]  # noqa: RUF005
    return turned


@triton.jit
def chunk_words(
    codes_ptr,
    row,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    J: tl.constexpr,
    BITS: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Packed words of lines, a tuple of BITS tensors (I, 4).

    Args:
        codes_ptr: int32 (P, H, S, CHUNKS * BITS), of ``past_gaps``.
        row: (I, 4), of the token whose chunk it is.
        BLOCK: Which four chunks of a token; 0 where lines hold several tokens.
        CHUNKS: Of a token.
        J: Tokens of a line.
        BITS: Of a code.
        TURNED: Whether the compiler gives neighbouring lanes what is along the first axis; see
            ``decode.sizes.lane_order``.
    """
    chunk = 4 * BLOCK + tl.arange(0, 4) % (4 // J)
    words_ptr = codes_ptr + row * (CHUNKS * BITS) + (chunk * BITS)[None, :]
    there = tl.broadcast_to((chunk < CHUNKS)[None, :], row.shape)
    if TURNED:
        words_ptr, there = tl.trans(words_ptr), tl.trans(there)
    # a lane shall load one chunk, also where it could load four neighbours at once
    words_ptr = tl.max_contiguous(words_ptr, [1, 1])
    if J == 1 and CHUNKS % 4 != 0:
        words = load_words(words_ptr, there, BITS)
    else:
        words = load_words(words_ptr, None, BITS)
    return turned_words(words, BITS) if TURNED else words


@triton.jit
def load_norms(norm_ptr, page, gap, row, there, base, factor):
    """fp32 norms: 2^(base + code / 16), fp16 times ``factor``, or 2^base where none are stored."""
    if norm_ptr is None:
        return tl.exp2(tl.zeros(row.shape, tl.float32) + base)
    else:
        stored = tl.load(past_gaps(norm_ptr, page, gap) + row, mask=there, other=0).to(tl.float32)
        if norm_ptr.dtype.element_ty == tl.uint8:
            return tl.exp2(stored * 0.0625 + base)
        else:
            return stored * factor


@triton.jit
def value_range(norm_ptr, base):
    """What brings values' norms into the range of fp16, whatever their base.

    Returns:
        ``base`` and ``factor`` for ``load_norms``, and what the sums are multiplied by in the end.
    """
    if norm_ptr is None:
        return 0.0, 1.0, tl.exp2(base)
    elif norm_ptr.dtype.element_ty == tl.uint8:
        return -1.0, 1.0, tl.exp2(base + 1.0)
    else:
        return 0.0, 64.0, 1.0 / 64.0
