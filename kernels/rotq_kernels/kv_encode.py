"""Keys and values into the pages of the KV cache, and back.

For each token and KV head, y = A (x - m), codes, the norm with its gain, residual bits, packed as
``layout.pack_kv`` does; see ``kv_format`` for the maths and ``kv_side`` for the definition.

Shape suffixes: B sequences, T tokens, H KV heads, D head width, P pages, S tokens of a page,
J pages of a sequence, W words of a token.
"""

import torch
from torch import Tensor

from rotq_kernels.kv_format import KVPages, KVTransform
from rotq_kernels.kv_side import (
    dequantize_residual,
    dequantize_side,
    key_mean,
    quantize_residual,
    quantize_side,
)
from rotq_kernels.layout import pack_kv, unpack_kv


def encode_kv_reference(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    transform: KVTransform,
    pages: KVPages,
) -> None:
    """The definition of ``encode_kv``, in plain PyTorch."""
    form, key, value = pages.format, transform.key, transform.value
    k_BHTD = k_BHTD.float() - key_mean(transform, position_BT)
    codes_BHTD, norm_BHT = quantize_side(k_BHTD, key, form.k_bits, form.norm)
    _write(pages.k_codes, pack_kv(codes_BHTD, form.k_bits), slot_BT)
    _write(pages.k_norm, norm_BHT, slot_BT)
    if form.residual != "none":
        sign_BHTD, gamma_BHT = quantize_residual(k_BHTD, codes_BHTD, norm_BHT, transform)
        _write(pages.k_sign, pack_kv(sign_BHTD, 1), slot_BT)
        _write(pages.k_gamma, gamma_BHT, slot_BT)
    v_BHTD = v_BHTD.float() - value.mean_HD[:, None]
    codes_BHTD, norm_BHT = quantize_side(v_BHTD, value, form.v_bits, form.norm)
    _write(pages.v_codes, pack_kv(codes_BHTD, form.v_bits), slot_BT)
    _write(pages.v_norm, norm_BHT, slot_BT)


def dequantize_kv_reference(
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    transform: KVTransform,
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


def _write(stored: Tensor | None, new: Tensor | None, slot_BT: Tensor) -> None:
    """Put (B, H, T, ...) into the slots of (P, H, S, ...)."""
    if stored is None or new is None:
        return
    b, t = (slot_BT >= 0).nonzero(as_tuple=True)
    slot = slot_BT[b, t]
    page_size = stored.shape[2]
    stored[slot // page_size, :, slot % page_size] = new[b, :, t]
