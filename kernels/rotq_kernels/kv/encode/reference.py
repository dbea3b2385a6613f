"""Tokens into pages and back, in plain PyTorch: the definition, and what CPU tensors run on.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, P pages, S tokens of a page,
J pages of a sequence, W words of a token, C words of its signs, N tokens that have a slot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotq_kernels.kv.encode.arguments import SideArguments, side_arguments
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
    constants: KVConstants,
    pages: KVPages,
) -> None:
    """The definition of ``encode_kv``, in plain PyTorch."""
    for side in side_arguments(k_BHTD, v_BHTD, position_BT, slot_BT, constants, pages):
        encode_side_reference(side)


def encode_side_reference(given: SideArguments) -> None:
    """Keys or values alone."""
    side = SideConstants(
        matrix_HDD=given.matrix_HDD,
        inverse_HDD=given.matrix_HDD,  # not used
        mean_HD=given.mean_HD,
        levels_HL=given.levels_HL,
        thresholds_HL=given.thresholds_HL,
        base_H=given.base_H,
        gain=given.gain,  # type: ignore[arg-type]
        unit_H=given.unit_H,
        metric_HDD=given.metric_HDD,
        search=given.search,
    )
    mean = given.mean_HD[:, None]
    if given.inv_freq_R is not None:
        mean = turned_mean(given.mean_HD, given.position_BT, given.inv_freq_R, given.rotary_scale)
    x_BHTD = given.x_BHTD.float() - mean
    dtype = None if given.norm_PHS is None else given.norm_PHS.dtype
    codes_BHTD, norm_BHT = quantize_side(x_BHTD, side, given.bits, NORMS[dtype])  # type: ignore[arg-type]
    written: list[tuple[Tensor | None, list[Tensor | None]]]
    written = [
        (pack_kv(codes_BHTD, given.bits), [given.codes_PHSW]),
        (norm_BHT, [given.norm_PHS]),
    ]
    if given.sign_PHSC is not None:
        left_BHTD = left_over(x_BHTD, codes_BHTD, norm_BHT, side, given.bits)
        sign_BHTD, gamma_BHT = residual_bits(left_BHTD, given.sketch_DD, given.gamma_base_H, dtype)
        written += [(pack_kv(sign_BHTD, 1), [given.sign_PHSC]), (gamma_BHT, [given.gamma_PHS])]
    write_tokens(written, given.slot_BT, given.codes_PHSW.shape[2])


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
    constants: KVConstants,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Keys, means added and at their positions, and values: what the codes stand for.

    Args:
        pages: Packed tokens.
        page_table_BJ: Integers; page j of sequence b. Not read beyond the sequence's length.
        length_B: Packed tokens of each sequence.
        start_B: Position of its first packed token.
        constants: Constants of the layer.
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
        residual_BHTD = dequantize_residual(sign_BHTD, norm_BHT, gamma_BHT, constants, dtype)
    codes_BHTD = read_codes(pages.k_codes, form.k_bits)
    k_BHTD = key_mean(constants, start_B[:, None] + token_T, dtype) + dequantize_side(
        codes_BHTD, norm_BHT, constants.key, form.k_bits, residual_BHTD=residual_BHTD, dtype=dtype
    )
    codes_BHTD = read_codes(pages.v_codes, form.v_bits)
    v_BHTD = constants.value.mean_HD[:, None].to(dtype) + dequantize_side(
        codes_BHTD, read(pages.v_norm), constants.value, form.v_bits, dtype=dtype
    )
    gone_B1T1 = ~there_BT[:, None, :, None]
    return k_BHTD.masked_fill(gone_B1T1, 0), v_BHTD.masked_fill(gone_B1T1, 0)
