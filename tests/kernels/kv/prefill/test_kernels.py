"""packed_prefill against the reference in fp64, at no more than twice PyTorch's error.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import Mock

import pytest
import torch
from kernel_device import attend_by_kernel
from kv_cases import paged_slots, tokens_of, transform_of
from torch import Tensor

from rotq_kernels.kv.attention import (
    DECODE_ROWS,
    packed_attention_reference,
    packed_attention_triton,
)
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import DenseKV, KVFormat, KVHistory, KVPages
from rotq_kernels.kv.prefill.launch import packed_prefill

SINKS = 4
HEADS = 2


@dataclass(kw_only=True)
class Case:
    """A chunk of T queries after ragged histories, each behind SINKS dense tokens."""

    q_BMTD: Tensor
    position_BT: Tensor
    history: KVHistory
    scale: float

    def with_history(self, **changes: object) -> Case:
        """Another history, otherwise the same."""
        return replace(self, history=replace(self.history, **changes))  # type: ignore[arg-type]


def make_case(
    form: KVFormat,
    *,
    lengths: tuple[int, ...] = (21, 0, 37),
    T: int = 24,
    group: int = 1,
    dtype: torch.dtype = torch.float16,
    mean: str = "rope",
    window: int = 0,
    rotary_pairs: int | None = None,
) -> Case:
    """Random tokens; the last sequence's chunk is short, its last queries are at -1."""
    transform = transform_of(form, HEADS, mean=mean, rotary_pairs=rotary_pairs)
    B, D = len(lengths), form.head_dim
    k_BHTD, v_BHTD = tokens_of(transform, B, max(*lengths, 1))
    length_B = torch.tensor(lengths, dtype=torch.int32)
    start_B = torch.full((B,), SINKS, dtype=torch.int32)
    slot_BT, table_BJ, num_pages = paged_slots([*lengths], form.page_size)
    pages = KVPages.empty(form, num_pages, HEADS)
    position_BT = SINKS + torch.arange(k_BHTD.shape[2]).expand(B, -1)
    slot_BT = torch.nn.functional.pad(slot_BT, (0, k_BHTD.shape[2] - slot_BT.shape[1]), value=-1)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)

    generator = torch.Generator().manual_seed(3)
    chunk_BT = SINKS + length_B[:, None] + torch.arange(T, dtype=torch.int32)
    chunk_BT[-1, -5:] = -1
    dense_BHND = torch.randn(2, B, HEADS, SINKS + T, D, generator=generator).to(dtype)
    sink_BN = torch.arange(SINKS, dtype=torch.int32).expand(B, -1)
    dense_position_BN = torch.cat((sink_BN, chunk_BT), dim=1)
    # what is at no position must not be touched
    dense_BHND[:, -1, :, -5:] = torch.nan
    return Case(
        q_BMTD=torch.randn(B, HEADS * group, T, D, generator=generator).to(dtype),
        position_BT=chunk_BT,
        history=KVHistory(
            pages=pages,
            page_table_BJ=table_BJ,
            length_B=length_B,
            start_B=start_B,
            constants=transform,
            dense=DenseKV(
                k_BHND=dense_BHND[0], v_BHND=dense_BHND[1], position_BN=dense_position_BN
            ),
            window=window,
        ),
        scale=D**-0.5,
    )


def without_poison(case: Case) -> Case:
    """The reference multiplies what no query sees by zero, which NaN is not."""
    dense = case.history.dense
    if dense is None:
        return case
    clean = replace(dense, k_BHND=dense.k_BHND.nan_to_num(), v_BHND=dense.v_BHND.nan_to_num())
    return case.with_history(dense=clean)


