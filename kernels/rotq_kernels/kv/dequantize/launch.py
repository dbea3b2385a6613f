"""Launches the kernel that turns codes back into keys and values.

Shape suffixes: B sequences, H KV heads, N packed tokens and those that follow, D head width, P
pages, S tokens of a page, W words of a token, R rotary pairs.
"""

import torch
from torch import Tensor

from rotq_kernels.kv.format import KVHistory, SideConstants, gap_of, level_words
from rotq_kernels.launching import launch, require_triton


def dequantize_kv(
    history: KVHistory, packed: int, more: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, N, D), N = ``packed`` + ``more``, of which the packed ones are there.

    On CPU tensors this needs TRITON_INTERPRET=1.

    Args:
        history: Whose sequences have ``packed`` tokens each; without a residual.
        packed: Not 0.
        more: Tokens that room is left for.
        dtype: Of the result.
    """
    require_triton()
    constants, pages = history.constants, history.pages
    B, H, D = history.start_B.shape[0], constants.key.base_H.shape[0], pages.format.head_dim
    k_BHND, v_BHND = pages.k_codes.new_empty((2, B, H, packed + more, D), dtype=dtype)
    turns = constants.mean == "rope"
    _dequantize(
        history,
        pages.k_codes,
        pages.k_norm,
        constants.key,
        pages.format.k_bits,
        None if constants.mean == "none" else constants.key.mean_HD,
        constants.inv_freq_R if turns else None,
        packed,
        k_BHND,
    )
    _dequantize(
        history,
        pages.v_codes,
        pages.v_norm,
        constants.value,
        pages.format.v_bits,
        constants.value.mean_HD,
        None,
        packed,
        v_BHND,
    )
    return k_BHND, v_BHND


def tile_sizes(D: int) -> dict[str, int]:
    """Tokens of a program, columns at a time, and stages; fits the smallest GPUs' shared memory."""
    return {"TILE": 64 if D <= 128 else 32, "BLOCK": 32, "num_stages": 2 if D <= 128 else 1}


def _dequantize(
    history: KVHistory,
    codes_PHSW: Tensor,
    norm_PHS: Tensor | None,
    side: SideConstants,
    bits: int,
    mean_HD: Tensor | None,
    inv_freq_R: Tensor | None,
    packed: int,
    x_BHND: Tensor,
) -> None:
    """Keys or values, into the first ``packed`` places."""
    from rotq_kernels.kv.dequantize.kernel import dequantize_kernel

    B, H, held, D = x_BHND.shape
    sizes = tile_sizes(D)
    launch(
        dequantize_kernel,
        (-(-packed // sizes["TILE"]), B * H),
        codes_PHSW,
        norm_PHS,
        level_words(side.levels_HL, bits),
        side.base_H.contiguous(),
        side.inverse_HDD.contiguous(),
        None if mean_HD is None else mean_HD.contiguous(),
        None if inv_freq_R is None else inv_freq_R.contiguous(),
        history.page_table_BJ.contiguous(),
        history.start_B.contiguous(),
        x_BHND,
        H,
        history.page_table_BJ.shape[1],
        packed,
        held,
        history.constants.rotary_scale,
        gap_of(codes_PHSW),
        gap_of(norm_PHS),
        D=D,
        R=0 if inv_freq_R is None else inv_freq_R.shape[0],
        BITS=bits,
        PAGE=history.pages.format.page_size,
        PTX=x_BHND.is_cuda and torch.version.hip is None,
        **sizes,
        on=x_BHND,
    )
