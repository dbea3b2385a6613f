"""The encoding kernel against the reference; without a GPU it runs in Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, encode_by_kernel
from kv_cases import assert_same_pages, dirty_pages, paged_slots, tokens_of, transform_of

from rotq_kernels.kv.encode.launch import tile_sizes
from rotq_kernels.kv.encode.reference import dequantize_kv_reference, encode_kv_reference
from rotq_kernels.kv.format import KVConstants, KVFormat, KVPages

FORMATS = {
    "k3v3": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=16),
    "k8v2": KVFormat(head_dim=80, k_bits=8, v_bits=2, page_size=16, norm="float16"),
    "k4v5 sign": KVFormat(head_dim=40, k_bits=4, v_bits=5, page_size=32, residual="sign"),
    "k2v6 qjl": KVFormat(head_dim=96, k_bits=2, v_bits=6, page_size=16, residual="qjl"),
    "k7v3 none": KVFormat(head_dim=64, k_bits=7, v_bits=3, page_size=16, norm="none"),
}


def exact_transform(form: KVFormat, num_heads: int, mean: str = "static") -> KVConstants:
    """Integer matrices and means, so that all sums of integer tokens are exact in any order."""
    transform = transform_of(form, num_heads, mean=mean)
    generator = torch.Generator().manual_seed(5)
    for side in (transform.key, transform.value):
        shape = side.matrix_HDD.shape
        side.matrix_HDD = torch.randint(-1, 2, shape, generator=generator).float()
        side.mean_HD = torch.randint(-3, 4, shape[:2], generator=generator).float()
    if transform.sketch_DD is not None:
        transform.sketch_DD = torch.eye(form.head_dim).flip(0)
    return transform


EXACT = {
    **FORMATS,
    "k3v4 D256": KVFormat(head_dim=256, k_bits=3, v_bits=4, page_size=16),
    "k5v7": KVFormat(head_dim=32, k_bits=5, v_bits=7, page_size=16, norm="float16"),
    "k6v8 D128": KVFormat(head_dim=128, k_bits=6, v_bits=8, page_size=16),
    "k3v3 fp16 qjl": KVFormat(
        head_dim=72, k_bits=3, v_bits=3, page_size=16, norm="float16", residual="qjl"
    ),
    "k3v3 none sign": KVFormat(
        head_dim=48, k_bits=3, v_bits=3, page_size=16, norm="none", residual="sign"
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_kernel_is_bitwise_the_reference_where_sums_are_exact(name: str) -> None:
    form = EXACT[name]
    transform = exact_transform(form, 2)
    generator = torch.Generator().manual_seed(11)
    k_BHTD = torch.randint(-4, 5, (3, 2, 21, form.head_dim), generator=generator).float()
    v_BHTD = torch.randint(-4, 5, (3, 2, 21, form.head_dim), generator=generator).float()
    # a row that becomes zero, and one far out
    k_BHTD[1, :, 0] = transform.key.mean_HD
    v_BHTD[0, :, 3] *= 256
    slot_BT, _, num_pages = paged_slots([21, 1, 18], form.page_size)
    position_BT = torch.arange(21).expand(3, -1)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    encode_by_kernel(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, expected)
    assert_same_pages(pages, expected)


def test_a_gain_is_never_negative() -> None:
    form = KVFormat(head_dim=32, k_bits=3, v_bits=3, page_size=16, norm="float16")
    transform = exact_transform(form, 1)
    # all codes 0, whose level is negative, where y is positive
    transform.key.thresholds_HL += 100
    transform.key.matrix_HDD = transform.key.matrix_HDD.abs()
    x_BHTD = torch.full((1, 1, 2, 32), 20.0)
    index_BT = torch.arange(2)[None]
    pages, expected = dirty_pages(form, 1, 1), dirty_pages(form, 1, 1)
    encode_by_kernel(x_BHTD, x_BHTD, index_BT, index_BT, transform, pages)
    encode_kv_reference(x_BHTD, x_BHTD, index_BT, index_BT, transform, expected)
    assert expected.k_norm is not None
    assert expected.k_norm[0, 0, :2].eq(0).all()
    assert_same_pages(pages, expected)


@pytest.mark.parametrize("gain", ["lsq", "norm", "none"])
@pytest.mark.parametrize("mean", ["none", "rope"])
def test_kernel_on_any_input_but_for_ties(gain: str, mean: str) -> None:
    """Codes may differ on a threshold, norms by one step on the edge of a step."""
    form = FORMATS["k3v3"]
    transform = transform_of(form, 2, gain=gain, mean=mean, rotary_pairs=24)
    if mean == "none":
        transform.key.mean_HD.fill_(3)  # to be ignored
    k_BHTD, v_BHTD = tokens_of(transform, 2, 40)
    slot_BT, table_BJ, num_pages = paged_slots([40, 33], form.page_size)
    position_BT = torch.tensor([[5], [200_000]]) + torch.arange(40)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    encode_by_kernel(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, expected)
    for one, other in zip(pages.tensors(), expected.tensors(), strict=True):
        assert (one != other).sum() <= 2
        if one.dtype == torch.uint8:
            assert (one.int() - other.int()).abs().max() <= 1
    start_B = position_BT[:, 0]
    lengths = torch.tensor([40, 33])
    back = dequantize_kv_reference(pages, table_BJ, lengths, start_B, transform)
    for one, whole in zip(back, (k_BHTD, v_BHTD), strict=True):
        error = (one[0] - whole[0]).norm() / whole[0].norm()
        assert error < 0.35


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("gain", ["lsq", "norm", "none"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["k3v3", "k8v2"])
def test_rows_that_are_not_finite_get_the_largest_norm(name: str, wrong: float, gain: str) -> None:
    """By the kernel and by the reference, and no other row changes."""
    form = FORMATS[name]
    transform = transform_of(form, 2, gain=gain)
    tokens = [*tokens_of(transform, 1, 5)]
    slot_BT, _, num_pages = paged_slots([5], form.page_size)
    position_BT, found = torch.arange(5)[None], []
    for encode in (encode_kv_reference, encode_by_kernel):
        for poison in (False, True):
            x_BHTD = [x.clone() for x in tokens]
            if poison:
                for x in x_BHTD:
                    x[0, 1, 2, 7] = wrong
            pages = KVPages.empty(form, num_pages, 2)
            encode(*x_BHTD, position_BT, slot_BT, transform, pages)
            found.append([pages.k_norm, pages.v_norm])
    page, place = divmod(int(slot_BT[0, 2]), form.page_size)
    for whole, broken in (found[:2], found[2:]):
        for expected_PHS, norm_PHS in zip(whole, broken, strict=True):
            assert expected_PHS is not None
            assert norm_PHS is not None
            top = 255 if norm_PHS.dtype == torch.uint8 else torch.inf
            assert float(norm_PHS[page, 1, place]) == top
            norm_PHS[page, 1, place] = expected_PHS[page, 1, place]
            assert torch.equal(norm_PHS, expected_PHS)


def layouts(x_BHTD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same tokens in other memory."""
    wide = x_BHTD.new_full((*x_BHTD.shape[:3], x_BHTD.shape[3] + 5), torch.nan)
    wide[..., 2:-3] = x_BHTD
    return {
        "heads inside": x_BHTD.transpose(1, 2).contiguous().transpose(1, 2),
        "rows of a wider buffer": wide[..., 2:-3],
        "transposed": x_BHTD.mT.contiguous().mT,
        "every second": x_BHTD.repeat_interleave(2, 2)[:, :, ::2],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_kernel_reads_any_layout(layout: str) -> None:
    form = FORMATS["k3v3"]
    transform = exact_transform(form, 2)
    generator = torch.Generator().manual_seed(3)
    x_BHTD = torch.randint(-4, 5, (2, 2, 9, 64), generator=generator).float()
    slot_BT, _, num_pages = paged_slots([9, 7], form.page_size)
    position_BT = torch.arange(18).view(2, 9)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    encode_kv_reference(x_BHTD, x_BHTD, position_BT, slot_BT, transform, expected)
    # constants and indices of other strides, too
    for side in (transform.key, transform.value):
        side.matrix_HDD = side.matrix_HDD.mT.contiguous().mT
        side.mean_HD = side.mean_HD.T.contiguous().T
    slot_BT = slot_BT.T.contiguous().T
    x_BHTD = layouts(x_BHTD.to(DEVICE))[layout]
    encode_by_kernel(x_BHTD, x_BHTD, position_BT, slot_BT, transform, pages)
    assert_same_pages(pages, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_takes_half_precision(dtype: torch.dtype) -> None:
    form = FORMATS["k3v3"]
    transform = exact_transform(form, 2, mean="none")
    x_BHTD = torch.randint(-4, 5, (1, 2, 5, 64), generator=torch.Generator().manual_seed(3))
    slot_BT, _, num_pages = paged_slots([5], form.page_size)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    position_BT = torch.arange(5, dtype=torch.int32)[None]
    encode_by_kernel(x_BHTD.to(dtype), x_BHTD.to(dtype), position_BT, slot_BT, transform, pages)
    encode_kv_reference(x_BHTD.float(), x_BHTD.float(), position_BT, slot_BT, transform, expected)
    assert_same_pages(pages, expected)


def test_long_prefill_takes_the_taller_tile() -> None:
    form = KVFormat(head_dim=32, k_bits=3, v_bits=3, page_size=64)
    assert tile_sizes(32, 300)["BLOCK_N"] > tile_sizes(32, 20)["BLOCK_N"]
    transform = exact_transform(form, 1)
    x_BHTD = torch.randint(-4, 5, (1, 1, 300, 32), generator=torch.Generator().manual_seed(3))
    slot_BT, _, num_pages = paged_slots([290], form.page_size)
    slot_BT = torch.nn.functional.pad(slot_BT, (10, 0), value=-1)
    pages, expected = dirty_pages(form, num_pages, 1), dirty_pages(form, num_pages, 1)
    position_BT = torch.arange(300)[None]
    for encode, out in ((encode_by_kernel, pages), (encode_kv_reference, expected)):
        encode(x_BHTD.float(), x_BHTD.float(), position_BT, slot_BT, transform, out)
    assert_same_pages(pages, expected)