def plain_attention(case: Case) -> Tensor:
    """The baseline: keys and values dequantized and stored in the query's dtype."""
    dtype, history = case.q_BMTD.dtype, case.history
    start_B, length_B, dense = history.start_B, history.length_B, history.dense
    k_BHND, v_BHND = dequantize_kv_reference(
        history.pages, history.page_table_BJ, length_B, start_B, history.constants
    )
    token_N = torch.arange(k_BHND.shape[2])
    position_BN = (start_B[:, None] + token_N).where(token_N < length_B[:, None], -1)
    k_BHND, v_BHND = k_BHND.to(dtype), v_BHND.to(dtype)
    if dense is not None:
        k_BHND = torch.cat((k_BHND, dense.k_BHND), dim=2)
        v_BHND = torch.cat((v_BHND, dense.v_BHND), dim=2)
        position_BN = torch.cat((position_BN, dense.position_BN), dim=1)
    ahead_BTN = case.position_BT[:, :, None] - position_BN[:, None]
    seen_BTN = (position_BN[:, None] >= 0) & (ahead_BTN >= 0)
    if history.window:
        seen_BTN &= ahead_BTN < history.window
    group = case.q_BMTD.shape[1] // HEADS
    k_BMND, v_BMND = (x.repeat_interleave(group, dim=1) for x in (k_BHND, v_BHND))
    score_BMTN = (case.q_BMTD @ k_BMND.mT) * case.scale
    share_BMTN = score_BMTN.masked_fill(~seen_BTN[:, None], -torch.inf).softmax(-1)
    return share_BMTN.nan_to_num(0.0) @ v_BMND


def run(case: Case) -> Tensor:
    given = (case.q_BMTD, case.position_BT, case.history)
    return attend_by_kernel(*given, by=packed_prefill, scale=case.scale)


def check(case: Case) -> Tensor:
    """Twice PyTorch's worst error at most; returns the output."""
    actual = run(case)
    assert (actual.dtype, actual.shape) == (case.q_BMTD.dtype, case.q_BMTD.shape)
    clean = without_poison(case)
    oracle = packed_attention_reference(
        clean.q_BMTD, clean.position_BT, clean.history, scale=clean.scale, dtype=torch.float64
    )
    ours, theirs = (
        (out.double() - oracle).abs().max().item() for out in (actual, plain_attention(clean))
    )
    assert ours <= 2 * theirs + 1e-6, f"max error {ours:.3e}; the baseline's is {theirs:.3e}"
    return actual


FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k3v3 large pages": KVFormat(head_dim=128, k_bits=3, v_bits=3, page_size=64),
    "k8v2 float16": KVFormat(head_dim=80, k_bits=8, v_bits=2, page_size=16, norm="float16"),
    "k4v5 sign": KVFormat(head_dim=40, k_bits=4, v_bits=5, page_size=32, residual="sign"),
    "k2v6 qjl": KVFormat(head_dim=96, k_bits=2, v_bits=6, page_size=16, residual="qjl"),
    "k7v4 none": KVFormat(head_dim=64, k_bits=7, v_bits=4, page_size=16, norm="none"),
    "k6v8 none sign": KVFormat(
        head_dim=64, k_bits=6, v_bits=8, page_size=16, norm="none", residual="sign"
    ),
    "k5v7 wide": KVFormat(head_dim=256, k_bits=5, v_bits=7, page_size=16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    check(make_case(FORMATS[name]))


@pytest.mark.parametrize("name", ["k4v5 sign", "k2v6 qjl", "k5v7 wide"])
def test_formats_in_fp32(name: str) -> None:
    """Where tiles or residuals differ from those of ``k3v3``, which other tests have in fp32."""
    check(make_case(FORMATS[name], dtype=torch.float32))


@pytest.mark.parametrize("mean", ["none", "static", "rope"])
def test_means(mean: str) -> None:
    check(make_case(FORMATS["k3v3"], mean=mean, dtype=torch.bfloat16))


def test_partial_rope() -> None:
    check(make_case(FORMATS["k3v3"], rotary_pairs=10))


@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        *((window, torch.float16) for window in (1, 7, 33, 200)),
        (1, torch.float32),
        (33, torch.float32),
    ],
    ids=str,
)
def test_windows(window: int, dtype: torch.dtype) -> None:
    """Over rows that see packed tokens only in part or not at all, and sinks that are gone."""
    check(make_case(FORMATS["k3v3"], window=window, dtype=dtype))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_query_groups(group: int) -> None:
    """Rows of one program that belong to several heads, and more rows than one program takes."""
    check(make_case(FORMATS["k3v3"], group=group, T=45, lengths=(70,)))


