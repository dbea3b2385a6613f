"""The chunked path over codes against dense attention, in fp64, over what the codes stand for."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kv_cases import paged_slots, tokens_of, transform_of
from torch import Tensor

from rotq_kernels.kv.cpu import attention
from rotq_kernels.kv.cpu.attention import packed_attention_cpu
from rotq_kernels.kv.cpu.levels import LevelReader
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import DenseKV, KVConstants, KVFormat, KVHistory, KVPages

LENGTHS = [75, 0, 1, 48]
STARTS = [3, 0, 17, 900]
FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k4v2 width 80": KVFormat(head_dim=80, k_bits=4, v_bits=2, page_size=16, norm="float16"),
    "k2v4 width 40": KVFormat(head_dim=40, k_bits=2, v_bits=4, page_size=32),
    "k8v6": KVFormat(head_dim=64, k_bits=8, v_bits=6, page_size=16),
    "k5v7": KVFormat(head_dim=96, k_bits=5, v_bits=7, page_size=16),
    "k3v3 sign": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16, residual="sign"),
    "k2v3 qjl": KVFormat(head_dim=40, k_bits=2, v_bits=3, page_size=16, residual="qjl"),
    "k3v3 none": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16, norm="none"),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks and tiles per sequence, the last not whole; query tokens in turns."""
    monkeypatch.setattr(attention, "CHUNK", 64)
    monkeypatch.setattr(attention, "TILE", 16)
    monkeypatch.setattr(attention, "SCORES", 80 * 4 * 3)
    attention._angles.cache_clear()
    yield
    attention._angles.cache_clear()


