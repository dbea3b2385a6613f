"""A decode step, one query token of each sequence, by native code for CPUs (``native``).

The maths are those of ``attention``; here all sequences go together, in two native calls around
torch's softmax, because a step's small operations take longer than its products. Threads share the
KV heads of all sequences.

Shape suffixes: B sequences, M query rows of one KV head, H KV heads, N tokens that are seen, dense
ones first, D head width, P pages, S tokens of a page, J pages of a sequence, R rotary pairs, L
entries of a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotq_kernels.kv.format import (
    TABLE_BITS,
    DenseKV,
    KVHistory,
    KVPages,
    SideConstants,
)
from rotq_kernels.launching import is_native
from rotq_kernels.sharing import share

BITS = (2, 3, 4, 8)
"""Widths of codes with native code."""

ROWS = 16
"""Query rows of one KV head up to which native code is faster than products with dense levels."""

WHOLE = 64
"""Scores of a query are a multiple of so many, those beyond its own at -inf: in whole vectors
torch's softmax adds them lane by lane, so that a sequence's bits are the same in any company."""

SCORES = 1 << 24
"""Scores held at a time, if one sequence does not have more; others wait their turn."""

SHARED = 1 << 14
"""Packed tokens, of all KV heads together, from which on threads share them."""


def is_native_step(q_BMTD: Tensor, history: KVHistory) -> bool:
    """Whether ``decode_native`` takes these queries."""
    form = history.pages.format
    return (
        is_native()
        and q_BMTD.shape[2] == 1
        and q_BMTD.dtype != torch.float64
        and q_BMTD.shape[1] // history.pages.k_codes.shape[1] <= ROWS
        and form.k_bits in BITS
        and form.v_bits in BITS
        and form.residual == "none"
        and form.norm != "float16"
    )


def decode_native(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, *, scale: float
) -> Tensor:
    """``packed_attention`` of one query token of each sequence, in fp32."""
    B, heads, _, D = q_BMTD.shape
    H = history.pages.k_codes.shape[1]
    x_BHMD = (q_BMTD[:, :, 0].float() * scale).view(B, H, heads // H, D)
    out_BHMD = torch.empty_like(x_BHMD)
    step = _Step(history, position_BT[:, 0])
    longest = step.places.num_dense + step.places.longest
    turn = max(1, SCORES // (heads * max(1, longest)))
    for b in range(0, B, turn):
        part = slice(b, b + turn)
        out_BHMD[part] = step.attend(x_BHMD[part], part)
    return out_BHMD.view(B, heads, 1, D).to(q_BMTD.dtype)


class _Places:
    """What one token of each sequence sees, and where: the same for all layers of one window."""

    def __init__(self, history: KVHistory, position_B: Tensor) -> None:
        dense = history.dense
        self.num_dense = 0 if dense is None else dense.k_BHND.shape[2]
        first_B, end_B = _spans(history, position_B.numpy().astype(np.int64))
        self.num_packed_B = end_B - first_B
        self.longest = int(self.num_packed_B.max(initial=0))
        self.span_B2 = np.stack((first_B, end_B), axis=1)
        self.page_BJ, self.start_B = history.page_table_BJ.numpy(), history.start_B.numpy()
        self.unseen_B11N = None if dense is None else ~_seen(dense, position_B, history.window)

    @classmethod
    def of(cls, history: KVHistory, position_B: Tensor) -> _Places:
        """From another layer of the same pass, if it has been there."""
        known = {} if history.worked_out is None else history.worked_out
        if history.window not in known:
            known[history.window] = cls(history, position_B)
        found: _Places = known[history.window]
        return found


class _Step:
    """One token of each sequence in one layer."""

    def __init__(self, history: KVHistory, position_B: Tensor) -> None:
        self.history, self.places = history, _Places.of(history, position_B)

    def attend(self, x_BHMD: Tensor, part: slice) -> Tensor:
        """(B, H, M, D) of the sequences in ``part``.

        Args:
            x_BHMD: fp32 queries of these, scaled.
        """
        B, H, M, _ = x_BHMD.shape
        places, num_dense = self.places, self.places.num_dense
        num_packed = int(places.num_packed_B[part].max(initial=0))
        width = -(-(num_dense + num_packed) // WHOLE) * WHOLE
        score_BHMN = torch.full((B, H, M, width), -torch.inf)
        dense = self.history.dense
        if dense is not None:
            k_BHND, v_BHND = dense.k_BHND[part].float(), dense.v_BHND[part].float()
            assert places.unseen_B11N is not None
            whole_BHMN = score_BHMN[..., :num_dense]
            torch.matmul(x_BHMD, k_BHND.mT, out=whole_BHMN)
            whole_BHMN.masked_fill_(places.unseen_B11N[part], -torch.inf)
        if num_packed:
            self._scores(x_BHMD, part, score_BHMN)
        # a query that sees nothing is 0 / 0
        weight_BHMN = score_BHMN.softmax(-1).nan_to_num_(0.0)
        if dense is None:
            out_BHMD = torch.zeros_like(x_BHMD)
        else:
            out_BHMD = weight_BHMN[..., :num_dense].contiguous() @ v_BHND
        if num_packed:
            self._add_values(weight_BHMN, part, out_BHMD)
        return out_BHMD

    def _scores(self, x_BHMD: Tensor, part: slice, score_BHMN: Tensor) -> None:
        pages, constants = self.history.pages, self.history.constants
        (_, _, M, D), size = x_BHMD.shape, pages.format.page_size
        freq_R = _no_pairs() if constants.inv_freq_R is None else constants.inv_freq_R
        if constants.mean != "rope":
            freq_R = _no_pairs()
        run = _native().compiled_scores(pages.format.k_bits, M, -(-D // 32) * 8, size)
        arguments = (
            x_BHMD.contiguous().numpy(),
            *_codes(pages, "k", constants.key),
            self.places.page_BJ[part],
            self.places.span_B2[part],
            self.places.start_B[part],
            constants.key.inverse_HDD.numpy(),
            constants.key.mean_HD.numpy(),
            freq_R.double().numpy(),
            np.float32(constants.rotary_scale),
            _page_angles(tuple(freq_R.tolist()), size),
            self.places.num_dense,
            score_BHMN.numpy(),
        )
        self._share(run, arguments, part)

    def _add_values(self, weight_BHMN: Tensor, part: slice, out_BHMD: Tensor) -> None:
        pages, value = self.history.pages, self.history.constants.value
        (_, _, M, D), form = out_BHMD.shape, pages.format
        run = _native().compiled_values(form.v_bits, M, -(-D // 32) * 8, form.page_size)
        arguments = (
            weight_BHMN.numpy(),
            *_codes(pages, "v", value),
            self.places.page_BJ[part],
            self.places.span_B2[part],
            value.inverse_HDD.numpy(),
            value.mean_HD.numpy(),
            self.places.num_dense,
            out_BHMD.numpy(),
        )
        self._share(run, arguments, part)

    def _share(self, run: Callable[..., None], arguments: tuple[Any, ...], part: slice) -> None:
        H, num_packed_B = self.history.pages.k_codes.shape[1], self.places.num_packed_B[part]
        many = H * int(num_packed_B.sum()) >= SHARED
        share(run, len(num_packed_B) * H, *arguments, worth_it=many)


def _native() -> Any:
    from rotq_kernels.kv.cpu import native  # imports numba, which is optional

    return native


def _seen(dense: DenseKV, position_B: Tensor, window: int) -> Tensor:
    """bool (B, 1, 1, N): whether a query sees each whole token."""
    key_BN, query_B1 = dense.position_BN, position_B[:, None]
    seen_BN = (key_BN >= 0) & (key_BN <= query_B1)
    if window:
        seen_BN &= query_B1 - key_BN < window
    return seen_BN[:, None, None]


def _spans(history: KVHistory, position_B: Any) -> tuple[Any, Any]:
    """First packed token that each query sees, and the one behind the last; none for padding."""
    start_B = history.start_B.numpy().astype(np.int64)
    end_B = np.minimum(history.length_B.numpy(), position_B + 1 - start_B)
    first_B = np.zeros_like(end_B)
    if history.hidden_B is not None:
        first_B = np.maximum(first_B, history.hidden_B.numpy())
    if history.window:
        first_B = np.maximum(first_B, position_B - history.window + 1 - start_B)
    end_B = np.where(position_B < 0, first_B, end_B)
    return first_B, np.maximum(first_B, end_B)


def _codes(pages: KVPages, side: str, constants: SideConstants) -> tuple[Any, Any, Any, Any]:
    """Words, norms, the exponent of a norm's code 0, and what codes stand for."""
    words, norms, bits = (
        (pages.k_codes, pages.k_norm, pages.format.k_bits)
        if side == "k"
        else (pages.v_codes, pages.v_norm, pages.format.v_bits)
    )
    norm = np.zeros((0, 0, 0), np.uint8) if norms is None else norms.numpy()
    levels = tuple(map(tuple, constants.levels_HL.tolist())) if bits <= TABLE_BITS else ()
    table = _quads(levels[:1] if len(set(levels)) == 1 else levels, bits)
    return words.numpy().view(np.uint32), norm, constants.base_H.numpy(), table


@functools.lru_cache(maxsize=16)
def _quads(levels: tuple[tuple[int, ...], ...], bits: int) -> Any:
    """int32 (H, L): four int8 levels for each index; 8 bits need no table.

    An index is 16 bits of packed codes, of 2 bits 8; bit 3 of a 3-bit code's nibble is another's.
    """
    if bits > TABLE_BITS:
        return np.zeros((1, 1), np.int32)
    level_HL = np.array(levels, np.int8)
    width = 2 if bits == 2 else 4
    index_L = np.arange(1 << (4 * width))
    code_L4 = (index_L[:, None] >> (width * np.arange(4))) & ((1 << bits) - 1)
    return np.ascontiguousarray(level_HL[:, code_L4]).view(np.int32)[..., 0]


@functools.lru_cache(maxsize=8)
def _page_angles(inv_freq: tuple[float, ...], size: int) -> Any:
    """fp32 (2 R, S): cosines, then sines, of 0, 1, ... times each frequency."""
    angle_RS = np.array(inv_freq, np.float64)[:, None] * np.arange(size)
    return np.concatenate((np.cos(angle_RS), np.sin(angle_RS))).astype(np.float32)


def _no_pairs() -> Tensor:
    return torch.zeros(0)
