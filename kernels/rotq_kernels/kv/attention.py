"""Attention of a few new tokens over a packed history and dense tokens, in one softmax.

    out = sum_dense p v + (sum_packed p) v_mean + A_v^-1 sum_packed p s_v L_v[q]

with scores of packed keys as in ``kv_format``. On a GPU a decode step turns the query
(``kv_query``), splits the packed tokens over the machine (``kv_decode``), takes the dense ones as
one more split and merges all (``kv_merge``); neither keys nor values are ever unpacked to memory.

Shape suffixes: B sequences, M query heads, T query tokens, H KV heads, N query rows of a KV head
(its M / H heads by T tokens) or dense tokens, J pages of a sequence, D head width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.arguments import (
    flatten_dense,
    flatten_pages,
    flatten_transform,
    restore_arguments,
)
from rotq_kernels.kv.cpu.attention import packed_attention_cpu
from rotq_kernels.kv.decode.launch import MAX_ROWS, attend_packed
from rotq_kernels.kv.encode.launch import dequantize_kv_reference
from rotq_kernels.kv.format import DenseKV, KVConstants, KVPages
from rotq_kernels.kv.prefill.launch import packed_prefill

DECODE_ROWS = 64
"""Up to here a chunk goes in decode steps, which split the history over the machine; more query
rows share what is unpacked."""

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def packed_attention(
    q_BMTD: Tensor,
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    transform: KVConstants,
    *,
    dense: DenseKV | None = None,
    window: int = 0,
    scale: float,
) -> Tensor:
    """Attend to packed tokens and dense tokens, in one softmax.

    A query sees keys at positions 0 to its own, with a window only those less than ``window``
    before it. Packed token j of sequence b is at position start_B[b] + j.

    Args:
        q_BMTD: fp16, bf16 or fp32, after RoPE; M is a multiple of the KV heads, query head m
            belongs to KV head m // (M / H).
        pages: Packed tokens; head width at most 256.
        page_table_BJ: int32, page j of sequence b; not read beyond a length.
        length_B: int32, packed tokens of each sequence; 0 is allowed.
        start_B: int32, position of its first packed token.
        query_position_BT: int32; queries at negative positions give zeros.
        transform: Constants of the layer.
        dense: Sinks, recent tokens and the chunk that the queries are of.
        window: Of sliding attention in tokens; 0 for none.
        scale: Of scores, 1 / sqrt(D) as a rule.

    Returns:
        (B, M, T, D) in the dtype of the query, contiguous; zeros for a query that sees nothing.

    Raises:
        ValueError: shapes or dtypes disagree, or are not supported.
    """
    form = pages.format
    _check(q_BMTD, pages, page_table_BJ, length_B, start_B, query_position_BT, transform, dense)
    if window < 0:
        raise ValueError(f"window must be 0 (none) or positive, got {window}")
    return _op(
        q_BMTD,
        flatten_pages(pages),
        page_table_BJ,
        length_B,
        start_B,
        query_position_BT,
        flatten_transform(transform),
        flatten_dense(dense),
        form.k_bits,
        form.v_bits,
        form.norm,
        form.residual,
        transform.mean,
        transform.rotary_scale,
        window,
        scale,
    )


def packed_attention_reference(
    q_BMTD: Tensor,
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    transform: KVConstants,
    *,
    dense: DenseKV | None = None,
    window: int = 0,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition of ``packed_attention``: dequantize everything, then plain attention.

    ``dtype`` is that of the arithmetic, fp64 for oracles; of the result too.
    """
    k_BHND, v_BHND = dequantize_kv_reference(
        pages, page_table_BJ, length_B, start_B, transform, dtype=dtype
    )
    token_N = torch.arange(k_BHND.shape[2], device=k_BHND.device)
    position_BN = (start_B[:, None] + token_N).where(token_N < length_B[:, None], -1)
    if dense is not None:
        k_BHND = torch.cat((k_BHND, dense.k_BHND.to(dtype)), dim=2)
        v_BHND = torch.cat((v_BHND, dense.v_BHND.to(dtype)), dim=2)
        position_BN = torch.cat((position_BN, dense.position_BN), dim=1)
    ahead_BTN = query_position_BT[:, :, None] - position_BN[:, None]
    seen_BTN = (position_BN[:, None] >= 0) & (ahead_BTN >= 0)
    if window:
        seen_BTN &= ahead_BTN < window
    group = q_BMTD.shape[1] // k_BHND.shape[1]
    k_BMND, v_BMND = (x.repeat_interleave(group, dim=1) for x in (k_BHND, v_BHND))
    score_BMTN = (q_BMTD.to(dtype) @ k_BMND.mT) * scale
    share_BMTN = score_BMTN.masked_fill(~seen_BTN[:, None], -math.inf).softmax(-1)
    # a row that sees nothing is 0 / 0
    return share_BMTN.nan_to_num(0.0) @ v_BMND


