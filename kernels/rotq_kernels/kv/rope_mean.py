"""The score that the mean of the keys gives at each position, without a stored byte.

With x a scaled query after RoPE, mu the mean before RoPE and R_t RoPE at position t,

    x.R_t mu = constant + sum_i cos(t theta_i) cosine_i + sin(t theta_i) sine_i
    cosine_i = x_i mu_i + x_i+R mu_i+R,    sine_i = x_i+R mu_i - x_i mu_i+R

and for token i of a tile at t0 the angle is that of t0 plus that of i: the coefficients are turned
by t0 once per tile, and meet a table of cos and sin over i that is the same for all tiles.

``rope_mean_tile`` does so in kernels.

Shape suffixes: B sequences, H KV heads, N query rows of a KV head, D head width, R rotary pairs,
S tokens of a tile.
"""

import torch
from torch import Tensor

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
