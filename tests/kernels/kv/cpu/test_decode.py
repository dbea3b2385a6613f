"""Native code for a decode step against the chunked path, which is tested in fp64, in fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import in_blocks, paged_slots, tokens_of, transform_of
from torch import Tensor

from rotq_kernels.kv.attention import packed_attention_reference
from rotq_kernels.kv.cpu import attention, decode
from rotq_kernels.kv.cpu.attention import packed_attention_cpu
from rotq_kernels.kv.encode.reference import encode_kv_reference
from rotq_kernels.kv.format import DenseKV, KVConstants, KVFormat, KVHistory, KVPages

pytest.importorskip("numba")

LENGTHS = [75, 0, 1, 48]
STARTS = [3, 0, 17, 900]
FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k8v2 width 40": KVFormat(head_dim=40, k_bits=8, v_bits=2, page_size=16),
    "k2v4 width 80": KVFormat(head_dim=80, k_bits=2, v_bits=4, page_size=16),
    "k4v8 no norm": KVFormat(head_dim=64, k_bits=4, v_bits=8, page_size=16, norm="none"),
}


@pytest.fixture
def native_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the steps that native code took."""
    taken: list[int] = []

    def counted(q_BMTD: Tensor, *given: object, **named: object) -> Tensor:
        taken.append(len(q_BMTD))
        return decode.decode_native(q_BMTD, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "decode_native", counted)
    return taken


def step_of(
    transform: KVConstants, *, group: int = 3, pages: KVPages | None = None, dense: bool = True
) -> tuple[Tensor, Tensor, KVHistory]:
    """One query of each of several ragged sequences, the last dense token among what it sees."""
    form, H, B = transform.format, transform.key.base_H.shape[0], len(LENGTHS)
    slot_BT, table_BJ, num_pages = paged_slots(LENGTHS, form.page_size)
    start_B, length_B = (torch.tensor(x, dtype=torch.int32) for x in (STARTS, LENGTHS))
    pages = pages or KVPages.empty(form, num_pages, H)
    k_BHTD, v_BHTD = tokens_of(transform, B, max(LENGTHS))
    position_BT = start_B[:, None] + torch.arange(max(LENGTHS))
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    k_BHND, v_BHND = tokens_of(transform, B, 4, seed=1)
    fresh_B1 = (start_B + length_B)[:, None].int()
    first_BN = torch.arange(3).where(torch.arange(3) < start_B[:, None], -1)
    position_BN = torch.cat((first_BN, fresh_B1), dim=1).int()
    history = KVHistory(
        pages=pages,
        page_table_BJ=table_BJ,
        length_B=length_B,
        start_B=start_B,
        constants=transform,
        dense=DenseKV(k_BHND=k_BHND, v_BHND=v_BHND, position_BN=position_BN) if dense else None,
    )
    generator = torch.Generator().manual_seed(2)
    q_BMTD = torch.randn(B, H * group, 1, form.head_dim, generator=generator)
    return q_BMTD, fresh_B1, history


def assert_is_reference(q_BMTD: Tensor, position_BT: Tensor, history: KVHistory) -> None:
    found = packed_attention_cpu(q_BMTD, position_BT, history, scale=0.2)
    expected = packed_attention_reference(
        q_BMTD, position_BT, history, scale=0.2, dtype=torch.float64
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_step_of_each_width_of_codes(name: str, native_steps: list[int]) -> None:
    assert_is_reference(*step_of(transform_of(FORMATS[name], 2)))
    assert native_steps == [len(LENGTHS)]


@pytest.mark.parametrize("mean", ["none", "static", "rope"])
def test_means_of_keys(mean: str) -> None:
    assert_is_reference(*step_of(transform_of(FORMATS["k3v3"], 2, mean=mean)))


def test_a_rope_of_an_odd_number_of_pairs() -> None:
    assert_is_reference(*step_of(transform_of(FORMATS["k3v3"], 2, rotary_pairs=11)))


@pytest.mark.parametrize("window", [1, 7, 60])
def test_sliding_attention(window: int, native_steps: list[int]) -> None:
    query, position, history = step_of(transform_of(FORMATS["k3v3"], 2))
    assert_is_reference(query, position, replace(history, window=window))
    assert native_steps


def test_packed_tokens_that_are_among_the_dense_ones() -> None:
    query, position, history = step_of(transform_of(FORMATS["k3v3"], 2))
    hidden_B = torch.tensor([20, 0, 1, 16], dtype=torch.int32)
    assert_is_reference(query, position, replace(history, hidden_B=hidden_B))


def test_padding_and_a_query_that_sees_nothing_give_zeros() -> None:
    query, position, history = step_of(transform_of(FORMATS["k3v3"], 2), dense=False)
    position[3] = -1
    assert_is_reference(query, position, history)
    found = packed_attention_cpu(query, position, history, scale=0.2)
    assert found[1].eq(0).all()
    assert found[3].eq(0).all()


def test_levels_of_each_head() -> None:
    transform = transform_of(FORMATS["k3v3"], 2)
    for side in (transform.key, transform.value):
        side.levels_HL = side.levels_HL.clone()
        side.levels_HL[1] += 3
    assert_is_reference(*step_of(transform))


def test_pages_that_are_parts_of_blocks() -> None:
    transform = transform_of(FORMATS["k3v3"], 2)
    _, _, num_pages = paged_slots(LENGTHS, 16)
    pages, _ = in_blocks(transform.format, num_pages, 2)
    assert_is_reference(*step_of(transform, pages=pages))


def test_sequences_in_turns_and_heads_on_threads(
    monkeypatch: pytest.MonkeyPatch, native_steps: list[int]
) -> None:
    query, position, history = step_of(transform_of(FORMATS["k3v3"], 2))
    whole = packed_attention_cpu(query, position, history, scale=0.2)
    monkeypatch.setattr(decode, "SCORES", 1)
    monkeypatch.setattr(decode, "SHARED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    parts = packed_attention_cpu(query, position, history, scale=0.2)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_layers_of_several_windows_share_what_was_worked_out() -> None:
    worked_out: dict[int, Any] = {}
    for window in (0, 7, 0, 7):
        query, position, history = step_of(transform_of(FORMATS["k3v3"], 2))
        history = replace(history, window=window, worked_out=worked_out)
        assert_is_reference(query, position, history)
    assert sorted(worked_out) == [0, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_has_the_query_s_dtype(dtype: torch.dtype, native_steps: list[int]) -> None:
    query, position, history = step_of(transform_of(FORMATS["k3v3"], 2))
    found = packed_attention_cpu(query.to(dtype), position, history, scale=0.2)
    expected = packed_attention_cpu(query.to(dtype).double(), position, history, scale=0.2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)
    assert len(native_steps) == 1


@pytest.mark.parametrize(
    "form",
    [
        KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16, residual="sign"),
        KVFormat(head_dim=64, k_bits=3, v_bits=5, page_size=16),
        KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16, norm="float16"),
    ],
    ids=["sign bits", "five bits", "fp16 norms"],
)
def test_other_formats_go_the_chunked_way(form: KVFormat, native_steps: list[int]) -> None:
    assert_is_reference(*step_of(transform_of(form, 2)))
    assert not native_steps
