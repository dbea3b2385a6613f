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
heads, N tokens of a chunk, D head width, E width as stored (see ``kv_levels``), R rotary pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rotq_kernels.kv_format import DenseKV, KVPages, KVTransform, decode_norm
from rotq_kernels.kv_levels import LevelReader, signs

DENSE_CHUNK = 1024
"""Dense tokens that are attended to at a time."""

CHUNK = 6144
"""Packed tokens, of all KV heads together, that are decoded at a time."""

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
    step = max(1, SCORES // (M * DENSE_CHUNK))
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
        self.all_there = seen.numel() == position_T.numel()


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

    def visible(self, position_N: Tensor) -> Tensor:
        """bool (T, N)."""
        position_T1 = self.query.position_T[:, None]
        seen_TN = (position_N >= 0) & (position_N <= position_T1)
        return seen_TN & (position_T1 - position_N < self.window) if self.window else seen_TN

    def visible_span(self, first: int, last: int) -> Tensor | None:
        """``visible`` for all positions from ``first`` to ``last``."""
        query = self.query
        near = not self.window or query.last - first < self.window
        if last <= query.first and near and query.all_there:
            return None
        return self.visible(torch.arange(first, last + 1, dtype=torch.int32))

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
    for n in range(0, dense.k_BHND.shape[2], DENSE_CHUNK):
        chunk = slice(n, n + DENSE_CHUNK)
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
        if length:
            self.keys = LevelReader(transform.key, pages.format.k_bits, pages.format.head_dim)
            self.values = LevelReader(transform.value, pages.format.v_bits, pages.format.head_dim)

    def attend(self, state: _Softmax) -> None:
        """Add all packed tokens to ``state``."""
        if not self.length:
            return
        mean = _MeanScores(state.query, self.transform)
        turned_HMD = state.query.x_HMD @ self.transform.key.inverse_HDD.to(state.query.dtype)
        heads = len(turned_HMD)
        codes_HMD = turned_HMD.new_zeros(*turned_HMD.shape[:2], self.values.width)
        state.codes_HMD = codes_HMD
        step = max(CHUNK // heads // self.pages.format.page_size, 1) * self.pages.format.page_size
        for n in range(0, self.length, step):
            chunk = range(n, min(n + step, self.length))
            first, last = self.start + chunk[0], self.start + chunk[-1]
            if state.hides(first, last):
                continue
            scores_HMN = mean.add_to(self._scores(turned_HMD, chunk), first)
            weights_HMN = state.weigh(scores_HMN, state.visible_span(first, last))
            state.packed_HM1 += weights_HMN.sum(-1, keepdim=True)
            self._add_values(codes_HMD, weights_HMN, chunk)
        state.codes_HMD = self.values.natural(codes_HMD)

    def _scores(self, turned_HMD: Tensor, chunk: range) -> Tensor:
        """Scores without the mean's part."""
        pages, dtype = self.pages, turned_HMD.dtype
        level_HNE = self.keys.read(self._read(pages.k_codes, chunk), dtype)
        scale_H1N = self._norms(pages.k_norm, self.transform.key.base_H, chunk, dtype)
        scores_HMN = torch.bmm(self.keys.stored(turned_HMD), level_HNE.mT).mul_(scale_H1N)
        if pages.k_sign is None:
            return scores_HMN
        transform = self.transform
        sign_HND = signs(self._read(pages.k_sign, chunk), pages.format.head_dim).to(dtype)
        assert transform.residual_scale_H is not None
        weight_H11 = transform.residual_scale_H[:, None, None].to(dtype)
        if pages.format.residual == "sign":
            scale_H1N *= weight_H11
        else:
            assert transform.sketch_DD is not None
            assert transform.gamma_base_H is not None
            turned_HMD = turned_HMD @ transform.sketch_DD.mT.to(dtype) * weight_H11
            scale_H1N = self._norms(pages.k_gamma, transform.gamma_base_H, chunk, dtype)
        return scores_HMN.add_(torch.bmm(turned_HMD, sign_HND.mT).mul_(scale_H1N))

    def _add_values(self, codes_HME: Tensor, weights_HMN: Tensor, chunk: range) -> None:
        pages, dtype = self.pages, codes_HME.dtype
        level_HNE = self.values.read(self._read(pages.v_codes, chunk), dtype)
        weights_HMN *= self._norms(pages.v_norm, self.transform.value.base_H, chunk, dtype)
        codes_HME.baddbmm_(weights_HMN, level_HNE)

    def _norms(
        self, stored: Tensor | None, base_H: Tensor, chunk: range, dtype: torch.dtype
    ) -> Tensor:
        """(H, 1, N), new; (H, 1, 1) where nothing is stored."""
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
        table = _angles(tuple(inv_freq_R.tolist()), -(-N // 1024) * 1024, scores_HMN.dtype)
        return scores_HMN.add_(torch.cat(turned, dim=-1) @ table[:, :N])


@lru_cache(maxsize=4)
def _angles(inv_freq: tuple[float, ...], number: int, dtype: torch.dtype) -> Tensor:
    """(2 R, number): cosines, then sines, of 0, 1, ... times each frequency."""
    step_N = torch.arange(number, dtype=torch.float64)
    angle_RN = torch.tensor(inv_freq, dtype=torch.float64)[:, None] * step_N
    return torch.cat((angle_RN.cos(), angle_RN.sin())).to(dtype)
