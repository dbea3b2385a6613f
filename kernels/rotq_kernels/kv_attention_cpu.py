"""Attention over packed keys and values on a CPU: chunk by chunk, never a dense copy of the cache.

The maths are those of ``kv_format``: the query is turned once per head (x A^-1), codes become small
integers, and what depends on the token only, its norm, multiplies scores and weights. So a chunk
costs one table look-up for four codes, a cast and the product with all query heads of its KV head.

    scores_MN = s_N (x A^-1)_MD L[q]_ND^T + x_MD (R_t mu)_ND^T
    out_MD    = sum_dense p v + (sum_packed p) v_mean + (sum_packed p s_v L_v[q]) A_v^-T

The RoPE mean needs no sine per token: for a token j behind the chunk's first position t0 the angle
is that of t0 plus that of j, so the coefficients of cos and sin are turned by t0 once per chunk and
meet a constant table over j. One softmax over all chunks, by running maxima.

Shape suffixes: B sequences, M query rows of one KV head (group x tokens), T query tokens, H KV
heads, N tokens of a chunk, D head width, R rotary pairs, C chunks of 32 codes, W words of a token,
L levels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rotq_kernels.kv_format import (
    TABLE_BITS,
    DenseKV,
    KVPages,
    KVTransform,
    SideTransform,
    decode_norm,
)
from rotq_kernels.layout import unpack_kv

CHUNK = 1024
"""Tokens decoded at a time: codes of a chunk, as fp32, stay in the second-level cache."""

SCORES = 1 << 22
"""Scores held at a time; more query tokens are taken in turns."""

_NOTHING = -1e30
"""Running maximum before anything was seen; finite, so that no difference is undefined."""


def packed_attention_cpu(
    q_BMTD: Tensor,
    pages: KVPages,
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    transform: KVTransform,
    *,
    dense: DenseKV | None = None,
    window: int = 0,
    scale: float,
) -> Tensor:
    """``packed_attention`` for CPU tensors: the same arguments, here with M all query heads.

    Computes in fp32, in fp64 for fp64 queries. A query that sees no key gets zeros.
    """
    B, M, T, _ = q_BMTD.shape
    out_BMTD = torch.empty_like(q_BMTD, memory_format=torch.contiguous_format)
    step = max(1, SCORES // (M * CHUNK))
    for b in range(B):
        packed = _Packed(pages, page_table_BJ[b], int(length_B[b]), int(start_B[b]), transform)
        for t in range(0, T, step):
            turn = slice(t, t + step)
            query = _Queries(q_BMTD[b, :, turn], query_position_BT[b, turn], transform, scale)
            state = _Softmax(query, window)
            if dense is not None:
                _attend_dense(state, dense, b)
            packed.attend(state)
            out_BMTD[b, :, turn] = state.result(transform)
    return out_BMTD


class _Queries:
    """Queries of one sequence, by KV head, scaled."""

    def __init__(
        self, q_MTD: Tensor, position_T: Tensor, transform: KVTransform, scale: float
    ) -> None:
        H = transform.key.base_H.shape[0]
        self.dtype = torch.promote_types(q_MTD.dtype, torch.float32)
        self.shape = q_MTD.shape
        x_HMD = q_MTD.to(self.dtype).reshape(H, -1, q_MTD.shape[2]) * scale
        self.x_HMD = x_HMD
        self.position_T = position_T
        seen = position_T[position_T >= 0]
        self.first, self.last = (int(seen.min()), int(seen.max())) if seen.numel() else (0, -1)


class _Softmax:
    """Running maximum, sum of weights and weighted sums over what was attended to so far."""

    def __init__(self, query: _Queries, window: int) -> None:
        x_HMD = query.x_HMD
        self.query, self.window = query, window
        self.peak_HM1 = x_HMD.new_full((*x_HMD.shape[:2], 1), _NOTHING)
        self.total_HM1 = torch.zeros_like(self.peak_HM1)
        self.packed_HM1 = torch.zeros_like(self.peak_HM1)
        self.dense_HMD = torch.zeros_like(x_HMD)
        self.codes_HMD = torch.zeros_like(x_HMD)

    def hides(self, first: int, last: int) -> bool:
        """No query sees any position between the two."""
        query = self.query
        return first > query.last or bool(self.window and query.first - last >= self.window)

    def visible(self, position_N: Tensor) -> Tensor | None:
        """bool (T, N), or None where every query sees every position."""
        query = self.query
        first, last = int(position_N.min()), int(position_N.max())
        near = not self.window or query.last - first < self.window
        if first >= 0 and last <= query.first and near and bool((query.position_T >= 0).all()):
            return None
        position_T1 = query.position_T[:, None]
        seen_TN = (position_N >= 0) & (position_N <= position_T1)
        return seen_TN & (position_T1 - position_N < self.window) if self.window else seen_TN

    def weigh(self, scores_HMN: Tensor, seen_TN: Tensor | None) -> Tensor:
        """Turn scores into weights relative to the running maximum, in place."""
        if seen_TN is not None:
            by_token = scores_HMN.view(scores_HMN.shape[0], -1, *seen_TN.shape)
            by_token.masked_fill_(~seen_TN, -torch.inf)
        peak_HM1 = torch.maximum(self.peak_HM1, scores_HMN.amax(-1, keepdim=True))
        fade_HM1 = (self.peak_HM1 - peak_HM1).exp_()
        for sums in (self.total_HM1, self.packed_HM1, self.dense_HMD, self.codes_HMD):
            sums *= fade_HM1
        self.peak_HM1 = peak_HM1
        weights_HMN = scores_HMN.sub_(peak_HM1).exp_()
        self.total_HM1 += weights_HMN.sum(-1, keepdim=True)
        return weights_HMN

    def result(self, transform: KVTransform) -> Tensor:
        """(query heads, T, D)."""
        value, dtype = transform.value, self.query.dtype
        out_HMD = self.codes_HMD @ value.inverse_HDD.mT.to(dtype) + self.dense_HMD
        out_HMD += self.packed_HM1 * value.mean_HD[:, None].to(dtype)
        return (out_HMD / self.total_HM1.clamp(min=1e-30)).view(self.query.shape)


def _attend_dense(state: _Softmax, dense: DenseKV, b: int) -> None:
    for n in range(0, dense.k_BHND.shape[2], CHUNK):
        chunk = slice(n, n + CHUNK)
        position_N = dense.position_BN[b, chunk]
        there = position_N[position_N >= 0]
        if not there.numel() or state.hides(int(there.min()), int(there.max())):
            continue
        k_HND = dense.k_BHND[b, :, chunk].to(state.query.dtype)
        weights_HMN = state.weigh(state.query.x_HMD @ k_HND.mT, state.visible(position_N))
        state.dense_HMD.baddbmm_(weights_HMN, dense.v_BHND[b, :, chunk].to(state.query.dtype))


class _Packed:
    """The packed tokens of one sequence."""

    def __init__(
        self, pages: KVPages, page_J: Tensor, length: int, start: int, transform: KVTransform
    ) -> None:
        self.pages, self.transform = pages, transform
        self.page_J: list[int] = page_J.tolist()
        self.length, self.start = length, start

    def attend(self, state: _Softmax) -> None:
        """Add all packed tokens to ``state``."""
        if not self.length:
            return
        mean = _MeanScores(state.query, self.transform)
        turned_HMD = state.query.x_HMD @ self.transform.key.inverse_HDD.to(state.query.dtype)
        step = max(CHUNK, self.pages.format.page_size)
        for n in range(0, self.length, step):
            chunk = range(n, min(n + step, self.length))
            first, last = self.start + chunk[0], self.start + chunk[-1]
            if state.hides(first, last):
                continue
            position_N = torch.arange(first, last + 1, dtype=torch.int32)
            scores_HMN = mean.add_to(self._scores(turned_HMD, chunk), first)
            weights_HMN = state.weigh(scores_HMN, state.visible(position_N))
            state.packed_HM1 += weights_HMN.sum(-1, keepdim=True)
            self._add_values(state, weights_HMN, chunk)

    def _scores(self, turned_HMD: Tensor, chunk: range) -> Tensor:
        """Scores without the mean's part."""
        pages, key, form = self.pages, self.transform.key, self.pages.format
        dtype = turned_HMD.dtype
        level_HND = _levels(self._read(pages.k_codes, chunk), key, form.k_bits, form.head_dim)
        level_HND = level_HND.to(dtype)
        scale_H1N = self._norms(pages.k_norm, key.base_H, chunk, dtype)
        if pages.k_sign is None:
            return (turned_HMD @ level_HND.mT).mul_(scale_H1N)
        sign_HND = _signs(self._read(pages.k_sign, chunk), form.head_dim).to(dtype)
        assert self.transform.residual_scale_H is not None
        weight_H11 = self.transform.residual_scale_H[:, None, None].to(dtype)
        if form.residual == "sign":
            level_HND.addcmul_(sign_HND, weight_H11)
            return (turned_HMD @ level_HND.mT).mul_(scale_H1N)
        assert self.transform.sketch_DD is not None
        assert self.transform.gamma_base_H is not None
        gamma_H1N = self._norms(pages.k_gamma, self.transform.gamma_base_H, chunk, dtype)
        scores_HMN = (turned_HMD @ level_HND.mT).mul_(scale_H1N)
        sketched_HMD = turned_HMD @ self.transform.sketch_DD.mT.to(dtype) * weight_H11
        return scores_HMN.add_((sketched_HMD @ sign_HND.mT).mul_(gamma_H1N))

    def _add_values(self, state: _Softmax, weights_HMN: Tensor, chunk: range) -> None:
        pages, value, form = self.pages, self.transform.value, self.pages.format
        level_HND = _levels(self._read(pages.v_codes, chunk), value, form.v_bits, form.head_dim)
        weights_HMN *= self._norms(pages.v_norm, value.base_H, chunk, weights_HMN.dtype)
        state.codes_HMD.baddbmm_(weights_HMN, level_HND.to(weights_HMN.dtype))

    def _norms(
        self, stored: Tensor | None, base_H: Tensor, chunk: range, dtype: torch.dtype
    ) -> Tensor:
        """(H, 1, N); (H, 1, 1) where nothing is stored."""
        base_H1 = base_H[:, None].to(dtype)
        if stored is None:
            return base_H1.exp2()[..., None]
        return decode_norm(self._read(stored, chunk), base_H1).to(dtype)[:, None]

    def _read(self, stored: Tensor, chunk: range) -> Tensor:
        """Tokens of all heads from their pages: (H, N, ...), contiguous."""
        size = self.pages.format.page_size
        page = self.page_J[chunk[0] // size : chunk[-1] // size + 1]
        if page[-1] - page[0] == len(page) - 1 and page == list(range(page[0], page[-1] + 1)):
            read = stored[page[0] : page[-1] + 1]
        else:
            read = stored.index_select(0, torch.tensor(page))
        return read.transpose(0, 1).flatten(1, 2)[:, : len(chunk)].contiguous()


class _MeanScores:
    """The scores of the keys' mean at each position."""

    def __init__(self, query: _Queries, transform: KVTransform) -> None:
        x_HMD = query.x_HMD
        self.transform = transform
        self.rest_HM1 = x_HMD.new_zeros(*x_HMD.shape[:2], 1)
        if transform.mean == "none":
            return
        mean_H1D = transform.key.mean_HD[:, None].to(x_HMD.dtype)
        R = 0 if transform.inv_freq_R is None else transform.inv_freq_R.shape[0]
        x1, x2, x_rest = x_HMD.split([R, R, x_HMD.shape[2] - 2 * R], dim=-1)
        mean1, mean2, mean_rest = mean_H1D.split([R, R, x_HMD.shape[2] - 2 * R], dim=-1)
        self.cosine_HMR = (x1 * mean1 + x2 * mean2) * transform.rotary_scale
        self.sine_HMR = (x2 * mean1 - x1 * mean2) * transform.rotary_scale
        self.rest_HM1 = (x_rest * mean_rest).sum(-1, keepdim=True)

    def add_to(self, scores_HMN: Tensor, first: int) -> Tensor:
        """Add the part of tokens at positions from ``first`` on, in place."""
        inv_freq_R = self.transform.inv_freq_R
        if self.transform.mean == "none":
            return scores_HMN
        scores_HMN += self.rest_HM1
        if inv_freq_R is None:
            return scores_HMN
        angle_R = first * inv_freq_R.double()
        cos_R, sin_R = angle_R.cos().to(scores_HMN.dtype), angle_R.sin().to(scores_HMN.dtype)
        turned = (
            self.cosine_HMR * cos_R + self.sine_HMR * sin_R,
            self.sine_HMR * cos_R - self.cosine_HMR * sin_R,
        )
        N = scores_HMN.shape[2]
        table = _angles(tuple(inv_freq_R.tolist()), max(N, CHUNK), scores_HMN.dtype)
        return scores_HMN.add_(torch.cat(turned, dim=-1) @ table[:, :N])


@lru_cache(maxsize=4)
def _angles(inv_freq: tuple[float, ...], number: int, dtype: torch.dtype) -> Tensor:
    """(2 R, number): cosines, then sines, of 0, 1, ... times each frequency."""
    step_N = torch.arange(number, dtype=torch.float64)
    angle_RN = torch.tensor(inv_freq, dtype=torch.float64)[:, None] * step_N
    return torch.cat((angle_RN.cos(), angle_RN.sin())).to(dtype)


def _levels(words_HNW: Tensor, side: SideTransform, bits: int, head_dim: int) -> Tensor:
    """L[q] of every code: int8 (H, N, D), or fp32 where levels are no table."""
    if bits == 8:
        return words_HNW.view(torch.uint8)[..., :head_dim] - 127.5
    if bits > TABLE_BITS:
        return unpack_kv(words_HNW, bits, head_dim) - (2**bits - 1) / 2
    index_HNK = _nibbles(words_HNW, bits).view(torch.uint16).to(torch.int32)
    levels_HL = side.levels_HL
    if bool((levels_HL == levels_HL[:1]).all()):
        table = _table(levels_HL[0], bits)
        found = table.index_select(0, index_HNK.flatten())
    else:
        each = zip(levels_HL, index_HNK, strict=True)
        found = torch.cat([_table(row, bits).index_select(0, i.flatten()) for row, i in each])
    return found.view(torch.int8).view(*words_HNW.shape[:2], -1)[..., :head_dim]


def _nibbles(words_HNW: Tensor, bits: int) -> Tensor:
    """Words whose 16-bit halves hold four codes of 3 or 4 bits, or eight of 2, in order.

    Three words of 3-bit codes become four: the fourth gathers what the spare bits hold.
    """
    if bits != 3:
        return words_HNW
    words_HNC3 = words_HNW.unflatten(-1, (-1, 3))
    first, second, third = words_HNC3.unbind(-1)
    spare = (first >> 3) & 0x11111111
    spare |= (second >> 2) & 0x22222222
    spare |= (third >> 1) & 0x44444444
    return torch.cat((words_HNC3, spare[..., None]), dim=-1).flatten(-2)


def _table(levels_L: Tensor, bits: int) -> Tensor:
    """What 16 bits of codes stand for: 65536 int32 of four int8, or int64 of eight for 2 bits."""
    width = 2 if bits == 2 else 4
    entry = torch.arange(2**width) & (2**bits - 1)
    table = levels_L[entry].to(torch.int64) & 255
    while width < 16:
        table = (
            table[None, :] | (table[:, None] << 8 * (width // (2 if bits == 2 else 4)))
        ).flatten()
        width *= 2
    return table if bits == 2 else table.to(torch.int32)


def _signs(words_HNC: Tensor, head_dim: int) -> Tensor:
    """int8 (H, N, D): +1 where the bit is 1, else -1."""
    index = words_HNC.view(torch.uint8).to(torch.int32)
    found = _sign_table().index_select(0, index.flatten())
    return found.view(torch.int8).view(*words_HNC.shape[:2], -1)[..., :head_dim]


def _sign_table() -> Tensor:
    """What 8 bits of signs stand for: 256 int64 of eight int8."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (2 * bits - 1).to(torch.int8).view(torch.int64).flatten()
