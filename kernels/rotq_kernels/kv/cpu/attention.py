"""Attention over packed keys and values on a CPU, never with a dense copy of the cache.

The maths are those of ``kv.format``: the query is turned once per head (x A^-1), codes become small
integers, and what depends on the token only, its norm, multiplies scores and weights. So a chunk
costs one table look-up for four codes, a cast and the product with all query heads of its KV head.

    scores_MN = s_N (x A^-1)_MD L[q]_ND^T + x_MD (R_t mu)_ND^T
    out_MD    = sum_dense p v + (sum_packed p) v_mean + (sum_packed p s_v L_v[q]) A_v^-T

The RoPE mean needs no sine per token: for token j of a tile that begins at position t0 the angle
is that of t0 plus that of j, so the coefficients of cos and sin are turned by t0 once per tile and
meet a constant table over j.

Levels are held for one chunk of tokens at a time. Scores are held for all tokens and for as many
query tokens as fit: a decode step's are smaller than the packed cache. Small operations bound the
speed of a decode step, so what can be done for all tokens at once is.

Shape suffixes: B sequences, M query rows of one KV head (group x tokens), T query tokens, H KV
heads, N tokens, D head width, E width as stored (see ``cpu.levels``), R rotary pairs, J tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rotq_kernels.kv.cpu.decode import decode_native, is_native_step
from rotq_kernels.kv.cpu.levels import level_reader, signs
from rotq_kernels.kv.format import DenseKV, KVConstants, KVHistory, KVPages, decode_norm

CHUNK = 12288
"""Packed tokens, of all KV heads together, whose levels are held at a time."""

SCORES = 1 << 22
"""Scores held at a time, if one query token does not have more; others wait their turn."""

TILE = 256
"""Tokens of a tile of the RoPE mean."""


def packed_attention_cpu(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, *, scale: float
) -> Tensor:
    """``packed_attention`` for CPU tensors: the same arguments, here with M all query heads.

    Computes in fp32, in fp64 for fp64 queries; a first prefill is sdpa's in the query's dtype. A
    query that sees no key gets zeros.
    """
    if is_native_step(q_BMTD, history):
        return decode_native(q_BMTD, position_BT, history, scale=scale)
    pages, dense, window = history.pages, history.dense, history.window
    out_BMTD = torch.zeros_like(q_BMTD, memory_format=torch.contiguous_format)
    lengths, starts = history.length_B.tolist(), history.start_B.tolist()
    hidden = [0] * len(lengths) if history.hidden_B is None else history.hidden_B.tolist()
    packed = _PackedTokens(pages, history.constants) if any(lengths) else None
    for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        position_T = position_BT[b]
        dense_N = history.length_B[:0] if dense is None else dense.position_BN[b]
        if dense is not None and not (length or window) and _is_fresh(dense_N, position_T):
            _attend_fresh(out_BMTD[b], q_BMTD[b], position_T, dense, b, scale)
            continue
        if packed is not None:
            packed.open(history.page_table_BJ[b].tolist(), range(hidden[b], length), start)
        for turn in _turns(q_BMTD.shape[1], position_T, length, dense_N):
            query = _Queries(q_BMTD[b, :, turn], position_T[turn], pages.k_codes.shape[1], scale)
            out_BMTD[b, :, turn] = _attend(query, packed if length else None, dense, b, window)
    return out_BMTD


def _turns(num_heads: int, position_T: Tensor, length: int, dense_N: Tensor) -> Iterator[slice]:
    """Query tokens whose scores are held together."""
    keys = length + len(dense_N)
    step = max(1, SCORES // (num_heads * max(1, keys)))
    for t in range(0, len(position_T), step):
        yield slice(t, t + step)


def _is_fresh(dense_N: Tensor, position_T: Tensor) -> bool:
    """Whether the queries' own are all tokens there are; both may have padding, of their own."""
    return torch.equal(dense_N[dense_N >= 0], position_T[position_T >= 0])


def _attend_fresh(
    out_MTD: Tensor, q_MTD: Tensor, position_T: Tensor, dense: DenseKV, b: int, scale: float
) -> None:
    """Queries that see nothing but each other: causal attention without padding."""
    asking = (position_T >= 0).nonzero().flatten()
    there = (dense.position_BN[b] >= 0).nonzero().flatten()
    held = (dense.k_BHND[b : b + 1], dense.v_BHND[b : b + 1])
    k, v = (x_1HND.index_select(2, there).to(q_MTD.dtype) for x_1HND in held)
    q = q_MTD[None].index_select(2, asking)
    out_1MTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out_MTD.index_copy_(1, asking, out_1MTD[0])