def test_far_positions() -> None:
    """Angles of thousands of tokens before the chunk."""
    case = make_case(FORMATS["k3v3"], dtype=torch.float32)
    start_B, dense = case.history.start_B, case.history.dense
    moved = torch.full_like(start_B, 100_000)
    assert dense is not None
    position_BN = dense.position_BN
    far_BN = torch.where(position_BN >= SINKS, position_BN + moved[:, None], position_BN)
    far = case.with_history(start_B=start_B + moved, dense=replace(dense, position_BN=far_BN))
    query_BT = case.position_BT
    check(replace(far, position_BT=torch.where(query_BT >= 0, query_BT + moved[:, None], query_BT)))


def test_a_dense_token_alone_in_its_tile() -> None:
    """Only the last query sees it, and the tile must not be skipped."""
    check(make_case(FORMATS["k3v3"], lengths=(9, 3), T=33 - SINKS, dtype=torch.float32))


def test_no_dense_tokens() -> None:
    out = check(make_case(FORMATS["k3v3"], lengths=(30, 0)).with_history(dense=None))
    assert out[1].eq(0).all()


def test_no_packed_tokens() -> None:
    out = check(make_case(FORMATS["k3v3"], lengths=(0, 0)))
    assert out[-1, :, -5:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [0, 9])
def test_no_pages(window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of a text: no kernel is needed, in pieces of some queries."""
    monkeypatch.setattr("rotq_kernels.kv.prefill.dense.MASK_ROWS", 11)
    monkeypatch.setattr("rotq_kernels.kv.prefill.launch.launch", Mock(side_effect=AssertionError))
    case = make_case(FORMATS["k3v3"], lengths=(0, 0), group=3, dtype=dtype, window=window)
    table_BJ = case.history.page_table_BJ[:, :0]
    out = check(case.with_history(page_table_BJ=table_BJ))
    assert out.is_contiguous()
    assert out[-1, :, -5:].eq(0).all()


def test_queries_before_the_end_of_the_history() -> None:
    """Causal over packed tokens too: the chunk is in the middle of what is packed."""
    case = make_case(FORMATS["k3v3"], lengths=(100, 90), T=40)
    position_BT = case.position_BT
    check(replace(case, position_BT=torch.where(position_BT >= 0, position_BT - 30, -1)))


def test_layouts() -> None:
    """Queries, pages' table and dense tokens as slices of wider buffers."""
    case = make_case(FORMATS["k3v3"], lengths=(21, 40))
    expected = run(case)
    dense = case.history.dense
    assert dense is not None

    def widened(x: Tensor) -> Tensor:
        buffer = torch.zeros(*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 8, dtype=x.dtype)
        view = buffer[..., 2:-1, 8:]
        view.copy_(x)
        return view

    swapped = widened(dense.k_BHND.transpose(1, 2)).transpose(1, 2)
    strided = case.with_history(
        page_table_BJ=widened(case.history.page_table_BJ),
        dense=DenseKV(
            k_BHND=swapped,
            v_BHND=widened(dense.v_BHND),
            position_BN=widened(dense.position_BN),
        ),
    )
    actual = run(
        replace(strided, q_BMTD=widened(case.q_BMTD), position_BT=widened(case.position_BT))
    )
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()


@pytest.mark.parametrize("more", [0, 1])
def test_packed_attention_calls_it_for_long_chunks(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(FORMATS["k3v3"], lengths=(9,), T=DECODE_ROWS + more)
    prefill = Mock(side_effect=lambda q_BMTD, *_, **__: q_BMTD + 1)
    decode = Mock(side_effect=lambda q_BMTD, *_, **__: q_BMTD + 2)
    monkeypatch.setattr("rotq_kernels.kv.attention.packed_prefill", prefill)
    monkeypatch.setattr("rotq_kernels.kv.attention.packed_decode", decode)
    given = (case.q_BMTD, case.position_BT, case.history)
    out = packed_attention_triton(*given, scale=case.scale)
    assert torch.equal(out, case.q_BMTD + (1 if more else 2))
    if more:
        (call,) = prefill.call_args_list
        assert all(a is b for a, b in zip(call.args, given, strict=True))
        assert call.kwargs == {"scale": case.scale}
