"""Tokens into pages and back: the reference against its parts, the kernel against the reference.

Without a GPU the kernel runs in Triton's interpreter.
"""

import dataclasses
from typing import Any

import pytest
import torch
from kv_cases import paged_slots, tokens_of, transform_of

from rotq_kernels.kv.encode.kernel import tile
from rotq_kernels.kv.encode.launch import (
    _op,
    dequantize_kv_reference,
    encode_kv,
    encode_kv_reference,
    encode_kv_triton,
    sides,
)
from rotq_kernels.kv.encode.one_side import dequantize_side, key_mean, quantize_side
from rotq_kernels.kv.format import KVConstants, KVFormat, KVPages, SideConstants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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


def dirty_pages(form: KVFormat, num_pages: int, num_heads: int) -> KVPages:
    """Pages with every bit set, so that bits not written show."""
    pages = KVPages.empty(form, num_pages, num_heads)
    for tensor in pages.tensors():
        tensor.view(torch.uint8).fill_(255)
    return pages


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


def on_device(holder: Any) -> Any:
    """A copy of a dataclass whose tensors lie where the kernel runs."""
    moved = {}
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(DEVICE)
        elif isinstance(value, SideConstants):
            moved[field.name] = on_device(value)
    return dataclasses.replace(holder, **moved)


def encode_by_kernel(
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    position_BT: torch.Tensor,
    slot_BT: torch.Tensor,
    transform: KVConstants,
    pages: KVPages,
) -> None:
    """``encode_kv_triton`` where it runs; ``pages`` are modified where they are."""
    tokens = (tensor.to(DEVICE) for tensor in (k_BHTD, v_BHTD, position_BT, slot_BT))
    there = on_device(pages)
    encode_kv_triton(*tokens, on_device(transform), there)
    for own, result in zip(pages.tensors(), there.tensors(), strict=True):
        own.copy_(result)


def assert_same_pages(actual: KVPages, expected: KVPages) -> None:
    for one, other in zip(actual.tensors(), expected.tensors(), strict=True):
        # bytes, as dirty fp16 is NaN
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


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
    assert tile(32, 300)["BLOCK_N"] > tile(32, 20)["BLOCK_N"]
    transform = exact_transform(form, 1)
    x_BHTD = torch.randint(-4, 5, (1, 1, 300, 32), generator=torch.Generator().manual_seed(3))
    slot_BT, _, num_pages = paged_slots([290], form.page_size)
    slot_BT = torch.nn.functional.pad(slot_BT, (10, 0), value=-1)
    pages, expected = dirty_pages(form, num_pages, 1), dirty_pages(form, num_pages, 1)
    position_BT = torch.arange(300)[None]
    for encode, out in ((encode_by_kernel, pages), (encode_kv_reference, expected)):
        encode(x_BHTD.float(), x_BHTD.float(), position_BT, slot_BT, transform, out)
    assert_same_pages(pages, expected)


@pytest.mark.parametrize("name", ["k3v3", "k2v6 qjl", "k7v3 none"])
def test_operator_is_what_it_says(name: str) -> None:
    """Aliasing and mutation as registered; CPU tensors run on the reference."""
    form = FORMATS[name]
    transform = transform_of(form, 2)
    k_BHTD, v_BHTD = tokens_of(transform, 2, 5)
    slot_BT, _, num_pages = paged_slots([5, 3], form.page_size)
    position_BT = torch.arange(5).expand(2, -1)
    pages, expected = dirty_pages(form, num_pages, 2), dirty_pages(form, num_pages, 2)
    for side in sides(k_BHTD, v_BHTD, transform, dirty_pages(form, num_pages, 2)):
        torch.library.opcheck(_op, (), {"position_BT": position_BT, "slot_BT": slot_BT, **side})
    encode_kv(k_BHTD, v_BHTD, position_BT, slot_BT, transform, pages)
    encode_kv_reference(k_BHTD, v_BHTD, position_BT, slot_BT, transform, expected)
    assert_same_pages(pages, expected)


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
