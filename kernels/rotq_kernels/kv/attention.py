"""Attention of a few new tokens over a packed history and dense tokens, in one softmax.

    out = sum_dense p v + (sum_packed p) v_mean + A_v^-1 sum_packed p s_v L_v[q]

with scores of packed keys as in ``kv.format``. On a GPU a decode step (``decode.launch``) turns the
query, splits the packed tokens over the machine, takes the dense ones as one more split and merges
all; many query rows go through ``prefill.launch``. Neither keys nor values are unpacked to memory,
but for those of one layer under a long chunk of queries (``prefill.whole``).

Shape suffixes: B sequences, M query heads, T query tokens, H KV heads, N packed and dense tokens,
D head width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.arguments import SCHEMA, flatten_history, restore_history
from rotq_kernels.kv.cpu.attention import packed_attention_cpu
from rotq_kernels.kv.decode.launch import packed_decode, step_tables
from rotq_kernels.kv.decode.sizes import MAX_ROWS
from rotq_kernels.kv.decode.tables import DecodeTables
from rotq_kernels.kv.encode.reference import dequantize_kv_reference
from rotq_kernels.kv.format import KVHistory
from rotq_kernels.kv.prefill.launch import EXACT_WIDTH, packed_prefill
from rotq_kernels.kv.prefill.whole import attend_whole, is_whole
from rotq_kernels.operators import register

DECODE_ROWS = 64
"""Up to here a chunk goes in decode steps, which split the history over the machine; more query
rows share what is unpacked."""

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def packed_attention(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, *, scale: float
) -> Tensor:
    """Attend to packed tokens and dense tokens, in one softmax.

    A query sees keys at positions 0 to its own, with a window only those less than ``window``
    before it.

    Args:
        q_BMTD: fp16, bf16 or fp32, after RoPE; M is a multiple of the KV heads, query head m
            belongs to KV head m // (M / H).
        position_BT: int32, of the queries; those at negative positions give zeros.
        history: What there is to see; head width at most 256.
        scale: Of scores, 1 / sqrt(D) as a rule.

    Returns:
        (B, M, T, D) in the dtype of the query, contiguous; zeros for a query that sees nothing.

    Raises:
        ValueError: shapes or dtypes disagree, or are not supported.
    """
    _check(q_BMTD, history)
    _check_integers(q_BMTD, position_BT, history)
    if history.window < 0:
        raise ValueError(f"window must be 0 (none) or positive, got {history.window}")
    # what the operator would do, without taking the history apart and putting it together
    is_direct = type(q_BMTD) is Tensor and not torch.compiler.is_compiling()
    if not q_BMTD.is_cuda:
        if is_direct and q_BMTD.device.type == "cpu" and not q_BMTD.requires_grad:
            return packed_attention_cpu(q_BMTD, position_BT, history, scale=scale)
        return _op(q_BMTD, position_BT, scale, [], *flatten_history(history))
    tables = step_tables(q_BMTD, history)
    if is_direct:
        return packed_attention_triton(q_BMTD, position_BT, history, scale=scale, tables=tables)
    return _op(q_BMTD, position_BT, scale, tables.flat(), *flatten_history(history))


def packed_attention_reference(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition of ``packed_attention``: dequantize everything, then plain attention.

    ``dtype`` is that of the arithmetic, fp64 for oracles; of the result too.
    """
    start_B, length_B, dense = history.start_B, history.length_B, history.dense
    k_BHND, v_BHND = dequantize_kv_reference(
        history.pages, history.page_table_BJ, length_B, start_B, history.constants, dtype=dtype
    )
    token_N = torch.arange(k_BHND.shape[2], device=k_BHND.device)
    there_BN = token_N < length_B[:, None]
    if history.hidden_B is not None:
        there_BN &= token_N >= history.hidden_B[:, None]
    position_BN = (start_B[:, None] + token_N).where(there_BN, -1)
    if dense is not None:
        k_BHND = torch.cat((k_BHND, dense.k_BHND.to(dtype)), dim=2)
        v_BHND = torch.cat((v_BHND, dense.v_BHND.to(dtype)), dim=2)
        position_BN = torch.cat((position_BN, dense.position_BN), dim=1)
    ahead_BTN = position_BT[:, :, None] - position_BN[:, None]
    seen_BTN = (position_BN[:, None] >= 0) & (ahead_BTN >= 0)
    if history.window:
        seen_BTN &= ahead_BTN < history.window
    group = q_BMTD.shape[1] // k_BHND.shape[1]
    k_BMND, v_BMND = (x.repeat_interleave(group, dim=1) for x in (k_BHND, v_BHND))
    score_BMTN = (q_BMTD.to(dtype) @ k_BMND.mT) * scale
    share_BMTN = score_BMTN.masked_fill(~seen_BTN[:, None], -math.inf).softmax(-1)
    # a row that sees nothing is 0 / 0
    return share_BMTN.nan_to_num(0.0) @ v_BMND