class Case:
    """Ragged packed sequences, dense tokens behind them, and queries among those."""

    def __init__(
        self,
        transform: KVConstants,
        group: int = 2,
        tokens: int = 5,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        form, H = transform.format, transform.key.base_H.shape[0]
        B, D = len(LENGTHS), form.head_dim
        self.transform = transform
        self.slot_BT, self.table_BJ, num_pages = paged_slots(LENGTHS, form.page_size)
        self.start_B = torch.tensor(STARTS, dtype=torch.int32)
        self.length_B = torch.tensor(LENGTHS, dtype=torch.int32)
        self.pages = KVPages.empty(form, num_pages, H)
        k_BHTD, v_BHTD = tokens_of(transform, B, max(LENGTHS))
        position_BT = self.start_B[:, None] + torch.arange(max(LENGTHS))
        encode_kv_reference(k_BHTD, v_BHTD, position_BT, self.slot_BT, transform, self.pages)
        k_BHND, v_BHND = tokens_of(transform, B, 3 + tokens, seed=1)
        fresh_BT = (self.start_B + self.length_B)[:, None] + torch.arange(tokens)
        first_BN = torch.arange(3).where(torch.arange(3) < self.start_B[:, None], -1)
        position_BN = torch.cat((first_BN, fresh_BT), dim=1).int()
        self.dense = DenseKV(
            k_BHND=k_BHND.to(dtype), v_BHND=v_BHND.to(dtype), position_BN=position_BN
        )
        generator = torch.Generator().manual_seed(2)
        q_BMTD = torch.randn(B, H * group, tokens, D, generator=generator)
        self.q_BMTD, self.position_BT = q_BMTD.to(dtype), fresh_BT.int()
        self.scale = 2 * D**-0.5

    def run(self, window: int = 0) -> Tensor:
        history = KVHistory(
            pages=self.pages,
            page_table_BJ=self.table_BJ,
            length_B=self.length_B,
            start_B=self.start_B,
            constants=self.transform,
            dense=self.dense,
            window=window,
        )
        return packed_attention_cpu(self.q_BMTD, self.position_BT, history, scale=self.scale)

    def oracle(self, window: int = 0) -> Tensor:
        k, v = dequantize_kv_reference(
            self.pages,
            self.table_BJ,
            self.length_B,
            self.start_B,
            self.transform,
            dtype=torch.float64,
        )
        token_N = torch.arange(k.shape[2])
        packed_BN = (self.start_B[:, None] + token_N).where(token_N < self.length_B[:, None], -1)
        k = torch.cat((k, self.dense.k_BHND.double()), dim=2)
        v = torch.cat((v, self.dense.v_BHND.double()), dim=2)
        key_B1N = torch.cat((packed_BN, self.dense.position_BN), dim=1)[:, None]
        query_BT1 = self.position_BT[..., None]
        seen_BTN = (key_B1N >= 0) & (key_B1N <= query_BT1)
        if window:
            seen_BTN &= query_BT1 - key_B1N < window
        group = self.q_BMTD.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = self.q_BMTD.double() @ k.mT * self.scale
        scores = scores.masked_fill(~seen_BTN[:, None], -torch.inf)
        return scores.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("window", [0, 7, 60])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_dense_attention(name: str, window: int) -> None:
    case = Case(transform_of(FORMATS[name], 2))
    torch.testing.assert_close(case.run(window), case.oracle(window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", ["none", "static", "rope"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_means_and_chunks_of_queries(mean: str, tokens: int) -> None:
    case = Case(transform_of(FORMATS["k3v3"], 2, mean=mean), tokens=tokens)
    torch.testing.assert_close(case.run(), case.oracle(), rtol=1e-5, atol=1e-5)


def test_partial_rope_and_one_head_per_query() -> None:
    case = Case(transform_of(FORMATS["k3v3"], 3, rotary_pairs=12), group=1)
    torch.testing.assert_close(case.run(), case.oracle(), rtol=1e-5, atol=1e-5)


def test_levels_of_each_head() -> None:
    transform = transform_of(FORMATS["k4v2 width 80"], 2)
    for side in (transform.key, transform.value):
        side.levels_HL = side.levels_HL.clone()
        side.levels_HL[1] += 3
    case = Case(transform)
    torch.testing.assert_close(case.run(), case.oracle(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_query_s_dtype(dtype: torch.dtype) -> None:
    case = Case(transform_of(FORMATS["k3v3"], 2), dtype=dtype)
    found = case.run()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), case.oracle(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03
    )


def test_query_without_keys_gets_zeros() -> None:
    case = Case(transform_of(FORMATS["k3v3"], 2))
    case.position_BT[0, 2] = -1
    found = case.run()
    assert found[0, :, 2].eq(0).all()
    torch.testing.assert_close(found, case.oracle(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("group", [1, 3])
def test_first_prefill_of_padded_sequences(
    group: int, window: int, sinks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing packed yet; padding on the left, in the middle, everywhere; room for sinks."""
    case = Case(transform_of(FORMATS["k3v3"], 2), group=group, tokens=9)
    case.length_B.zero_()
    there_BT = torch.ones(4, 9, dtype=torch.bool)
    there_BT[0, :4] = there_BT[1, 3:5] = there_BT[2] = False
    case.position_BT = (there_BT.cumsum(1) + 6).where(there_BT, -1).int()
    k_BHND, v_BHND = (x[:, :, 3 - sinks :] for x in (case.dense.k_BHND, case.dense.v_BHND))
    position_BN = torch.nn.functional.pad(case.position_BT, (sinks, 0), value=-1)
    case.dense = DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=position_BN)
    if not window:
        monkeypatch.setattr(attention, "_attend", None)  # all of it is sdpa's
    found = case.run(window)
    torch.testing.assert_close(found, case.oracle(window), rtol=1e-5, atol=1e-5)
    assert found.transpose(1, 2)[~there_BT].eq(0).all()


def test_without_dense_tokens() -> None:
    case = Case(transform_of(FORMATS["k3v3"], 2))
    case.dense = replace(case.dense, position_BN=torch.full_like(case.dense.position_BN, -1))
    expected = case.oracle()
    case.dense = None  # type: ignore[assignment]
    torch.testing.assert_close(case.run(), expected, rtol=1e-5, atol=1e-5)


def test_dense_cache_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    read = LevelReader.read

    def watch(self: LevelReader, words_HNW: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal largest
        largest = max(largest, words_HNW.shape[1])
        return read(self, words_HNW, dtype)

    monkeypatch.setattr(LevelReader, "read", watch)
    Case(transform_of(FORMATS["k3v3"], 2)).run()
    assert 0 < largest <= attention.CHUNK // 2 < max(LENGTHS)
