"""Tokens into pages and back, in plain PyTorch: the definition, and what CPU tensors run on.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, P pages, S tokens of a page,
J pages of a sequence, W words of a token, C words of its signs, N tokens that have a slot.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.encode.one_side import (
    dequantize_residual,
    dequantize_side,
    key_mean,
    left_over,
    quantize_side,
    residual_bits,
    turned_mean,
)
from rotq_kernels.kv.format import KVConstants, KVPages, SideConstants
from rotq_kernels.layout import pack_kv, unpack_kv

NORMS = {torch.uint8: "log8", torch.float16: "float16", None: "none"}
"""By the dtype that is stored."""


def encode_kv_reference(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    transform: KVConstants,
    pages: KVPages,
) -> None:
    """The definition of ``encode_kv``, in plain PyTorch."""
    for side in sides(k_BHTD, v_BHTD, transform, pages):
        encode_side_reference(position_BT=position_BT, slot_BT=slot_BT, **side)


def encode_side_reference(
    x_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    matrix_HDD: Tensor,
    mean_HD: Tensor,
    levels_HL: Tensor,
    thresholds_HL: Tensor,
    base_H: Tensor,
    unit_H: Tensor,
    inv_freq_R: Tensor | None,
    sketch_DD: Tensor | None,
    gamma_base_H: Tensor | None,
    codes_PHSW: Tensor,
    norm_PHS: Tensor | None,
    sign_PHSC: Tensor | None,
    gamma_PHS: Tensor | None,
    bits: int,
    gain: str,
    rotary_scale: float,
    metric_HDD: Tensor | None,
    search: int,
) -> None:
    """Keys or values alone; arguments as ``SideConstants`` and ``KVPages`` have them."""
    side = SideConstants(
        matrix_HDD=matrix_HDD,
        inverse_HDD=matrix_HDD,  # not used
        mean_HD=mean_HD,
        levels_HL=levels_HL,
        thresholds_HL=thresholds_HL,
        base_H=base_H,
        gain=gain,  # type: ignore[arg-type]
        unit_H=unit_H,
        metric_HDD=metric_HDD,
        search=search,
    )
    mean = mean_HD[:, None]
    if inv_freq_R is not None:
        mean = turned_mean(mean_HD, position_BT, inv_freq_R, rotary_scale)
    x_BHTD = x_BHTD.float() - mean
    dtype = None if norm_PHS is None else norm_PHS.dtype
    codes_BHTD, norm_BHT = quantize_side(x_BHTD, side, bits, NORMS[dtype])  # type: ignore[arg-type]
    written: list[tuple[Tensor | None, list[Tensor | None]]]
    written = [(pack_kv(codes_BHTD, bits), [codes_PHSW]), (norm_BHT, [norm_PHS])]
    if sign_PHSC is not None:
        left_BHTD = left_over(x_BHTD, codes_BHTD, norm_BHT, side, bits)
        sign_BHTD, gamma_BHT = residual_bits(left_BHTD, sketch_DD, gamma_base_H, dtype)
        written += [(pack_kv(sign_BHTD, 1), [sign_PHSC]), (gamma_BHT, [gamma_PHS])]
    write_tokens(written, slot_BT, codes_PHSW.shape[2])


def write_tokens(
    written: Sequence[tuple[Tensor | None, Sequence[Tensor | None]]],
    slot_BT: Tensor,
    page_size: int,
) -> None:
    """Put what is stored of tokens into their slots, for one layer or for several at once.

    Args:
        written: What is new, (B, H, T, ...) with the heads of all layers one behind the other, and
            where it goes, (P, H, S, ...) of each layer; None is not stored. Modified in place.
        slot_BT: int64, page * page_size + offset; -1 skips the token.
        page_size: S.
    """
    b, t = (slot_BT >= 0).nonzero(as_tuple=True)
    slot_N = slot_BT[b, t]
    page_N, offset_N = slot_N // page_size, slot_N % page_size
    for new_BHT, layers in written:
        if new_BHT is None:
            continue
        held = [stored_PHS for stored_PHS in layers if stored_PHS is not None]
        # [N, H of all layers, ...] -> [N, H, ...] of each
        parts = new_BHT[b, :, t].split([stored_PHS.shape[1] for stored_PHS in held], dim=1)
        for stored_PHS, part_NH in zip(held, parts, strict=True):
            stored_PHS[page_N, :, offset_N] = part_NH


def dequantize_kv_reference(
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    transform: KVConstants,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Keys, means added and at their positions, and values: what the codes stand for.

    Args:
        pages: Packed tokens.
        page_table_BJ: Integers; page j of sequence b. Not read beyond the sequence's length.
        length_B: Packed tokens of each sequence.
        start_B: Position of its first packed token.
        transform: Constants of the layer.
        dtype: Of the result and of all arithmetic: fp32, or fp64 for oracles.

    Returns:
        k and v, ``dtype`` (B, H, T, D) with T the longest length; zeros beyond a length.
    """
    form = pages.format
    T = int(length_B.max())
    token_T = torch.arange(T, device=page_table_BJ.device)
    there_BT = token_T < length_B[:, None]
    page_BT = page_table_BJ[:, token_T // form.page_size].where(there_BT, 0).long()

    def read(stored: Tensor | None) -> Tensor | None:
        if stored is None:
            return None
        return stored[page_BT, :, token_T % form.page_size].transpose(1, 2)

    def read_codes(words: Tensor, bits: int) -> Tensor:
        read_BHTW = read(words)
        assert read_BHTW is not None
        return unpack_kv(read_BHTW, bits, form.head_dim)

    norm_BHT, residual_BHTD = read(pages.k_norm), None
    if pages.k_sign is not None:
        sign_BHTD, gamma_BHT = read_codes(pages.k_sign, 1), read(pages.k_gamma)
        residual_BHTD = dequantize_residual(sign_BHTD, norm_BHT, gamma_BHT, transform, dtype)
    codes_BHTD = read_codes(pages.k_codes, form.k_bits)
    k_BHTD = key_mean(transform, start_B[:, None] + token_T, dtype) + dequantize_side(
        codes_BHTD, norm_BHT, transform.key, form.k_bits, residual_BHTD=residual_BHTD, dtype=dtype
    )
    codes_BHTD = read_codes(pages.v_codes, form.v_bits)
    v_BHTD = transform.value.mean_HD[:, None].to(dtype) + dequantize_side(
        codes_BHTD, read(pages.v_norm), transform.value, form.v_bits, dtype=dtype
    )
    gone_B1T1 = ~there_BT[:, None, :, None]
    return k_BHTD.masked_fill(gone_B1T1, 0), v_BHTD.masked_fill(gone_B1T1, 0)


def sides(
    k_BHTD: Tensor, v_BHTD: Tensor, transform: KVConstants, pages: KVPages
) -> Iterator[dict[str, Any]]:
    """Arguments of the operator for keys, then for values."""
    form, key = pages.format, transform.key
    yield _constants(key) | {
        "x_BHTD": k_BHTD,
        "mean_HD": torch.zeros_like(key.mean_HD) if transform.mean == "none" else key.mean_HD,
        "inv_freq_R": transform.inv_freq_R if transform.mean == "rope" else None,
        "rotary_scale": transform.rotary_scale,
        "sketch_DD": transform.sketch_DD if form.residual == "qjl" else None,
        "gamma_base_H": transform.gamma_base_H if form.residual == "qjl" else None,
        "codes_PHSW": pages.k_codes,
        "norm_PHS": pages.k_norm,
        "sign_PHSC": pages.k_sign,
        "gamma_PHS": pages.k_gamma,
        "bits": form.k_bits,
    }
    yield _constants(transform.value) | {
        "x_BHTD": v_BHTD,
        "mean_HD": transform.value.mean_HD,
        "inv_freq_R": None,
        "rotary_scale": 1.0,
        "sketch_DD": None,
        "gamma_base_H": None,
        "codes_PHSW": pages.v_codes,
        "norm_PHS": pages.v_norm,
        "sign_PHSC": None,
        "gamma_PHS": None,
        "bits": form.v_bits,
    }


def _constants(side: SideConstants) -> dict[str, Any]:
    return {
        "matrix_HDD": side.matrix_HDD,
        "levels_HL": side.levels_HL,
        "thresholds_HL": side.thresholds_HL,
        "base_H": side.base_H,
        "unit_H": side.unit_H,
        "gain": side.gain,
        "metric_HDD": side.metric_HDD if side.search else None,
        "search": side.search,
    }