class _Queries:
    """Queries of one sequence, by KV head, scaled."""

    def __init__(self, q_MTD: Tensor, position_T: Tensor, num_heads: int, scale: float) -> None:
        self.dtype = torch.promote_types(q_MTD.dtype, torch.float32)
        self.shape = q_MTD.shape
        self.x_HMD = q_MTD.to(self.dtype).reshape(num_heads, -1, q_MTD.shape[2]) * scale
        self.position_T = position_T
        seen = position_T[position_T >= 0]
        self.first, self.last = (int(seen.min()), int(seen.max())) if seen.numel() else (0, -1)
        self.all_there = seen.numel() == position_T.numel()


def _attend(
    query: _Queries, packed: _PackedTokens | None, dense: DenseKV | None, b: int, window: int
) -> Tensor:
    """One softmax over what there is; (query heads, T, D)."""
    scores, positions = [], []
    span = range(0) if packed is None else packed.span(query, window)
    if packed is not None and span:
        scores.append(packed.scores(query, span))
        positions.append(torch.arange(span.start, span.stop, dtype=torch.int32) + packed.start)
    if dense is not None:
        k_HND, v_HND = dense.k_BHND[b].to(query.dtype), dense.v_BHND[b].to(query.dtype)
        scores.append(query.x_HMD @ k_HND.mT)
        positions.append(dense.position_BN[b])
    if not scores:
        return query.x_HMD.new_zeros(query.shape)
    weights_HMN = _softmax(torch.cat(scores, dim=-1), torch.cat(positions), query, window)
    out_HMD = torch.zeros_like(query.x_HMD)
    split = len(span)
    if dense is not None:
        out_HMD += weights_HMN[..., split:] @ v_HND
    if packed is not None and span:
        out_HMD += packed.values(weights_HMN[..., :split], span)
    return out_HMD.view(query.shape)


def _softmax(scores_HMN: Tensor, position_N: Tensor, query: _Queries, window: int) -> Tensor:
    first, last = position_N.aminmax() if len(position_N) else (-1, -1)
    near = not window or query.last - int(first) < window
    if query.all_there and int(first) >= 0 and int(last) <= query.first and near:
        return scores_HMN.softmax(-1)
    position_T1 = query.position_T[:, None]
    hidden_TN = (position_N < 0) | (position_N > position_T1)
    if window:
        hidden_TN |= position_T1 - position_N >= window
    by_token = scores_HMN.view(scores_HMN.shape[0], -1, *hidden_TN.shape)
    by_token.masked_fill_(hidden_TN, -torch.inf)
    # a query that sees nothing is 0 / 0
    return scores_HMN.softmax(-1).nan_to_num_(0.0)


