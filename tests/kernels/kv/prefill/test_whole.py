"""Long chunks over a history made whole: against the fp64 oracle, and who goes that way."""

from dataclasses import replace

import pytest
import torch
from kernel_device import attend_by_kernel, on_device
from kv_cases import in_blocks, paged_slots, tokens_of, transform_of
from torch import Tensor
from torch.nn import functional as F

from rotq_kernels.kv.attention import packed_attention_reference, packed_attention_triton
from rotq_kernels.kv.dequantize.launch import dequantize_kv
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import DenseKV, Extent, KVFormat, KVHistory, KVPages
from rotq_kernels.kv.prefill import whole

SINKS = 4
FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k4v2 large pages": KVFormat(head_dim=128, k_bits=4, v_bits=2, page_size=64),
    "k8v5 float16": KVFormat(head_dim=80, k_bits=8, v_bits=5, page_size=32, norm="float16"),
    "k7v4 none": KVFormat(head_dim=40, k_bits=7, v_bits=4, page_size=16, norm="none"),
}
QUERIES, PADDING = 24, 3


def history_of(
    form: KVFormat,
    *,
    packed: int = 37,
    mean: str = "rope",
    pairs: int | None = None,
    blocks: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> KVHistory:
    """One sequence: sinks, packed tokens, fresh ones and padding."""
    constants = transform_of(form, 2, mean=mean, rotary_pairs=pairs)
    slot_BT, table_BJ, num_pages = paged_slots([packed], form.page_size)
    pages = KVPages.empty(form, num_pages, 2)
    if blocks:
        pages, _ = in_blocks(form, num_pages, 2)
    position_BT = SINKS + torch.arange(packed)[None]
    given = tokens_of(constants, 1, packed)
    encode_kv_reference(*given, position_BT, slot_BT, constants, pages)
    k_BHND, v_BHND = (x.to(dtype) for x in tokens_of(constants, 1, SINKS + QUERIES, seed=1))
    fresh = SINKS + packed + torch.arange(QUERIES)
    fresh[-PADDING:] = -1
    position_BN = torch.cat((torch.arange(SINKS), fresh))[None].int()
    return KVHistory(
        pages=pages,
        page_table_BJ=table_BJ,
        length_B=torch.tensor([packed], dtype=torch.int32),
        start_B=torch.tensor([SINKS], dtype=torch.int32),
        constants=constants,
        dense=DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=position_BN),
        extent=Extent(packed=packed, skipped=0, end=SINKS + packed + QUERIES - PADDING),
    )


def queries_of(history: KVHistory, group: int = 3) -> tuple[Tensor, Tensor]:
    assert history.dense is not None
    D, dtype = history.pages.format.head_dim, history.dense.k_BHND.dtype
    generator = torch.Generator().manual_seed(3)
    q_BMTD = torch.randn(1, 2 * group, QUERIES, D, generator=generator).to(dtype)
    return q_BMTD, history.dense.position_BN[:, SINKS:]


def baseline(q_BMTD: Tensor, position_BT: Tensor, history: KVHistory) -> Tensor:
    """torch's attention in the query's dtype."""
    assert history.dense is not None
    k_BHND, v_BHND = dequantize_kv_reference(
        history.pages,
        history.page_table_BJ,
        history.length_B,
        history.start_B,
        history.constants,
    )
    k_BHND = torch.cat((k_BHND.to(q_BMTD.dtype), history.dense.k_BHND), dim=2)
    v_BHND = torch.cat((v_BHND.to(q_BMTD.dtype), history.dense.v_BHND), dim=2)
    T, N = q_BMTD.shape[2], k_BHND.shape[2]
    seen_TN = torch.ones(T, N, dtype=torch.bool).tril(N - T)
    out = F.scaled_dot_product_attention(q_BMTD, k_BHND, v_BHND, seen_TN, enable_gqa=True)
    return out.where((position_BT >= 0)[:, None, :, None], 0)


