"""One side of the KV cache, keys or values, to codes and back: the definition, in plain PyTorch.

A token's row x, its mean already removed, becomes (symbols as in ``kv.format``)

    y = A x,  u = y / rms(y),  q = number of thresholds below u,  s by ``SideConstants.gain``

and comes back as A^-1 (s L[q] + residual). A row of zeros has u = 0 and the smallest norm there is,
one with a NaN or an infinity the largest, which is what tells those who stored it.
With ``norm="none"`` u is y itself and s is 2^base.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, L levels, R rotary pairs.
"""

from typing import Literal

import torch
from torch import Tensor

from rotq_kernels.kv.encode.native_search import search_codes_native, searches_rows_natively
from rotq_kernels.kv.encode.search import search_codes
from rotq_kernels.kv.format import (
    TABLE_BITS,
    KVConstants,
    SideConstants,
    decode_norm,
    encode_norm,
    level_values,
)

SMALLEST_RMS = 1e-30
"""Divides rows that are zero."""

NORM_DTYPES = {"log8": torch.uint8, "float16": torch.float16}


def turned_mean(
    mean_HD: Tensor,
    position_BT: Tensor,
    inv_freq_R: Tensor,
    rotary_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """RoPE at each position of a mean of keys before RoPE: ``dtype`` (B, H, T, D).

    Angles are products in fp64, so that they hold at position 10^6 as well as at 10.
    """
    angle_BTR = position_BT[..., None].double() * inv_freq_R.double()
    cos = (angle_BTR.cos() * rotary_scale).to(dtype)[:, None]
    sin = (angle_BTR.sin() * rotary_scale).to(dtype)[:, None]
    R = inv_freq_R.shape[0]
    first, second, rest = mean_HD.to(dtype)[:, None].split([R, R, mean_HD.shape[1] - 2 * R], dim=-1)
    rest = rest.expand(position_BT.shape[0], -1, position_BT.shape[1], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def key_mean(
    constants: KVConstants, position_BT: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What is removed from keys: (B, H, T, D), or broadcasting to it."""
    mean_HD = constants.key.mean_HD
    if constants.mean == "rope":
        inv_freq_R = constants.inv_freq_R
        assert inv_freq_R is not None
        return turned_mean(mean_HD, position_BT, inv_freq_R, constants.rotary_scale, dtype)
    if constants.mean == "none":
        mean_HD = torch.zeros_like(mean_HD)
    return mean_HD[None, :, None].to(dtype)


def quantize_side(
    x_BHTD: Tensor, side: SideConstants, bits: int, norm: Literal["log8", "float16", "none"]
) -> tuple[Tensor, Tensor | None]:
    """Codes and stored norms of rows whose mean has been removed; see ``search`` for ``search``.

    Args:
        x_BHTD: Any float dtype; computed in fp32.
        side: Its constants.
        bits: 2 to 8.
        norm: How norms are stored.

    Returns:
        uint8 (B, H, T, D) in [0, 2^bits - 1], and uint8 or fp16 (B, H, T), None for "none".
    """
    y_BHTD = rotate(x_BHTD, side)
    if norm == "none":
        return _count_below(y_BHTD, side.thresholds_HL), None
    rms_BHT = (y_BHTD.square().sum(-1) / y_BHTD.shape[-1]).sqrt()
    inverse_BHT = 1.0 / rms_BHT.clamp(min=SMALLEST_RMS)
    codes_BHTD = _count_below(y_BHTD * inverse_BHT[..., None], side.thresholds_HL)
    if side.search:
        codes_BHTD, scale_BHT = _searched(y_BHTD, codes_BHTD, side, bits)
    elif side.gain == "none":
        scale_BHT = side.unit_H[:, None] * rms_BHT
    else:
        level_BHTD = side_levels(codes_BHTD, side, bits)
        energy_BHT = level_BHTD.square().sum(-1)
        if side.gain == "lsq":
            scale_BHT = (y_BHTD * level_BHTD).sum(-1) / energy_BHT
        else:
            scale_BHT = (y_BHTD.square().sum(-1) / energy_BHT).sqrt()
    # a row that is not finite gets the norm that nothing else has, so that it is noticed
    scale_BHT = scale_BHT.clamp(min=0).where(rms_BHT.isfinite(), torch.inf)
    return codes_BHTD, encode_norm(scale_BHT, side.base_H[:, None], NORM_DTYPES[norm])


def _searched(
    y_BHTD: Tensor, codes_BHTD: Tensor, side: SideConstants, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes that are better together, and their scale; rows whose steps are tiny stay."""
    assert side.metric_HDD is not None
    if bits <= TABLE_BITS and searches_rows_natively(y_BHTD):
        return search_codes_native(
            y_BHTD,
            codes_BHTD,
            side.metric_HDD,
            side.unit_H,
            side.search,
            side.thresholds_HL,
            level_values(side.levels_HL, bits),
        )
    return search_codes(
        y_BHTD,
        codes_BHTD,
        side.metric_HDD,
        side.unit_H,
        side.search,
        code=lambda u_BHTD: _count_below(u_BHTD, side.thresholds_HL),
        levels=lambda q_BHTD: side_levels(q_BHTD, side, bits),
    )


def dequantize_side(
    codes_BHTD: Tensor,
    norm_BHT: Tensor | None,
    side: SideConstants,
    bits: int,
    *,
    residual_BHTD: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows without their mean, A^-1 (s L[q] + residual): ``dtype`` (B, H, T, D)."""
    scale = side_scale(norm_BHT, side.base_H, dtype)
    y_BHTD = scale * side_levels(codes_BHTD, side, bits).to(dtype)
    if residual_BHTD is not None:
        y_BHTD = y_BHTD + residual_BHTD
    return y_BHTD @ side.inverse_HDD.mT.to(dtype)


def quantize_residual(
    x_BHTD: Tensor, codes_BHTD: Tensor, norm_BHT: Tensor | None, constants: KVConstants
) -> tuple[Tensor, Tensor | None]:
    """The sign bits of keys whose mean has been removed, after ``quantize_side``.

    Returns:
        uint8 (B, H, T, D), 1 where the residual (sketched, for qjl) is not negative; and the
        stored rms of the residual for qjl, else None.
    """
    form, key = constants.format, constants.key
    left_BHTD = left_over(x_BHTD, codes_BHTD, norm_BHT, key, form.k_bits)
    if form.residual == "sign":
        return residual_bits(left_BHTD, None, None, None)
    return residual_bits(left_BHTD, constants.sketch_DD, constants.gamma_base_H, form.norm_dtype)


def left_over(
    x_BHTD: Tensor, codes_BHTD: Tensor, norm_BHT: Tensor | None, side: SideConstants, bits: int
) -> Tensor:
    """y - s L[q] in fp32, with the norm as it is stored."""
    kept_BHTD = side_scale(norm_BHT, side.base_H) * side_levels(codes_BHTD, side, bits)
    return rotate(x_BHTD, side) - kept_BHTD


def residual_bits(
    left_BHTD: Tensor,
    sketch_DD: Tensor | None,
    gamma_base_H: Tensor | None,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Bits of what is left over, sketched if there is a sketch; its rms if that is stored."""
    if sketch_DD is None:
        return (left_BHTD >= 0).to(torch.uint8), None
    sign_BHTD = (left_BHTD @ sketch_DD.mT >= 0).to(torch.uint8)
    if norm_dtype is None:
        return sign_BHTD, None
    assert gamma_base_H is not None
    rms_BHT = (left_BHTD.square().sum(-1) / left_BHTD.shape[-1]).sqrt()
    return sign_BHTD, encode_norm(rms_BHT, gamma_base_H[:, None], norm_dtype)


def dequantize_residual(
    sign_BHTD: Tensor,
    norm_BHT: Tensor | None,
    gamma_BHT: Tensor | None,
    constants: KVConstants,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the bits add to s L[q]: s delta sigma, or g c S^T sigma; ``dtype`` (B, H, T, D)."""
    sigma_BHTD = 2 * sign_BHTD.to(dtype) - 1
    assert constants.residual_scale_H is not None
    weight_H11 = constants.residual_scale_H[:, None, None].to(dtype)
    if constants.format.residual == "sign":
        return weight_H11 * side_scale(norm_BHT, constants.key.base_H, dtype) * sigma_BHTD
    assert constants.sketch_DD is not None
    assert constants.gamma_base_H is not None
    gamma = side_scale(gamma_BHT, constants.gamma_base_H, dtype)
    return weight_H11 * gamma * (sigma_BHTD @ constants.sketch_DD.to(dtype))


def rotate(x_BHTD: Tensor, side: SideConstants) -> Tensor:
    """y = A x in fp32."""
    x_BHTD, matrix_HDD = x_BHTD.float(), side.matrix_HDD.mT
    if len(x_BHTD) < 2:
        return x_BHTD @ matrix_HDD
    # a sequence at a time: matmul would copy A for each of them, and as rows of one product they
    # would have other roundings in other company
    # [H, T, D] @ [H, D, D]
    return torch.stack([x_HTD @ matrix_HDD for x_HTD in x_BHTD])


def side_levels(codes_BHTD: Tensor, side: SideConstants, bits: int) -> Tensor:
    """fp32 L[q]."""
    if bits > TABLE_BITS:
        return codes_BHTD.float() - (2**bits - 1) / 2
    values_HL = level_values(side.levels_HL, bits)
    head_H11 = torch.arange(values_HL.shape[0], device=values_HL.device)[:, None, None]
    return values_HL[head_H11, codes_BHTD.long()]


def side_scale(
    stored_BHT: Tensor | None, base_H: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """s of ``dtype`` (B, H, T, 1); of (H, 1, 1) where nothing is stored."""
    base_H1 = base_H[:, None].to(dtype)
    if stored_BHT is None:
        return torch.exp2(base_H1)[..., None]
    return decode_norm(stored_BHT, base_H1).to(dtype)[..., None]


def _count_below(u_BHTD: Tensor, thresholds_HL: Tensor) -> Tensor:
    """uint8: how many of the head's thresholds are less than u."""
    if thresholds_HL.shape[1] < 32:
        codes_BHTD = torch.zeros(u_BHTD.shape, dtype=torch.uint8, device=u_BHTD.device)
        for threshold_H in thresholds_HL.unbind(1):
            codes_BHTD += u_BHTD > threshold_H[:, None, None]
        return codes_BHTD
    u_HN = u_BHTD.transpose(0, 1).flatten(1).contiguous()
    found_HN = torch.searchsorted(thresholds_HL.contiguous(), u_HN, out_int32=True)
    B, H, T, D = u_BHTD.shape
    return found_HN.to(torch.uint8).view(H, B, T, D).transpose(0, 1).contiguous()
