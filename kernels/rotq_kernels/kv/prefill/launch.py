"""Attention of a long chunk of queries over packed history and dense tokens, in one softmax.

The function of ``packed_attention`` for more query rows than a decode tile holds. Its maths, in an
order that unpacks each tile of codes once for many query rows:

    1.  x -> x A^-1                                     turned once (``kv.query``)
    2.  sums, maximum, weights over packed tokens       codes only, in the values' rotated basis
    3.  sums A_v^-T + weights v_mean                    turned back once
    4.  the dense tokens, from there on, then division

Nothing of the size of the history is written: between the steps are sums of the size of the query.
Without pages, at the beginning of a text, torch's own attention does it (``dense``).

Shape suffixes: B sequences, M query heads, T query tokens, H KV heads, N query rows of a KV head
(its M / H heads by T tokens), D head width, Q tiles of a sequence's packed tokens, R rotary pairs.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.format import DenseKV, KVConstants, KVFormat, KVHistory, level_words
from rotq_kernels.kv.prefill.dense import attend_dense
from rotq_kernels.kv.query import turn_query
from rotq_kernels.kv.rope_mean import angle_table
from rotq_kernels.launching import launch, require_triton

EXACT_WIDTH = 128
"""Wider heads of fp32 queries would not fit; they are taken in decode steps."""


def packed_prefill(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, *, scale: float
) -> Tensor:
    """``packed_attention`` for long chunks, unchecked; CPU tensors need TRITON_INTERPRET=1.

    Arguments and result are those of ``packed_attention``, which calls this and is what to call;
    its reference is ``packed_attention_reference``.
    """
    if not history.page_table_BJ.shape[1] and history.dense is not None:
        window = history.window
        return attend_dense(q_BMTD, position_BT, history.dense, scale=scale, window=window)
    require_triton()
    from rotq_kernels.kv.prefill.kernels import dense_chunk_kernel

    H, value = history.pages.k_codes.shape[1], history.constants.value
    q_BMTD, position_BT = q_BMTD.contiguous(), position_BT.contiguous()
    sums_BHND, peak_BHN, weight_BHN = _attend_packed(q_BMTD, position_BT, history, scale)
    sums_BHND = sums_BHND @ value.inverse_HDD.mT
    sums_BHND += weight_BHN[..., None] * value.mean_HD[:, None]
    out_BMTD = torch.empty_like(q_BMTD)
    k_BHND, v_BHND, dense_position_BN = _dense_tensors(history.dense, q_BMTD, H)
    N, T = sums_BHND.shape[2], q_BMTD.shape[2]
    tile = tile_sizes(history.pages.format, exact=q_BMTD.dtype == torch.float32)
    launch(
        dense_chunk_kernel,
        (-(-N // tile["N"]), sums_BHND.shape[0] * H),
        q_BMTD,
        k_BHND,
        v_BHND,
        dense_position_BN,
        position_BT,
        sums_BHND,
        peak_BHN,
        weight_BHN,
        out_BMTD,
        H,
        N,
        T,
        k_BHND.shape[2],
        scale * math.log2(math.e),
        *k_BHND.stride()[:3],
        *v_BHND.stride()[:3],
        D=q_BMTD.shape[3],
        WINDOW=history.window,
        PRECISION="ieee" if torch.version.hip is not None else "tf32x3",
        **tile,
        on=q_BMTD,
    )
    return out_BMTD


def _attend_packed(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated sums (B, H, N, D), maxima in log2 and sums of weights (B, H, N), all fp32."""
    from rotq_kernels.kv.prefill.kernels import packed_kernel

    pages, constants = history.pages, history.constants
    form, key, value = pages.format, constants.key, constants.value
    page_table_BJ, start_B = history.page_table_BJ.contiguous(), history.start_B.contiguous()
    turned = turn_query(q_BMTD, _without_turning_mean(constants), scale=scale)
    sums_BHND = torch.empty_like(turned.levels_BHND)
    peak_BHN = sums_BHND.new_empty(sums_BHND.shape[:3])
    weight_BHN = torch.empty_like(peak_BHN)
    B, H, N, D = sums_BHND.shape
    exact = q_BMTD.dtype == torch.float32
    tile = tile_sizes(form, exact=exact)
    turning = constants.mean == "rope"
    origins = angles = None
    if turning:
        assert constants.inv_freq_R is not None
        tiles = -(-page_table_BJ.shape[1] * form.page_size // tile["TILE"])
        first_BQ = start_B[:, None] + torch.arange(tiles, device=start_B.device) * tile["TILE"]
        origins = _angles(constants.inv_freq_R, first_BQ)
        angle_dtype = torch.float32 if exact else torch.float16
        angles = angle_table(constants.inv_freq_R, tile["TILE"], angle_dtype)
    launch(
        packed_kernel,
        (-(-N // tile["N"]), B * H),
        q_BMTD,
        turned.levels_BHND.contiguous(),
        _contiguous(turned.residual_BHND),
        _contiguous(turned.constant_BHN),
        key.mean_HD.contiguous() if turning else None,
        angles,
        origins,
        pages.k_codes,
        pages.k_norm,
        pages.k_sign,
        pages.k_gamma,
        level_words(key.levels_HL, form.k_bits),
        key.base_H,
        constants.gamma_base_H if pages.k_gamma is not None else None,
        pages.v_codes,
        pages.v_norm,
        level_words(value.levels_HL, form.v_bits),
        value.base_H,
        page_table_BJ,
        history.length_B.contiguous(),
        start_B,
        _contiguous(history.hidden_B),
        position_BT,
        sums_BHND,
        peak_BHN,
        weight_BHN,
        H,
        N,
        position_BT.shape[1],
        page_table_BJ.shape[1],
        1 if origins is None else origins.shape[1],
        scale * math.log2(math.e) * constants.rotary_scale,
        **{f"gap_{name}": gap for name, gap in pages.gaps.items()},
        D=D,
        R=1 if angles is None else angles.shape[2],
        K_BITS=form.k_bits,
        V_BITS=form.v_bits,
        PAGE=form.page_size,
        WINDOW=history.window,
        EXACT=exact,
        PTX=q_BMTD.is_cuda and torch.version.hip is None,
        **tile,
        on=q_BMTD,
    )
    return sums_BHND, peak_BHN, weight_BHN


def _angles(inv_freq_R: Tensor, first_BQ: Tensor) -> Tensor:
    """cos and sin of RoPE's angles at the first token of each tile: fp32 (B, Q, 2, R)."""
    angle_BQR = first_BQ[..., None].double() * inv_freq_R.double()
    return torch.stack((angle_BQR.cos(), angle_BQR.sin()), dim=-2).float()


def _without_turning_mean(constants: KVConstants) -> KVConstants:
    """Of a mean that turns, what RoPE leaves as it is, which gives the same score everywhere."""
    if constants.mean != "rope":
        return constants
    assert constants.inv_freq_R is not None
    mean_HD = constants.key.mean_HD.clone()
    mean_HD[:, : 2 * constants.inv_freq_R.shape[0]] = 0
    return replace(constants, mean="static", key=replace(constants.key, mean_HD=mean_HD))


def tile_sizes(form: KVFormat, *, exact: bool) -> dict[str, int]:
    """Query rows N and tokens TILE of a program, its warps and stages.

    What they take of shared memory fits the smallest GPUs, 99 KiB of sm_86, sm_89 and sm_120.

    Args:
        form: Of the pages.
        exact: fp32 queries, of heads up to EXACT_WIDTH.
    """
    if exact:
        return {"N": 16, "TILE": 32, "num_warps": 4, "num_stages": 1}
    if form.head_dim <= 64:
        return {"N": 64, "TILE": 64, "num_warps": 4, "num_stages": 2}
    if form.head_dim <= 128:
        tokens = 64 if form.residual == "none" else 32
        return {"N": 64, "TILE": tokens, "num_warps": 8, "num_stages": 2}
    return {"N": 32, "TILE": 32, "num_warps": 4, "num_stages": 2}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense_tensors(dense: DenseKV | None, q_BMTD: Tensor, H: int) -> tuple[Any, Any, Tensor]:
    """Keys, values and positions; of no tokens where there are none."""
    if dense is not None:
        return dense.k_BHND, dense.v_BHND, dense.position_BN.contiguous()
    B, D = q_BMTD.shape[0], q_BMTD.shape[3]
    none = q_BMTD.new_empty(B, H, 0, D)
    return none, none, torch.empty(B, 0, dtype=torch.int32, device=q_BMTD.device)
