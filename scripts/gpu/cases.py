"""Histories, queries and weights for the check: made on the CPU by seed, then moved.

Shape suffixes: B sequences, M query heads, H KV heads, T tokens, N dense tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from kv_cases import paged_slots, tokens_of, transform_of
from torch import Tensor
from torch.nn import functional as F

from rotq_kernels.kv.attention import packed_attention_reference
from rotq_kernels.kv.encode.launch import encode_kv_triton
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import DenseKV, Extent, KVConstants, KVFormat, KVHistory, KVPages

SINKS = 4


def moved(value: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: moved(item, device) for name, item in held.items()})
    return value


@dataclass(kw_only=True)
class AttentionCase:
    """Fresh queries behind packed tokens and sinks."""

    q_BMTD: Tensor
    position_BT: Tensor
    history: KVHistory
    scale: float

    def oracle(self) -> Tensor:
        """fp64, on the device."""
        given = (self.q_BMTD, self.position_BT, self.history)
        return packed_attention_reference(*given, scale=self.scale, dtype=torch.float64)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (B, H, N, D) in the query's dtype, and which of them each query sees."""
        history, dense, dtype = self.history, self.history.dense, self.q_BMTD.dtype
        assert dense is not None
        k_BHND, v_BHND = dequantize_kv_reference(
            history.pages,
            history.page_table_BJ,
            history.length_B,
            history.start_B,
            history.constants,
        )
        token_N = torch.arange(k_BHND.shape[2], device=k_BHND.device)
        there_BN = token_N < history.length_B[:, None]
        position_BN = (history.start_B[:, None] + token_N).where(there_BN, -1)
        position_BN = torch.cat((position_BN, dense.position_BN), dim=1)
        ahead_BTN = self.position_BT[:, :, None] - position_BN[:, None]
        seen_BTN = (position_BN[:, None] >= 0) & (ahead_BTN >= 0)
        if history.window:
            seen_BTN &= ahead_BTN < history.window
        k_BHND = torch.cat((k_BHND.to(dtype), dense.k_BHND), dim=2)
        return k_BHND, torch.cat((v_BHND.to(dtype), dense.v_BHND), dim=2), seen_BTN[:, None]

    def baseline(self) -> Tensor:
        """torch's attention in the query's dtype over what the codes stand for."""
        k_BHND, v_BHND, seen_B1TN = self.unpacked()
        group = self.q_BMTD.shape[1] // k_BHND.shape[1]
        k_BMND, v_BMND = (x.repeat_interleave(group, dim=1) for x in (k_BHND, v_BHND))
        return F.scaled_dot_product_attention(
            self.q_BMTD, k_BMND, v_BMND, attn_mask=seen_B1TN, scale=self.scale
        ).nan_to_num(0.0)


def attention_case(
    form: KVFormat,
    lengths: list[int],
    device: torch.device,
    *,
    heads: int = 2,
    group: int = 4,
    tokens: int = 1,
    dtype: torch.dtype = torch.float16,
    mean: str = "rope",
    start: int = SINKS,
    window: int = 0,
    poison: bool = True,
    whole: bool = False,
) -> AttentionCase:
    """Packed by the kernel itself (in the interpreter, by its reference), a piece at a time; memory
    that is nobody's is NaN. ``whole`` says what a cache's host does of a sequence alone, so that a
    long chunk goes over its history made whole."""
    constants: KVConstants = moved(transform_of(form, heads, mean=mean), device)
    slot_BT, table_BJ, num_pages = paged_slots(lengths, form.page_size)
    pages = KVPages.empty(form, num_pages, heads, device)
    if poison:
        for tensor in pages.tensors():
            tensor.view(torch.uint8).fill_(255)
    B, D = len(lengths), form.head_dim
    encode = encode_kv_triton if device.type == "cuda" else encode_kv_reference
    for first in range(0, max(lengths), 16384):
        count = min(16384, max(lengths) - first)
        k_BHTD, v_BHTD = tokens_of(constants, B, count, seed=first)
        position_BT = (start + first + torch.arange(count)).expand(B, -1)
        slots = slot_BT[:, first : first + count]
        given = (x.to(device) for x in (k_BHTD, v_BHTD, position_BT, slots))
        encode(*given, constants, pages)
    length_B = torch.tensor(lengths, dtype=torch.int32)
    start_B = torch.full_like(length_B, start)
    fresh_BT = (start_B + length_B)[:, None] + torch.arange(tokens, dtype=torch.int32)
    k_BHND, v_BHND = (x.to(dtype) for x in tokens_of(constants, B, SINKS + tokens, seed=1))
    sink_BN = torch.arange(SINKS, dtype=torch.int32).expand(B, -1)
    dense = DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=torch.cat((sink_BN, fresh_BT), dim=1))
    generator = torch.Generator().manual_seed(2)
    q_BMTD = torch.randn(B, heads * group, tokens, D, generator=generator).to(dtype)
    history = KVHistory(
        pages=pages,
        page_table_BJ=table_BJ.clamp(min=0).to(device),
        length_B=length_B.to(device),
        start_B=start_B.to(device),
        constants=constants,
        dense=moved(dense, device),
        window=window,
        extent=Extent(packed=lengths[0], skipped=0, end=start + lengths[0] + tokens)
        if whole
        else None,
    )
    places = {"q_BMTD": q_BMTD.to(device), "position_BT": fresh_BT.to(device)}
    return AttentionCase(**places, history=history, scale=D**-0.5)


def worst(found: Tensor, exact: Tensor) -> float:
    """The largest error."""
    return float((found.double() - exact.double()).abs().max())
