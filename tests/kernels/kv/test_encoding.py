"""The operator: what it refuses, and that it is registered as it behaves."""

import dataclasses

import pytest
import torch
from kernel_device import encode_by_kernel, on_device
from kv_cases import assert_same_pages, dirty_pages, paged_slots, tokens_of, transform_of

from rotq_kernels.kv.encode.arguments import SideArguments, side_arguments
from rotq_kernels.kv.encode.reference import encode_kv_reference
from rotq_kernels.kv.encoding import _on_cuda, _op, encode_kv
from rotq_kernels.kv.format import KVFormat, KVPages

FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k8v2": KVFormat(head_dim=80, k_bits=8, v_bits=2, page_size=16, norm="float16"),
    "k2v6 qjl": KVFormat(head_dim=96, k_bits=2, v_bits=6, page_size=16, residual="qjl"),
    "k7v3 none": KVFormat(head_dim=64, k_bits=7, v_bits=3, page_size=16, norm="none"),
}


def test_operator_takes_the_fields_in_their_order() -> None:
    arguments = torch.ops.rotq.encode_side.default._schema.arguments
    fields = dataclasses.fields(SideArguments)
    assert [argument.name for argument in arguments] == [field.name for field in fields]


@pytest.mark.parametrize("name", ["k3v3", "k2v6 qjl", "k7v3 none"])
def test_operator_is_what_it_says(name: str) -> None:
    """Aliasing and mutation as registered; CPU tensors run on the reference."""
    form = FORMATS[name]
    transform = transform_of(form, 2)
    k_BHTD, v_BHTD = tokens_of(transform, 2, 5)
    slot_BT, _, num_pages = paged_slots([5, 3], form.page_size)
    position_BT = torch.arange(5).expand(2, -1)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    given = (k_BHTD, v_BHTD, position_BT, slot_BT, transform)
    for side in side_arguments(*given, dirty_pages(form, num_pages, 2)):
        torch.library.opcheck(_op, tuple(side.flat()))
    encode_kv(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, expected)
    assert_same_pages(pages, expected)


def test_what_a_gpu_s_tensors_run_on() -> None:
    form = FORMATS["k2v6 qjl"]
    transform = transform_of(form, 2)
    slot_BT, _, num_pages = paged_slots([5], form.page_size)
    given = (*tokens_of(transform, 1, 5), torch.arange(5)[None], slot_BT, transform)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    encode_by_kernel(*given, expected)
    there = on_device(pages)
    for side in side_arguments(*on_device(given), there):
        _on_cuda(*side.flat())
    assert_same_pages(there, on_device(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 32)}, "should both be"),
        ({"v": torch.zeros(1, 2, 3, 64)}, "should both be"),
        ({"k": torch.zeros(1, 3, 4, 64), "v": torch.zeros(1, 3, 4, 64)}, "should both be"),
        ({"slot": torch.zeros(1, 4, dtype=torch.int32)}, "int64"),
        ({"position": torch.zeros(4, dtype=torch.int64)}, "positions"),
        ({"pages": FORMATS["k8v2"]}, "do not fit"),
        ({"thresholds": torch.zeros(2, 8)}, "thresholds_HL of 3 bits"),
        ({"inv_freq": None}, "inv_freq_R"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_encode_refuses(change: dict[str, object], message: str) -> None:
    form = FORMATS["k3v3"]
    transform = transform_of(form, 2)
    if "thresholds" in change:
        transform.key.thresholds_HL = change["thresholds"]  # type: ignore[assignment]
    if "inv_freq" in change:
        object.__setattr__(transform, "inv_freq_R", None)
    given = {
        "k": torch.zeros(1, 2, 4, 64),
        "v": torch.zeros(1, 2, 4, 64),
        "position": torch.zeros(1, 4, dtype=torch.int64),
        "slot": torch.zeros(1, 4, dtype=torch.int64),
    }
    k, v, position, slot = ({**given, **change}[name] for name in given)
    pages = KVPages.empty(change.get("pages", form), 1, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        encode_kv(k, v, position, slot, transform, pages)  # type: ignore[arg-type]


def test_encode_refuses_pages_that_are_not_contiguous() -> None:
    form = FORMATS["k3v3"]
    transform = transform_of(form, 2)
    pages = KVPages.empty(form, 2, 2)
    pages.k_codes = pages.k_codes.transpose(2, 3).contiguous().transpose(2, 3)
    index = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        encode_kv(
            torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 4, 64), index, index, transform, pages
        )
