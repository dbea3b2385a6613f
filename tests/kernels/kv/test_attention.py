"""The operator: what it refuses, what it dispatches to, and its reference."""

import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from kernel_device import attend_by_kernel, on_device
from kv_cases import paged_slots, tokens_of, transform_of
from torch import Tensor

from rotq_kernels.kv.arguments import flatten_history, restore_history
from rotq_kernels.kv.attention import (
    _on_cuda,
    packed_attention,
    packed_attention_reference,
)
from rotq_kernels.kv.encode.one_side import turned_mean
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import DenseKV, KVFormat, KVHistory, KVPages
from rotq_kernels.kv.query import turn_query
from rotq_kernels.kv.rope_mean import mean_query

FORM = KVFormat(head_dim=32, k_bits=3, v_bits=2, page_size=16, residual="qjl")
LENGTHS = [37, 5]


def arguments(dtype: torch.dtype = torch.float32, tokens: int = 2) -> dict[str, Any]:
    """All arguments of ``packed_attention``: two KV heads, four query heads."""
    transform = transform_of(FORM, 2)
    slot_BT, table_BJ, num_pages = paged_slots(LENGTHS, FORM.page_size)
    pages = KVPages.empty(FORM, num_pages, 2)
    k_BHTD, v_BHTD = tokens_of(transform, 2, max(LENGTHS))
    start_B = torch.tensor([4, 0], dtype=torch.int32)
    length_B = torch.tensor(LENGTHS, dtype=torch.int32)
    position_BT = start_B[:, None] + torch.arange(max(LENGTHS))
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    k_BHND, v_BHND = tokens_of(transform, 2, tokens, seed=1)
    fresh_BT = (start_B + length_B)[:, None] + torch.arange(tokens, dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    return {
        "q_BMTD": torch.randn(2, 4, tokens, 32, generator=generator).to(dtype),
        "position_BT": fresh_BT,
        "history": KVHistory(
            pages=pages,
            page_table_BJ=table_BJ,
            length_B=length_B,
            start_B=start_B,
            constants=transform,
            dense=DenseKV(k_BHND=k_BHND.to(dtype), v_BHND=v_BHND.to(dtype), position_BN=fresh_BT),
        ),
        "scale": 32**-0.5,
    }


def token_by_token(given: dict[str, Any]) -> Tensor:
    """One query head and token at a time, written from the definition, in fp64."""
    history: KVHistory = given["history"]
    start_B, window = history.start_B, history.window
    k_BHTD, v_BHTD = dequantize_kv_reference(
        history.pages, history.page_table_BJ, history.length_B, start_B, history.constants,
        dtype=torch.float64,
    )  # fmt: skip
    q_BMTD, dense = given["q_BMTD"].double(), history.dense
    assert dense is not None
    out_BMTD = torch.zeros_like(q_BMTD)
    for b, m, t in torch.cartesian_prod(*(torch.arange(n) for n in q_BMTD.shape[:3])).tolist():
        here, head = int(given["position_BT"][b, t]), m // 2
        keys, values = [], []
        for n in range(LENGTHS[b]):
            if 0 <= here - (int(start_B[b]) + n) < (window or math.inf):
                keys.append(k_BHTD[b, head, n])
                values.append(v_BHTD[b, head, n])
        for n, position in enumerate(dense.position_BN[b].tolist()):
            if position >= 0 and 0 <= here - position < (window or math.inf):
                keys.append(dense.k_BHND[b, head, n].double())
                values.append(dense.v_BHND[b, head, n].double())
        if keys:
            share_N = (torch.stack(keys) @ q_BMTD[b, m, t] * given["scale"]).softmax(0)
            out_BMTD[b, m, t] = share_N @ torch.stack(values)
    return out_BMTD


@pytest.mark.parametrize("window", [0, 7])
def test_reference(window: int) -> None:
    given = arguments()
    given["history"].window = window
    given["history"].dense.position_BN[1, 0] = -1
    found = packed_attention_reference(**given, dtype=torch.float64)
    torch.testing.assert_close(found, token_by_token(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_dense", [False, True])
def test_cpu_tensors(dtype: torch.dtype, with_dense: bool) -> None:
    given = arguments(dtype)
    given["history"].window = 20
    if not with_dense:
        given["history"].dense = None
    found = packed_attention(**given)
    assert found.dtype == dtype
    assert found.is_contiguous()
    expected = packed_attention_reference(**given, dtype=torch.float64)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=near)


def test_operator() -> None:
    given = arguments()
    wide_BMTD = torch.randn(2, 2, 4, 32).transpose(1, 2)
    history = given["history"]
    for q_BMTD, dense in ((given["q_BMTD"], history.dense), (wide_BMTD, None)):
        flat = flatten_history(replace(history, dense=dense))
        torch.library.opcheck(
            torch.ops.rotq.packed_attention.default, (q_BMTD, given["position_BT"], 0.2, [], *flat)
        )


def test_what_a_gpu_s_tensors_run_on() -> None:
    given = arguments()
    flat = flatten_history(on_device(given["history"]))
    places = (on_device(given[name]) for name in ("q_BMTD", "position_BT"))
    found = _on_cuda(*places, given["scale"], [], *flat)
    assert torch.equal(found.cpu(), attend_by_kernel(**given))


def test_flat_arguments_are_all_and_come_back() -> None:
    history = arguments()["history"]
    history.window = 5
    found = restore_history(*flatten_history(history))
    for there, back in (
        (history, found),
        (history.pages, found.pages),
        (history.dense, found.dense),
        (history.constants, found.constants),
        (history.constants.key, found.constants.key),
        (history.constants.value, found.constants.value),
    ):
        for field in fields(there):
            value = getattr(there, field.name)
            if isinstance(value, Tensor):
                assert getattr(back, field.name) is value, field.name
    assert restore_history(*flatten_history(replace(history, dense=None))).dense is None
    constants = found.constants
    assert (constants.mean, constants.rotary_scale, constants.format) == ("rope", 1.1, FORM)
    assert (found.pages.format, found.window) == (FORM, 5)


def wrong_pages(history: KVHistory) -> KVPages:
    return KVPages.empty(replace(FORM, k_bits=4), 4, 2)


def strided_pages(history: KVHistory) -> KVPages:
    codes = history.pages.k_codes
    return replace(history.pages, k_codes=codes.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_BMTD", lambda q_BMTD: q_BMTD[:, :3], "3 heads of width 32"),
        ("q_BMTD", lambda q_BMTD: q_BMTD[..., :16], "heads of width 16"),
        ("q_BMTD", lambda q_BMTD: q_BMTD.repeat(1, 9, 1, 1), "at most 16"),
        ("position_BT", lambda position_BT: position_BT[:, :1], "query_position"),
    ],
)
def test_refused_queries(name: str, change: Any, message: str) -> None:
    given = arguments()
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_attention(**given)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pages", wrong_pages, "constants of"),
        ("length_B", lambda history: history.length_B.long(), "length must be int32"),
        ("start_B", lambda history: history.start_B[:1], "start must be int32 (2,)"),
        ("page_table_BJ", lambda history: history.page_table_BJ[0], "page_table must be"),
        (
            "dense",
            lambda history: replace(history.dense, v_BHND=history.dense.v_BHND[..., :16]),
            "dense value must be (2, 2, 2, 32)",
        ),
        (
            "dense",
            lambda history: replace(history.dense, position_BN=history.dense.position_BN.long()),
            "dense position must be int32",
        ),
        ("pages", strided_pages, "each page must be contiguous"),
        ("window", lambda history: -1, "window must be"),
    ],
)
def test_refused_histories(name: str, change: Any, message: str) -> None:
    given = arguments()
    given["history"] = replace(given["history"], **{name: change(given["history"])})
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_attention(**given)


