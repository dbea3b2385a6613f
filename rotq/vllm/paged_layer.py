"""Attention of one layer over packed blocks, and the coding of what is new.

Shape suffixes: N new tokens of a batch, M query heads, H KV heads, D head width, R requests, J
blocks of a request; in a pass B requests of T tokens each, K sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.norm_range import NormReach, outgrown
from rotq.ops import DenseKV, KVConstants, KVFormat, KVHistory, encode_kv, packed_attention
from rotq.vllm.blocks import Blocks
from rotq.vllm.passes import Request, batches

_OUTGROWN = (
    "a token's keys or values are not finite, or hundreds of times larger than the first ones that "
    "were packed, and than calibration has seen; the packed cache cannot hold their norms"
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Where the new tokens of a batch belong."""

    requests: Sequence[Request]
    table_RJ: Tensor
    """int32, on the device of the blocks."""


class PagedLayer:
    """One layer.

    Args:
        constants: Of the heads that are here, on the device of the blocks.
        block_size: Tokens of a block.
        sinks: First tokens of a sequence that are kept whole.
        window: Keys that a query sees, itself included; 0 for all.
        scale: Of scores.
    """

    def __init__(
        self, constants: KVConstants, block_size: int, *, sinks: int, window: int, scale: float
    ) -> None:
        form = replace(constants.format, page_size=block_size)
        self.reach = NormReach(replace(constants, format=form))
        self.sinks, self.window, self.scale = sinks, window, scale

    @property
    def format(self) -> KVFormat:
        """As stored, with the block's tokens as ``page_size``."""
        return self.reach.constants.format

    def attend(
        self,
        q_NMD: Tensor,
        k_NHD: Tensor,
        v_NHD: Tensor,
        batch: Batch,
        blocks: Blocks,
        out_NMD: Tensor,
    ) -> None:
        """Attention of new tokens, pass by pass, into ``out_NMD``; they are stored in ``blocks``.

        Raises:
            RotqError: a norm does not fit.
        """
        for requests in batches(batch.requests, blocks.pages.format.page_size):
            fresh = _Fresh.of(requests, batch.table_RJ)
            q, k, v = (fresh.tokens(x) for x in (q_NMD, k_NHD, v_NHD))
            history = self._history(fresh, k, v, blocks)
            out_BMTD = packed_attention(q, fresh.position_BT, history, scale=self.scale)
            fresh.put(out_BMTD, out_NMD)
            self._store(fresh, k, v, blocks)

    def _history(self, fresh: _Fresh, k: Tensor, v: Tensor, blocks: Blocks) -> KVHistory:
        """What is packed, and the sinks and new tokens, which are whole."""
        before_B, hidden_B = fresh.before_B, None
        position_BN = fresh.position_BT
        if self.sinks and fresh.is_continued:
            hidden_B = torch.full_like(before_B, self.sinks)
            sink_K = torch.arange(self.sinks, dtype=torch.int32, device=before_B.device)
            sink_BK = sink_K.where(sink_K < before_B[:, None], -1)
            position_BN = torch.cat((sink_BK, position_BN), dim=1)
            whole_B2HKD = blocks.whole_P2HND[fresh.table_BJ[:, 0].long()].to(k.dtype)
            k, v = (torch.cat((whole_B2HKD[:, n], x), dim=2) for n, x in enumerate((k, v)))
        return KVHistory(
            pages=blocks.pages,
            page_table_BJ=fresh.table_BJ,
            length_B=before_B,
            start_B=torch.zeros_like(before_B),
            hidden_B=hidden_B,
            constants=self.reach.constants,
            dense=DenseKV(k_BHND=k, v_BHND=v, position_BN=position_BN),
            window=self.window,
        )

    def _store(self, fresh: _Fresh, k: Tensor, v: Tensor, blocks: Blocks) -> None:
        """Code new tokens at their places; the first ones of a sequence are kept whole instead."""
        size, position_BT = blocks.pages.format.page_size, fresh.position_BT.long()
        if fresh.first < self.sinks:
            self._keep_sinks(fresh, k, v, blocks)
        if fresh.last < self.sinks:
            return
        page_BT = fresh.table_BJ.gather(1, position_BT // size).long()
        is_packed_BT = position_BT >= self.sinks
        slot_BT = (page_BT * size + position_BT % size).where(is_packed_BT, -1)
        self.reach.settle(k, v, position_BT, is_packed_BT)
        encode_kv(k, v, position_BT, slot_BT, self.reach.constants, blocks.pages)
        self._check_norms(slot_BT, blocks)

    def _keep_sinks(self, fresh: _Fresh, k: Tensor, v: Tensor, blocks: Blocks) -> None:
        b, t = (fresh.position_BT < self.sinks).nonzero(as_tuple=True)
        block, place = fresh.table_BJ[b, 0].long(), fresh.position_BT[b, t].long()
        for n, x in enumerate((k, v)):
            blocks.whole_P2HND[block, n, :, place] = x[b, :, t].to(blocks.whole_P2HND.dtype)

    def _check_norms(self, slot_BT: Tensor, blocks: Blocks) -> None:
        pages, is_there = blocks.pages, slot_BT >= 0
        at, size = slot_BT.clamp(min=0), blocks.pages.format.page_size
        # [B, T, H] -> [B, H, T]
        flags = [
            outgrown(norm[at // size, :, at % size].transpose(1, 2), is_there)
            for norm in (pages.k_norm, pages.v_norm, pages.k_gamma)
            if norm is not None
        ]
        if not flags:
            return
        flag = torch.stack(flags).any()
        if flag.device.type != "cpu":
            # without waiting for the device
            torch._assert_async(~flag, _OUTGROWN)
        elif flag:
            raise RotqError(_OUTGROWN)


@dataclass(frozen=True, kw_only=True)
class _Fresh:
    """The tokens of one pass, and where they are in the batch and in their sequences."""

    row_BT: Tensor | slice
    """Rows of the batch; a slice where one request has them all."""
    shape: tuple[int, int]
    """B and T."""
    table_BJ: Tensor
    before_B: Tensor
    """int32."""
    position_BT: Tensor
    """int32."""
    first: int
    """The lowest position."""
    last: int
    """The highest one."""
    is_continued: bool
    """Whether any of the sequences has older tokens."""

    @classmethod
    def of(cls, requests: Sequence[Request], table_RJ: Tensor) -> _Fresh:
        B, T, device = len(requests), requests[0].count, table_RJ.device
        before = [request.before for request in requests]
        before_B = torch.tensor(before, dtype=torch.int32, device=device)
        step_T = torch.arange(T, dtype=torch.int32, device=device)
        first = [request.first for request in requests]
        rows: Tensor | slice = slice(first[0], first[0] + T)
        if B > 1:
            rows = torch.tensor(first, device=device)[:, None] + torch.arange(T, device=device)
        table_row = torch.tensor([request.row for request in requests], device=device)
        return cls(
            row_BT=rows,
            shape=(B, T),
            table_BJ=table_RJ[table_row].contiguous(),
            before_B=before_B,
            position_BT=before_B[:, None] + step_T,
            first=min(before),
            last=max(before) + T - 1,
            is_continued=max(before) > 0,
        )

    def tokens(self, x_NHD: Tensor) -> Tensor:
        """Of the pass: (B, H, T, D)."""
        return x_NHD[self.row_BT].view(*self.shape, *x_NHD.shape[1:]).transpose(1, 2)

    def put(self, out_BMTD: Tensor, out_NMD: Tensor) -> None:
        """The inverse of ``tokens``."""
        rows = out_BMTD.transpose(1, 2)
        out_NMD[self.row_BT] = rows[0] if isinstance(self.row_BT, slice) else rows