class _PackedTokens:
    """The packed tokens of one sequence after the other."""

    def __init__(self, pages: KVPages, constants: KVConstants) -> None:
        form = pages.format
        self.pages, self.constants = pages, constants
        self.keys = level_reader(constants.key, form.k_bits, form.head_dim)
        self.levels = level_reader(constants.value, form.v_bits, form.head_dim)

    def open(self, page_J: list[int], tokens: range, start: int) -> None:
        """Go to a sequence: its pages, its tokens that can be seen, the position of token 0."""
        self.page_J, self.tokens, self.start = page_J, tokens, start

    def span(self, query: _Queries, window: int) -> range:
        """Tokens that any of the queries may see."""
        first, end = self.tokens.start, self.tokens.stop
        if window:
            first = max(first, query.first - window + 1 - self.start)
        return range(first, min(end, query.last + 1 - self.start))

    def scores(self, query: _Queries, span: range) -> Tensor:
        """(H, M, N) of the tokens in ``span``."""
        pages, constants, dtype = self.pages, self.constants, query.dtype
        turned_HMD = query.x_HMD @ constants.key.inverse_HDD.to(dtype)
        stored_HME = self.keys.stored(turned_HMD)
        scores_HMN = turned_HMD.new_empty(*turned_HMD.shape[:2], len(span))
        for chunk in self._chunks(span):
            level_HNE = self.keys.read(self._read(pages.k_codes, chunk), dtype)
            at = slice(chunk.start - span.start, chunk.stop - span.start)
            scores_HMN[..., at] = torch.bmm(stored_HME, level_HNE.mT)
        scale_H1N = self._norms(pages.k_norm, constants.key.base_H, span, dtype)
        scores_HMN *= scale_H1N
        if pages.k_sign is not None:
            scores_HMN += self._residual(turned_HMD, scale_H1N, span)
        return _add_mean(scores_HMN, query, constants, self.start + span.start)

    def _residual(self, turned_HMD: Tensor, scale_H1N: Tensor, span: range) -> Tensor:
        """What the sign bits add to scores."""
        pages, constants, dtype = self.pages, self.constants, turned_HMD.dtype
        assert pages.k_sign is not None
        assert constants.residual_scale_H is not None
        if pages.format.residual == "qjl":
            assert constants.sketch_DD is not None
            assert constants.gamma_base_H is not None
            turned_HMD = turned_HMD @ constants.sketch_DD.mT.to(dtype)
            scale_H1N = self._norms(pages.k_gamma, constants.gamma_base_H, span, dtype)
        turned_HMD = turned_HMD * constants.residual_scale_H[:, None, None].to(dtype)
        parts = []
        for chunk in self._chunks(span):
            sign_HND = signs(self._read(pages.k_sign, chunk), pages.format.head_dim)
            parts.append(torch.bmm(turned_HMD, sign_HND.to(dtype).mT))
        return torch.cat(parts, dim=-1).mul_(scale_H1N)

    def values(self, weights_HMN: Tensor, span: range) -> Tensor:
        """(H, M, D): weighted sum of the tokens in ``span``."""
        pages, value, dtype = self.pages, self.constants.value, weights_HMN.dtype
        scaled_HMN = weights_HMN * self._norms(pages.v_norm, value.base_H, span, dtype)
        sums_HME = weights_HMN.new_zeros(*weights_HMN.shape[:2], self.levels.width)
        for chunk in self._chunks(span):
            level_HNE = self.levels.read(self._read(pages.v_codes, chunk), dtype)
            at = slice(chunk.start - span.start, chunk.stop - span.start)
            sums_HME.baddbmm_(scaled_HMN[..., at], level_HNE)
        out_HMD = self.levels.natural(sums_HME) @ value.inverse_HDD.mT.to(dtype)
        mass_HM1 = weights_HMN.sum(-1, keepdim=True)
        return out_HMD.addcmul_(mass_HM1, value.mean_HD[:, None].to(dtype))

    def _chunks(self, span: range) -> Iterator[range]:
        """Tokens in runs of about equal length."""
        number = -(-len(span) // max(1, CHUNK // self.pages.k_codes.shape[1]))
        step = -(-len(span) // max(1, number))
        for n in range(span.start, span.stop, max(1, step)):
            yield range(n, min(n + step, span.stop))

    def _norms(
        self, stored: Tensor | None, base_H: Tensor, span: range, dtype: torch.dtype
    ) -> Tensor:
        """(H, 1, N); (H, 1, 1) where nothing is stored."""
        base_H1 = base_H[:, None].to(dtype)
        if stored is None:
            return base_H1.exp2()[:, None]
        return decode_norm(self._read(stored, span), base_H1).to(dtype)[:, None]

    def _read(self, stored: Tensor, span: range) -> Tensor:
        """Tokens of all heads from their pages: (H, N, ...), contiguous."""
        size = self.pages.format.page_size
        page = self.page_J[span.start // size : -(-span.stop // size)]
        if page and page == list(range(page[0], page[0] + len(page))):
            read = stored[page[0] : page[-1] + 1]
        else:
            read = stored.index_select(0, torch.tensor(page, dtype=torch.int64))
        skip = span.start % size
        return read.transpose(0, 1).flatten(1, 2)[:, skip : skip + len(span)].contiguous()


def _add_mean(scores_HMN: Tensor, query: _Queries, constants: KVConstants, first: int) -> Tensor:
    """Add the scores of the keys' mean at positions from ``first`` on, in place."""
    if constants.mean == "none":
        return scores_HMN
    x_HMD, inv_freq_R = query.x_HMD, constants.inv_freq_R
    H, M, N = scores_HMN.shape
    R = 0 if inv_freq_R is None else len(inv_freq_R)
    parts = [R, R, x_HMD.shape[2] - 2 * R]
    x1, x2, x_rest = x_HMD.split(parts, dim=-1)
    mean1, mean2, rest = constants.key.mean_HD[:, None].to(query.dtype).split(parts, dim=-1)
    scores_HMN += (x_rest * rest).sum(-1, keepdim=True)
    if inv_freq_R is None:
        return scores_HMN
    cosine_HMR = (x1 * mean1 + x2 * mean2) * constants.rotary_scale
    sine_HMR = (x2 * mean1 - x1 * mean2) * constants.rotary_scale
    first_J = torch.arange(first, first + N, TILE, dtype=torch.float64)
    angle_J11R = (first_J[:, None] * inv_freq_R.double())[:, None, None]
    cos_J11R, sin_J11R = angle_J11R.cos().to(query.dtype), angle_J11R.sin().to(query.dtype)
    turned = (
        cosine_HMR * cos_J11R + sine_HMR * sin_J11R,
        sine_HMR * cos_J11R - cosine_HMR * sin_J11R,
    )
    table = _angles(tuple(inv_freq_R.tolist()), query.dtype)
    mean_JHMN = torch.cat(turned, dim=-1) @ table
    return scores_HMN.add_(mean_JHMN.permute(1, 2, 0, 3).reshape(H, M, -1)[..., :N])


@lru_cache(maxsize=4)
def _angles(inv_freq: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(2 R, TILE): cosines, then sines, of 0, 1, ... times each frequency."""
    step_N = torch.arange(TILE, dtype=torch.float64)
    angle_RN = torch.tensor(inv_freq, dtype=torch.float64)[:, None] * step_N
    return torch.cat((angle_RN.cos(), angle_RN.sin())).to(dtype)
