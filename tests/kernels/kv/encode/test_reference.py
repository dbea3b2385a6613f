"""Tokens into pages and back: the reference against its parts."""

import pytest
import torch
from kv_cases import paged_slots, tokens_of, transform_of

from rotq_kernels.kv.encode.one_side import dequantize_side, key_mean, quantize_side
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import KVFormat, KVPages

FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k8v2": KVFormat(head_dim=80, k_bits=8, v_bits=2, page_size=16, norm="float16"),
    "k4v5 sign": KVFormat(head_dim=40, k_bits=4, v_bits=5, page_size=32, residual="sign"),
    "k2v6 qjl": KVFormat(head_dim=96, k_bits=2, v_bits=6, page_size=16, residual="qjl"),
    "k7v3 none": KVFormat(head_dim=64, k_bits=7, v_bits=3, page_size=16, norm="none"),
}
LENGTHS = [21, 1, 32]


@pytest.mark.parametrize("name", FORMATS)
def test_ragged_pages_hold_the_codes_of_their_tokens(name: str) -> None:
    form = FORMATS[name]
    transform = transform_of(form, 2)
    k_BHTD, v_BHTD = tokens_of(transform, 3, max(LENGTHS))
    start_B = torch.tensor([4, 0, 900])
    slot_BT, table_BJ, num_pages = paged_slots(LENGTHS, form.page_size)
    position_BT = start_B[:, None] + torch.arange(max(LENGTHS))
    pages = KVPages.empty(form, num_pages, 2)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    length_B = torch.tensor(LENGTHS)
    k_back, v_back = dequantize_kv_reference(pages, table_BJ, length_B, start_B, transform)
    value = transform.value
    codes, norm = quantize_side(v_BHTD - value.mean_HD[:, None], value, form.v_bits, form.norm)
    expected = value.mean_HD[:, None] + dequantize_side(codes, norm, value, form.v_bits)
    mean_BHTD = key_mean(transform, position_BT)
    for b, length in enumerate(LENGTHS):
        assert torch.equal(v_back[b, :, :length], expected[b, :, :length])
        assert v_back[b, :, length:].eq(0).all()
        assert k_back[b, :, length:].eq(0).all()
        left, whole = k_back[b] - k_BHTD[b], k_BHTD[b] - mean_BHTD[b]
        if form.norm != "none":
            bound = 0.4 if form.k_bits == 2 else 0.3
            assert left[:, :length].norm() < bound * whole[:, :length].norm()
    exact, _ = dequantize_kv_reference(
        pages, table_BJ, length_B, start_B, transform, dtype=torch.float64
    )
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), k_back, atol=2e-5 * float(k_back.abs().max()))


def test_append_writes_what_prefill_writes_and_nothing_else() -> None:
    form = FORMATS["k3v3"]
    transform = transform_of(form, 2)
    k_BHTD, v_BHTD = tokens_of(transform, 1, 20)
    slot_BT, _, num_pages = paged_slots([20], form.page_size)
    position_BT = torch.arange(20)[None]
    at_once = KVPages.empty(form, num_pages, 2)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, at_once)
    stepwise = KVPages.empty(form, num_pages, 2)
    for t in range(20):
        now = slice(t, t + 1)
        encode_kv_reference(
            k_BHTD[:, :, now],
            v_BHTD[:, :, now],
            position_BT[:, now],
            slot_BT[:, now],
            transform,
            stepwise,
        )
    for one, other in zip(at_once.tensors(), stepwise.tensors(), strict=True):
        if one.dtype == torch.int32:
            assert torch.equal(one, other)
        # sums of other shapes round differently
        assert (one.int() - other.int()).abs().max() <= 1
    unwritten = torch.ones(num_pages * form.page_size, dtype=torch.bool)
    unwritten[slot_BT.flatten()] = False
    flat = at_once.k_codes.transpose(1, 2).flatten(0, 1)
    assert flat[unwritten].eq(0).all()
    assert flat[~unwritten].ne(0).any(-1).all()


def test_pages_beyond_a_length_are_not_read() -> None:
    form = FORMATS["k3v3"]
    transform = transform_of(form, 2)
    k_BHTD, v_BHTD = tokens_of(transform, 2, 40)
    slot_BT, table_BJ, num_pages = paged_slots([40, 5], form.page_size)
    pages = KVPages.empty(form, num_pages, 2)
    position_BT = torch.arange(40).expand(2, -1)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    assert table_BJ[1].tolist()[1:] == [-1, -1]
    start_B = torch.zeros(2, dtype=torch.int64)
    k_back, _ = dequantize_kv_reference(pages, table_BJ, torch.tensor([40, 5]), start_B, transform)
    table_BJ[1, 1:] = 10**6
    again, _ = dequantize_kv_reference(pages, table_BJ, torch.tensor([40, 5]), start_B, transform)
    assert torch.equal(k_back, again)
