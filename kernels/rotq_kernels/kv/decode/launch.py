"""Launches the kernels of a decode step: turn the query, split, dense tokens, merge."""

import math
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.format import KVConstants, KVHistory, level_words
from rotq_kernels.kv.query import TurnedQuery, turn_query
from rotq_kernels.kv.rope_mean import angle_table
from rotq_kernels.launching import launch, next_power_of_two, require_triton

MAX_ROWS = 16
"""Query rows of a KV head, heads by tokens, that a decode kernel takes as one tile."""

SPLIT_TOKENS = 256
"""Fewer packed tokens are not worth a program of their own."""

PROGRAMS_PER_SM = 4
"""Of the decode kernel, all splits together."""


def packed_decode(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    *,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """``packed_attention`` of at most MAX_ROWS query rows of each KV head, unchecked.

    ``splits`` is the number of programs that share the packed tokens of a KV head. No size is
    read back from the device, so that a step can be captured in a CUDA graph.
    """
    require_triton()
    from rotq_kernels.kv.decode.kernel import decode_kernel

    B, M, T, _ = q_BMTD.shape
    H, table_width = history.pages.k_codes.shape[1], history.page_table_BJ.shape[1]
    rows = M // H * T
    splits = splits or _choose_splits(q_BMTD, B * H, table_width * history.pages.format.page_size)
    q_BMTD, position_BT = q_BMTD.contiguous(), position_BT.contiguous()
    turned = turn_query(q_BMTD, history.constants, scale=scale)
    partials = splits + (history.dense is not None)
    sums = q_BMTD.new_empty((B * H, partials, rows, q_BMTD.shape[3]), dtype=torch.float32)
    peak = q_BMTD.new_empty((B * H, partials, rows), dtype=torch.float32)
    weight = torch.empty_like(peak)
    arguments = _decode_arguments(q_BMTD, history, turned)
    launch(
        decode_kernel,
        (B * H, splits),
        **arguments,
        page_table_ptr=history.page_table_BJ.contiguous(),
        length_ptr=history.length_B.contiguous(),
        start_ptr=history.start_B.contiguous(),
        hidden_ptr=None if history.hidden_B is None else history.hidden_B.contiguous(),
        position_ptr=position_BT,
        sums_ptr=sums,
        peak_ptr=peak,
        weight_ptr=weight,
        H=H,
        rows=rows,
        T=T,
        table_width=table_width,
        partials=partials,
        num_warps=arguments["WARPS"],
        num_stages=1,
        on=q_BMTD,
    )
    if history.dense is not None:
        _attend_dense(q_BMTD, position_BT, history, scale, (sums, peak, weight))
    return _merge(q_BMTD, history.constants, turned, splits, (sums, peak, weight))


def _choose_splits(q_BMTD: Tensor, heads: int, tokens: int) -> int:
    """Enough programs for the machine, if there are tokens enough; from shapes only."""
    if not q_BMTD.is_cuda:
        return 2
    machine = torch.cuda.get_device_properties(q_BMTD.device).multi_processor_count
    wanted = -(-PROGRAMS_PER_SM * machine // heads)
    return max(1, min(wanted, tokens // SPLIT_TOKENS, 128))


def tile_sizes(D: int, rows: int, *, has_ptx: bool, exact: bool) -> dict[str, int]:
    """Sizes of the decode kernel's tile: query rows N, tokens TILE, and WARPS.

    Args:
        D: Head width.
        rows: Query rows of a KV head, at most MAX_ROWS.
        has_ptx: Whether the GPU is NVIDIA's.
        exact: fp32 queries, which of wide heads take so much shared memory that a small GPU holds
            half of a tile.
    """
    warps = 2 if exact and D > 128 else 4
    # 16 lines of codes a warp; heads of one or two chunks put four or two tokens on a line
    tokens = 16 * warps * max(1, 4 // -(-D // 32))
    return {"N": 8 if rows <= 8 and has_ptx else MAX_ROWS, "TILE": tokens, "WARPS": warps}


def _decode_arguments(q_BMTD: Tensor, history: KVHistory, turned: TurnedQuery) -> dict[str, Any]:
    pages, constants = history.pages, history.constants
    form, key, value = pages.format, constants.key, constants.value
    rows = turned.levels_BHND.shape[2]
    has_ptx = q_BMTD.is_cuda and torch.version.hip is None
    exact = q_BMTD.dtype == torch.float32
    sizes = tile_sizes(form.head_dim, rows, has_ptx=has_ptx, exact=exact)
    turning, R, angles = turned.cosine_BHNR is not None, 1, None
    if constants.inv_freq_R is not None and turning:
        R = constants.inv_freq_R.shape[0]
        angle_dtype = torch.float32 if exact else torch.float16
        angles = angle_table(constants.inv_freq_R, sizes["TILE"], angle_dtype)
    return {
        "levels_ptr": turned.levels_BHND,
        "residual_ptr": turned.residual_BHND,
        "cosine_ptr": turned.cosine_BHNR,
        "sine_ptr": turned.sine_BHNR,
        "angle_ptr": angles,
        "frequency_ptr": constants.inv_freq_R if turning else None,
        "k_codes_ptr": pages.k_codes,
        "k_norm_ptr": pages.k_norm,
        "k_sign_ptr": pages.k_sign,
        "k_gamma_ptr": pages.k_gamma,
        "k_table_ptr": level_words(key.levels_HL, form.k_bits),
        "k_base_ptr": key.base_H.contiguous(),
        "gamma_base_ptr": constants.gamma_base_H if pages.k_gamma is not None else None,
        "v_codes_ptr": pages.v_codes,
        "v_norm_ptr": pages.v_norm,
        "v_table_ptr": level_words(value.levels_HL, form.v_bits),
        "v_base_ptr": value.base_H.contiguous(),
        **{f"gap_{name}": gap for name, gap in pages.gaps.items()},
        "D": form.head_dim,
        "R": R,
        "K_BITS": form.k_bits,
        "V_BITS": form.v_bits,
        "PAGE": form.page_size,
        "WINDOW": history.window,
        "LIMBS": 3 if exact else 2,
        "PTX": has_ptx,
        **sizes,
    }


def _attend_dense(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    scale: float,
    partial: tuple[Tensor, Tensor, Tensor],
) -> None:
    from rotq_kernels.kv.decode.merge import dense_kernel

    dense = history.dense
    assert dense is not None
    sums, peak, weight = partial
    k_BHND, v_BHND = dense.k_BHND, dense.v_BHND
    launch(
        dense_kernel,
        (sums.shape[0],),
        q_BMTD,
        k_BHND,
        v_BHND,
        dense.position_BN.contiguous(),
        position_BT,
        sums,
        peak,
        weight,
        k_BHND.shape[1],
        sums.shape[2],
        q_BMTD.shape[2],
        k_BHND.shape[2],
        sums.shape[1],
        scale * math.log2(math.e),
        *k_BHND.stride()[:3],
        *v_BHND.stride()[:3],
        D=q_BMTD.shape[3],
        WINDOW=history.window,
        N=MAX_ROWS,
        TILE=32,
        PRECISION=_precision(q_BMTD.dtype == torch.float32),
        on=q_BMTD,
    )


def _merge(
    q_BMTD: Tensor,
    constants: KVConstants,
    turned: TurnedQuery,
    splits: int,
    partial: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    from rotq_kernels.kv.decode.merge import merge_kernel

    sums, peak, weight = partial
    heads, partials, rows, D = sums.shape
    out_BMTD = torch.empty_like(q_BMTD)
    block = 32
    launch(
        merge_kernel,
        (heads, -(-D // block)),
        sums,
        peak,
        weight,
        turned.constant_BHN,
        constants.value.inverse_HDD.contiguous(),
        constants.value.mean_HD.contiguous(),
        out_BMTD,
        constants.value.mean_HD.shape[0],
        rows,
        splits,
        partials,
        D=D,
        N=MAX_ROWS,
        P=next_power_of_two(partials),
        BLOCK=block,
        PRECISION=_precision(True),
        on=q_BMTD,
    )
    return out_BMTD


def _precision(exact: bool) -> str:
    """Of products of fp32 tiles. tf32 holds 16-bit floats as they are; AMD has no three passes."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if exact else "tf32"