def packed_attention_triton(*arguments: Any, splits: int | None = None, **keywords: Any) -> Tensor:
    """``packed_attention`` by the kernels, unchecked; CPU tensors need TRITON_INTERPRET=1.

    Args:
        arguments: As those of ``packed_attention``.
        splits: Programs that share the packed tokens of a KV head; by the machine if left out.
        keywords: As those of ``packed_attention``.
    """
    q_BMTD, pages = arguments[:2]
    rows = q_BMTD.shape[1] // pages.k_codes.shape[1] * q_BMTD.shape[2]
    if rows > MAX_ROWS:
        return _attend_long_chunk(*arguments, **keywords)
    return attend_packed(*arguments, splits=splits, **keywords)


def _attend_long_chunk(
    q_BMTD: Tensor,
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    transform: KVConstants,
    **keywords: Any,
) -> Tensor:
    """More query rows than a decode tile holds: decode steps for a few, else a prefill."""
    where = (page_table_BJ, length_B, start_B)
    rows = q_BMTD.shape[1] // pages.k_codes.shape[1] * q_BMTD.shape[2]
    if rows > DECODE_ROWS:
        return packed_prefill(q_BMTD, pages, *where, query_position_BT, transform, **keywords)
    step = MAX_ROWS * pages.k_codes.shape[1] // q_BMTD.shape[1]
    parts = [
        attend_packed(
            q_BMTD[:, :, t : t + step],
            pages,
            *where,
            query_position_BT[:, t : t + step],
            transform,
            **keywords,
        )
        for t in range(0, q_BMTD.shape[2], step)
    ]
    return torch.cat(parts, dim=2)


def _check(
    q_BMTD: Tensor,
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    transform: KVConstants,
    dense: DenseKV | None,
) -> None:
    form, H = pages.format, pages.k_codes.shape[1]
    B, M, T, D = q_BMTD.shape
    if form != transform.format:
        raise ValueError(f"pages of {form}, constants of {transform.format}")
    if not all(tensor.is_contiguous() for tensor in pages.tensors()):
        raise ValueError("pages must be contiguous")
    if q_BMTD.dtype not in QUERY_DTYPES and q_BMTD.is_cuda:
        raise ValueError(f"queries must be fp16, bf16 or fp32, got {q_BMTD.dtype}")
    if form.head_dim != D or M % H or M // H > MAX_ROWS or D > 256:
        raise ValueError(
            f"queries of {M} heads of width {D} do not fit {H} KV heads of width {form.head_dim}; "
            f"at most {MAX_ROWS} per KV head and width 256"
        )
    shapes = {
        "page_table": (page_table_BJ, (B, page_table_BJ.shape[-1])),
        "length": (length_B, (B,)),
        "start": (start_B, (B,)),
        "query_position": (query_position_BT, (B, T)),
    }
    if dense is not None:
        N = dense.k_BHND.shape[2]
        shapes["dense position"] = (dense.position_BN, (B, N))
        for name, tensor in (("key", dense.k_BHND), ("value", dense.v_BHND)):
            if tensor.shape != (B, H, N, D) or tensor.stride(-1) != 1:
                raise ValueError(f"dense {name} must be {(B, H, N, D)}, got {tuple(tensor.shape)}")
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype != torch.int32 or tensor.shape != shape:
            raise ValueError(
                f"{name} must be int32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def _on_cuda(
    q_BMTD: Tensor,
    pages: Sequence[Tensor | None],
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    constants: Sequence[Tensor | None],
    dense: Sequence[Tensor],
    k_bits: int,
    v_bits: int,
    norm: str,
    residual: str,
    mean: str,
    rotary_scale: float,
    window: int,
    scale: float,
) -> Tensor:
    arguments, keywords = restore_arguments(**locals())
    return packed_attention_triton(*arguments, **keywords)


_op = torch.library.custom_op(
    "rotq::packed_attention", _on_cuda, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _(*flat: Any) -> Tensor:
    arguments, keywords = restore_arguments(*flat)
    return packed_attention_cpu(*arguments, **keywords)


@_op.register_fake
def _(q_BMTD: Tensor, *flat: Any) -> Tensor:
    return torch.empty_like(q_BMTD, memory_format=torch.contiguous_format)