def check(history: KVHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "WHOLE_TOKENS", QUERIES)
    q_BMTD, position_BT = queries_of(history)
    scale = q_BMTD.shape[-1] ** -0.5
    assert whole.is_whole(q_BMTD, history)
    found = attend_by_kernel(q_BMTD, position_BT, history, scale=scale)
    exact = packed_attention_reference(
        q_BMTD, position_BT, history, scale=scale, dtype=torch.float64
    )
    ours, theirs = (
        float((out.double() - exact).abs().max())
        for out in (found, baseline(q_BMTD, position_BT, history))
    )
    assert ours <= 2 * theirs + 1e-6
    assert found[:, :, -PADDING:].eq(0).all()
    assert (found.dtype, found.is_contiguous()) == (q_BMTD.dtype, True)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(history_of(FORMATS[name], dtype=torch.float16), monkeypatch)


@pytest.mark.parametrize("mean", ["none", "static"])
def test_means(mean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(history_of(FORMATS["k3v3"], mean=mean), monkeypatch)


def test_partial_rope_and_pages_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    check(history_of(FORMATS["k3v3"], pairs=10, blocks=True), monkeypatch)


def test_the_beginning_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks that are not there yet, and no kernel."""
    monkeypatch.setattr(whole, "dequantize_kv", None)
    history = history_of(FORMATS["k3v3"], packed=1)
    assert history.dense is not None
    history.dense.position_BN[:, :SINKS] = -1
    history.dense.k_BHND[:, :, :SINKS] = torch.nan
    history.length_B.zero_()
    history.extent = Extent(packed=0, skipped=SINKS, end=SINKS + QUERIES)
    monkeypatch.setattr(whole, "WHOLE_TOKENS", QUERIES)
    q_BMTD, position_BT = queries_of(history)
    found = attend_by_kernel(q_BMTD, position_BT, history, scale=0.1)
    history.dense.k_BHND.nan_to_num_()
    exact = packed_attention_reference(q_BMTD, position_BT, history, scale=0.1)
    torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)


def test_dequantized_is_what_codes_stand_for() -> None:
    history = history_of(FORMATS["k7v4 none"])
    there = on_device(history)
    found = [x.cpu() for x in dequantize_kv(there, 37, 2, torch.float32)]
    wanted = dequantize_kv_reference(
        history.pages, history.page_table_BJ, history.length_B, history.start_B, history.constants
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape[2] == 39
        torch.testing.assert_close(ours[:, :, :37], theirs, rtol=1e-5, atol=2e-5)


def test_who_goes_that_way() -> None:
    history = history_of(FORMATS["k3v3"])
    q_BMTD = torch.zeros(1, 6, whole.WHOLE_TOKENS, 64, dtype=torch.bfloat16)
    assert whole.is_whole(q_BMTD, history)
    assert not whole.is_whole(q_BMTD[:, :, 1:], history)
    # torch's fast attention takes no fp32
    assert not whole.is_whole(q_BMTD.float(), history)
    assert not whole.is_whole(q_BMTD, replace(history, extent=None))
    assert history.extent is not None
    end = history.extent.end
    assert whole.is_whole(q_BMTD, replace(history, window=end))
    assert not whole.is_whole(q_BMTD, replace(history, window=end - 1))
    sign = KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16, residual="sign")
    assert not whole.is_whole(q_BMTD, history_of(sign))


def test_packed_attention_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    history = history_of(FORMATS["k3v3"])
    q_BMTD = torch.zeros(1, 6, whole.WHOLE_TOKENS, 64, dtype=torch.bfloat16)
    monkeypatch.setattr("rotq_kernels.kv.attention.attend_whole", lambda q, *_, **__: q + 1)
    position_BT = torch.zeros(1, whole.WHOLE_TOKENS, dtype=torch.int32)
    assert packed_attention_triton(q_BMTD, position_BT, history, scale=1.0).eq(1).all()
