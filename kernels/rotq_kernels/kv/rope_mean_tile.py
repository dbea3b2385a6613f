# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The mean's score on a tile of tokens, for kernels: ``rope_mean`` has the maths.

Letters as in ``decode.tile``; also R rotary pairs, TILE tokens of a tile.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.encode.tile import cos_sin


@triton.jit
def turn(cosine, sine, cos, sin):
    """Coefficients of cos and sin after moving the origin by an angle."""
    return cosine * cos + sine * sin, sine * cos - cosine * sin


@triton.jit
def load_coefficients(
    cosine_ptr,
    sine_ptr,
    frequency_ptr,
    position,
    rows,
    R: tl.constexpr,
    J: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Coefficients of query rows (R, J N) at a position, a token later for each j, what 1 is worth
    in them (J N), and the cos and sin (R, 1) of a step by a tile; R padded to a power of two.

    Turned by whatever angle, coefficients stay within fp16: they are relative to a power of two
    that is not below the largest of the row, and not below 2^-9, finer than which no score is.

    Args:
        cosine_ptr: fp32 (rows, R).
        sine_ptr: fp32 (rows, R).
        frequency_ptr: fp32 (R,).
        position: Of the first token.
        rows: Of the query, at most N.
        R: Rotary pairs.
        J: Tokens of a line of codes.
        N: Power of two.
        TILE: Tokens of a tile.
    """
    PAIRS: tl.constexpr = 16 if R <= 16 else triton.next_power_of_2(R)
    r, column = tl.arange(0, PAIRS), tl.arange(0, J * N)
    n = column % N
    spot = n[None, :] * R + r[:, None]
    there = (r < R)[:, None] & (n < rows)[None, :]
    cosine = tl.load(cosine_ptr + spot, mask=there, other=0.0)
    sine = tl.load(sine_ptr + spot, mask=there, other=0.0)
    frequency = tl.load(frequency_ptr + r, mask=r < R, other=0.0)
    cos, sin = cos_sin(position + column // N, frequency)
    # the same for all j, as they have not been turned yet
    largest = tl.max(tl.maximum(tl.abs(cosine), tl.abs(sine)), axis=0)
    worth = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 2.0**-9))))
    cosine, sine = cosine / worth[None, :], sine / worth[None, :]
    cosine, sine = turn(cosine, sine, tl.trans(cos), tl.trans(sin))
    cos, sin = cos_sin(tl.full([1], TILE, tl.int32), frequency)
    return cosine, sine, worth, tl.trans(cos), tl.trans(sin)


@triton.jit
def load_angles(angle_ptr, token, R: tl.constexpr, TILE: tl.constexpr):
    """cos and sin (tokens, R) of ``angle_table`` (2, TILE, R), R padded to a power of two."""
    PAIRS: tl.constexpr = 16 if R <= 16 else triton.next_power_of_2(R)
    r = tl.arange(0, PAIRS)
    spot = token[:, None] * R + r[None, :]
    there = (r < R)[None, :]
    cos = tl.load(angle_ptr + spot, mask=there, other=0.0)
    return cos, tl.load(angle_ptr + TILE * R + spot, mask=there, other=0.0)
