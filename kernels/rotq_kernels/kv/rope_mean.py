# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The score that the mean of the keys gives at each position, without a stored byte.

With x a scaled query after RoPE, mu the mean before RoPE and R_t RoPE at position t,

    x.R_t mu = constant + sum_i cos(t theta_i) cosine_i + sin(t theta_i) sine_i
    cosine_i = x_i mu_i + x_i+R mu_i+R,    sine_i = x_i+R mu_i - x_i mu_i+R

and for token i of a tile at t0 the angle is that of t0 plus that of i: the coefficients are turned
by t0 once per tile, and meet a table of cos and sin over i that is the same for all tiles.

Shape suffixes: B sequences, H KV heads, N query rows of a KV head, D head width, R rotary pairs,
S tokens of a tile; in kernels as in ``kv_tile``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotq_kernels.kv.encode.tile import cos_sin
from rotq_kernels.kv.format import KVConstants


def mean_query(
    x_BHND: Tensor, constants: KVConstants
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Coefficients of the score that the keys' mean gives at each position.

    Args:
        x_BHND: Scaled queries by KV head, fp32.
        constants: Constants of the layer.

    Returns:
        Coefficients of cos and sin (B, H, N, R), None unless the mean turns, and the part that is
        the same everywhere (B, H, N), None without a mean.
    """
    if constants.mean == "none":
        return None, None, None
    if constants.mean == "static":
        return None, None, (x_BHND * constants.key.mean_HD[:, None]).sum(-1)
    assert constants.inv_freq_R is not None
    R, D = constants.inv_freq_R.shape[0], x_BHND.shape[-1]
    x1, x2, rest = x_BHND.split([R, R, D - 2 * R], dim=-1)
    mean1, mean2, mean_rest = constants.key.mean_HD[:, None].split([R, R, D - 2 * R], dim=-1)
    cosine_BHNR = (x1 * mean1 + x2 * mean2) * constants.rotary_scale
    sine_BHNR = (x2 * mean1 - x1 * mean2) * constants.rotary_scale
    return cosine_BHNR, sine_BHNR, (rest * mean_rest).sum(-1)


def angle_table(inv_freq_R: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """cos and sin of 0, 1, ... times each frequency: ``dtype`` (2, S, R), from fp64 angles."""
    step_S = torch.arange(tokens, dtype=torch.float64, device=inv_freq_R.device)
    angle_SR = step_S[:, None] * inv_freq_R.double()
    return torch.stack((angle_SR.cos(), angle_SR.sin())).to(dtype)


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
    """Coefficients of query rows (R, J N) at a position, a token later for each j, and the cos and
    sin (R, 1) of a step by a tile; R padded to a power of two.

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
    cosine, sine = turn(cosine, sine, tl.trans(cos), tl.trans(sin))
    cos, sin = cos_sin(tl.full([1], TILE, tl.int32), frequency)
    return cosine, sine, tl.trans(cos), tl.trans(sin)


@triton.jit
def load_angles(angle_ptr, token, R: tl.constexpr, TILE: tl.constexpr):
    """cos and sin (tokens, R) of ``angle_table`` (2, TILE, R), R padded to a power of two."""
    PAIRS: tl.constexpr = 16 if R <= 16 else triton.next_power_of_2(R)
    r = tl.arange(0, PAIRS)
    spot = token[:, None] * R + r[None, :]
    there = (r < R)[None, :]
    cos = tl.load(angle_ptr + spot, mask=there, other=0.0)
    return cos, tl.load(angle_ptr + TILE * R + spot, mask=there, other=0.0)