def test_mean_query_is_the_score_of_the_turned_mean() -> None:
    transform = transform_of(replace(FORM, head_dim=40), 2, rotary_pairs=12)
    x_BHND = torch.randn(1, 2, 3, 40, generator=torch.Generator().manual_seed(0))
    position_BT = torch.tensor([[0, 5, 1000]])
    assert transform.inv_freq_R is not None
    mean_BHTD = turned_mean(
        transform.key.mean_HD, position_BT, transform.inv_freq_R, transform.rotary_scale
    )
    cosine_BHNR, sine_BHNR, constant_BHN = mean_query(x_BHND, transform)
    assert cosine_BHNR is not None
    assert sine_BHNR is not None
    assert constant_BHN is not None
    angle_TR = position_BT[0, :, None].double() * transform.inv_freq_R.double()
    found = cosine_BHNR.double() @ angle_TR.cos().mT + sine_BHNR.double() @ angle_TR.sin().mT
    expected = (x_BHND @ mean_BHTD.mT).double()
    torch.testing.assert_close(found + constant_BHN[..., None], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", ["none", "static"])
def test_queries_without_a_turning_mean(mean: str) -> None:
    transform = transform_of(replace(FORM, residual="none"), 2, mean=mean)
    q_BMTD = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(0))
    turned = turn_query(q_BMTD, transform, scale=0.5)
    assert turned.cosine_BHNR is None
    assert turned.residual_BHND is None
    x_BHND = q_BMTD.reshape(2, 2, 2, 32) * 0.5 * math.log2(math.e)
    torch.testing.assert_close(
        turned.levels_BHND @ transform.key.matrix_HDD, x_BHND, rtol=1e-4, atol=1e-5
    )
    if mean == "none":
        assert turned.constant_BHN is None
    else:
        expected = (x_BHND * transform.key.mean_HD[:, None]).sum(-1)
        torch.testing.assert_close(turned.constant_BHN, expected)
