"""The kernel's search against the definition; in Triton's interpreter without a GPU.

Sums of another order may prefer another of two moves that gain nearly the same, so most tokens
have the same codes and all cost the same.
"""

from dataclasses import replace

import pytest
import torch
from kernel_device import encode_by_kernel
from kv_cases import paged_slots, tokens_of, transform_of
from torch import Tensor

from rotq_kernels.kv.encode.arguments import side_arguments
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.encoding import _op, encode_kv
from rotq_kernels.kv.format import KVConstants, KVFormat, KVPages, SideConstants

CASES = {
    "k3v3 D64": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k4v2 D80 fp16": KVFormat(head_dim=80, k_bits=4, v_bits=2, page_size=16, norm="float16"),
    "k6v3 D40 sign": KVFormat(head_dim=40, k_bits=6, v_bits=3, page_size=16, residual="sign"),
    "k3v4 D256": KVFormat(head_dim=256, k_bits=3, v_bits=4, page_size=16),
}


def searched(side: SideConstants, seed: int) -> SideConstants:
    """With a metric of a wide spectrum."""
    H, D, _ = side.matrix_HDD.shape
    generator = torch.Generator().manual_seed(seed)
    basis_HDD = torch.linalg.qr(torch.randn(H, D, D, generator=generator)).Q
    value_HD = torch.exp(1.5 * torch.randn(H, D, generator=generator))
    metric_HDD = ((basis_HDD * value_HD[:, None]) @ basis_HDD.mT).contiguous()
    return replace(side, metric_HDD=metric_HDD, search=4)


def transform_with_search(form: KVFormat) -> KVConstants:
    transform = transform_of(form, 2)
    key, value = searched(transform.key, 1), searched(transform.value, 2)
    return replace(transform, key=key, value=value)


def encoded(name: str) -> tuple[KVConstants, tuple[Tensor, Tensor], list[KVPages], Tensor]:
    """Pages of the kernel, of the reference, and of the reference without search."""
    form = CASES[name]
    transform = transform_with_search(form)
    k_BHTD, v_BHTD = tokens_of(transform, 1, 30)
    slot_BT, table_BJ, num_pages = paged_slots([30], form.page_size)
    position_BT = torch.arange(30)[None]
    plain = replace(
        transform,
        key=replace(transform.key, search=0),
        value=replace(transform.value, search=0),
    )
    found = []
    for run, constants in (
        (encode_by_kernel, transform),
        (encode_kv_reference, transform),
        (encode_kv_reference, plain),
    ):
        pages = KVPages.empty(form, num_pages, 2)
        run(k_BHTD, v_BHTD, position_BT, slot_BT, constants, pages)
        found.append(pages)
    return transform, (k_BHTD, v_BHTD), found, table_BJ


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_reference(name: str) -> None:
    transform, tokens, all_pages, table_BJ = encoded(name)
    for field in ("k_codes", "v_codes"):
        kernel, reference, plain = (getattr(pages, field) for pages in all_pages)
        same = (kernel == reference).all(-1).float().mean()
        assert same > 0.95, field
        assert (kernel == plain).all(-1).float().mean() < 0.7
    costs = []
    length_B, start_B = torch.tensor([30]), torch.tensor([0])
    for pages in all_pages:
        back = dequantize_kv_reference(pages, table_BJ, length_B, start_B, transform)
        costs.append([])
        for side, found, whole in zip((transform.key, transform.value), back, tokens, strict=True):
            e_BHTD = (found - whole) @ side.matrix_HDD.mT
            assert side.metric_HDD is not None
            costs[-1].append(float(((e_BHTD @ side.metric_HDD) * e_BHTD).sum()))
    assert costs[0] == pytest.approx(costs[1], rel=0.01)
    # the sign bit of keys adds what the search does not know of
    if transform.format.residual == "none":
        assert costs[0][0] < 0.95 * costs[2][0]
    assert costs[0][1] < 0.95 * costs[2][1]


def test_cpu_operator_and_its_fake() -> None:
    form = CASES["k3v3 D64"]
    transform = transform_with_search(form)
    k_BHTD, v_BHTD = tokens_of(transform, 1, 9)
    slot_BT, _, num_pages = paged_slots([9], form.page_size)
    position_BT = torch.arange(9)[None]
    pages, expected = (KVPages.empty(form, num_pages, 2) for _ in range(2))
    encode_kv(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, expected)
    for one, other in zip(pages.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)
    for side in side_arguments(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages):
        torch.library.opcheck(_op, tuple(side.flat()))


@pytest.mark.parametrize(
    "change", [{"metric_HDD": None}, {"gain": "norm"}, {"metric_HDD": torch.ones(2, 3, 3)}]
)
def test_what_search_needs(change: dict[str, object]) -> None:
    form = CASES["k3v3 D64"]
    transform = transform_with_search(form)
    transform.value = replace(transform.value, **change)  # type: ignore[arg-type]
    k_BHTD, v_BHTD = tokens_of(transform, 1, 2)
    index_BT = torch.arange(2)[None]
    with pytest.raises(ValueError, match="search needs metric_HDD"):
        encode_kv(k_BHTD, v_BHTD, index_BT, index_BT, transform, KVPages.empty(form, 1, 2))