def packed_attention_triton(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    *,
    scale: float,
    splits: int | None = None,
    tables: DecodeTables | None = None,
) -> Tensor:
    """``packed_attention`` by the kernels, unchecked; CPU tensors need TRITON_INTERPRET=1.

    More query rows than a decode tile holds are decode steps if they are few, else a prefill, of a
    long chunk over its history made whole (``prefill.whole``); fp32 queries of heads wider than
    EXACT_WIDTH are decode steps however many there are.
    ``splits`` is the number of programs that share the packed tokens of a KV head in a single
    decode step; the machine's size gives it if it is left out. ``tables`` are those of
    ``step_tables``, made if they are left out.
    """
    group, T = q_BMTD.shape[1] // history.pages.k_codes.shape[1], q_BMTD.shape[2]
    if group * T <= MAX_ROWS:
        options: dict[str, Any] = {"scale": scale, "splits": splits, "tables": tables}
        return packed_decode(q_BMTD, position_BT, history, **options)
    if is_whole(q_BMTD, history):
        return attend_whole(q_BMTD, position_BT, history, scale=scale)
    fits = q_BMTD.dtype != torch.float32 or q_BMTD.shape[3] <= EXACT_WIDTH
    if group * T > DECODE_ROWS and fits:
        return packed_prefill(q_BMTD, position_BT, history, scale=scale)
    steps = [slice(t, t + MAX_ROWS // group) for t in range(0, T, MAX_ROWS // group)]
    parts = [
        packed_decode(q_BMTD[:, :, step], position_BT[:, step], history, scale=scale, tables=tables)
        for step in steps
    ]
    return torch.cat(parts, dim=2)


def _check(q_BMTD: Tensor, history: KVHistory) -> None:
    pages = history.pages
    form, H = pages.format, pages.k_codes.shape[1]
    _, M, _, D = q_BMTD.shape
    if form != history.constants.format:
        raise ValueError(f"pages of {form}, constants of {history.constants.format}")
    if not pages.has_whole_pages:
        raise ValueError("each page must be contiguous")
    if q_BMTD.dtype not in QUERY_DTYPES and q_BMTD.is_cuda:
        raise ValueError(f"queries must be fp16, bf16 or fp32, got {q_BMTD.dtype}")
    if form.head_dim != D or M % H or M // H > MAX_ROWS or D > 256:
        raise ValueError(
            f"queries of {M} heads of width {D} do not fit {H} KV heads of width {form.head_dim}; "
            f"at most {MAX_ROWS} per KV head and width 256"
        )


def _check_integers(q_BMTD: Tensor, position_BT: Tensor, history: KVHistory) -> None:
    """Places and positions, and the dense tokens that they are of."""
    (B, _, T, D), H = q_BMTD.shape, history.pages.k_codes.shape[1]
    dense = history.dense
    shapes = {
        "page_table": (history.page_table_BJ, (B, history.page_table_BJ.shape[-1])),
        "length": (history.length_B, (B,)),
        "start": (history.start_B, (B,)),
        "query_position": (position_BT, (B, T)),
    }
    if history.hidden_B is not None:
        shapes["hidden"] = (history.hidden_B, (B,))
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
    q_BMTD: Tensor, position_BT: Tensor, scale: float, tables: list[Tensor | None], *flat: Any
) -> Tensor:
    held = DecodeTables.restore(tables) if tables else None
    history = restore_history(*flat)
    return packed_attention_triton(q_BMTD, position_BT, history, scale=scale, tables=held)


def _on_cpu(
    q_BMTD: Tensor, position_BT: Tensor, scale: float, tables: list[Tensor | None], *flat: Any
) -> Tensor:
    return packed_attention_cpu(q_BMTD, position_BT, restore_history(*flat), scale=scale)


def _fake(q_BMTD: Tensor, *flat: Any) -> Tensor:
    return torch.empty_like(q_BMTD, memory_format=torch.contiguous_format)


_op = register("packed_attention", SCHEMA, cuda=_on_cuda, cpu=_on_cpu, fake=_fake)
