"""Pages that are parts of larger blocks, and packed tokens that are hidden."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_device import attend_by_kernel, encode_by_kernel
from kv_cases import in_blocks, paged_slots, tokens_of, transform_of
from torch import Tensor

from rotq_kernels.kv.attention import (
    packed_attention,
    packed_attention_reference,
)
from rotq_kernels.kv.encode.reference import encode_kv_reference
from rotq_kernels.kv.encoding import encode_kv
from rotq_kernels.kv.format import DenseKV, KVConstants, KVFormat, KVHistory, KVPages

LENGTHS = [37, 21]
FORMATS = {
    "k3v2 qjl": KVFormat(head_dim=32, k_bits=3, v_bits=2, page_size=16, residual="qjl"),
    "k3v3 width 64": KVFormat(head_dim=64, k_bits=3, v_bits=3, page_size=64),
    "k5v4 fp16": KVFormat(head_dim=64, k_bits=5, v_bits=4, page_size=32, norm="float16"),
}
HEADS = 2
Encode = Callable[[Tensor, Tensor, Tensor, Tensor, KVConstants, KVPages], None]
Attend = Callable[..., Tensor]


def encoded(form: KVFormat, pages: KVPages, encode: Encode) -> tuple[KVConstants, Tensor]:
    """Write both sequences; their constants and page table."""
    constants = transform_of(form, HEADS)
    slot_BT, table_BJ, _ = paged_slots(LENGTHS, form.page_size)
    k_BHTD, v_BHTD = tokens_of(constants, len(LENGTHS), max(LENGTHS))
    position_BT = torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1)
    encode(k_BHTD, v_BHTD, position_BT, slot_BT, constants, pages)
    return constants, table_BJ


def history_of(pages: KVPages, constants: KVConstants, table_BJ: Tensor) -> KVHistory:
    return KVHistory(
        pages=pages,
        page_table_BJ=table_BJ,
        length_B=torch.tensor(LENGTHS, dtype=torch.int32),
        start_B=torch.zeros(2, dtype=torch.int32),
        constants=constants,
    )


def asked(form: KVFormat, tokens: int) -> tuple[Tensor, Tensor]:
    """Queries behind all tokens, of four heads, and their positions."""
    generator = torch.Generator().manual_seed(2)
    q_BMTD = torch.randn(2, 2 * HEADS, tokens, form.head_dim, generator=generator)
    return q_BMTD, torch.tensor(LENGTHS, dtype=torch.int32)[:, None] + torch.arange(
        tokens, dtype=torch.int32
    )


@pytest.mark.parametrize("encode", [encode_kv_reference, encode_by_kernel, encode_kv])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_written_into_blocks(name: str, encode: Encode) -> None:
    form = FORMATS[name]
    num_pages = paged_slots(LENGTHS, form.page_size)[2]
    whole, (pages, block_PC) = (
        KVPages.empty(form, num_pages, HEADS),
        in_blocks(form, num_pages, HEADS),
    )
    assert pages.has_whole_pages
    assert not pages.k_codes.is_contiguous()
    for target in (whole, pages):
        encoded(form, target, encode)
    for there, here in zip(whole.tensors(), pages.tensors(), strict=True):
        assert torch.equal(there, here)
    assert bool(block_PC[:, :32].eq(0xA5).all() and block_PC[:, -32:].eq(0xA5).all())


@pytest.mark.parametrize(
    ("name", "tokens", "attend"),
    [
        *itertools.product(FORMATS, [1, 18], [packed_attention]),
        *[("k3v2 qjl", 1, attend_by_kernel), ("k3v2 qjl", 18, attend_by_kernel)],
        *[("k3v3 width 64", 1, attend_by_kernel), ("k5v4 fp16", 18, attend_by_kernel)],
    ],
)
def test_attention_reads_blocks(name: str, tokens: int, attend: Attend) -> None:
    form = FORMATS[name]
    num_pages = paged_slots(LENGTHS, form.page_size)[2]
    q_BMTD, position_BT = asked(form, tokens)
    answers = []
    for pages in (KVPages.empty(form, num_pages, HEADS), in_blocks(form, num_pages, HEADS)[0]):
        history = history_of(pages, *encoded(form, pages, encode_kv_reference))
        answers.append(attend(q_BMTD, position_BT, history, scale=0.2))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("hidden", "tokens", "attend"),
    [
        *itertools.product([[0, 4], [17, 40]], [1, 18], [packed_attention]),
        ([0, 4], 1, attend_by_kernel),
        ([17, 40], 18, attend_by_kernel),
    ],
)
def test_hidden_tokens_are_as_if_they_were_not_there(
    hidden: list[int], tokens: int, attend: Attend
) -> None:
    """A history whose visible tokens are moved to the front, so that nothing must be hidden."""
    form = FORMATS["k3v2 qjl"]
    constants = transform_of(form, HEADS)
    k_BHTD, v_BHTD = tokens_of(constants, 2, max(LENGTHS))
    q_BMTD, position_BT = asked(form, tokens)
    k_BHND, v_BHND = tokens_of(constants, 2, 3, seed=4)
    dense = DenseKV(
        k_BHND=k_BHND,
        v_BHND=v_BHND,
        position_BN=torch.tensor([[0, 1, -1], [2, -1, 3]], dtype=torch.int32),
    )
    left = [max(0, length - gone) for length, gone in zip(LENGTHS, hidden, strict=True)]
    answers = []
    for lengths, starts in ((LENGTHS, [0, 0]), (left, hidden)):
        slot_BT, table_BJ, num_pages = paged_slots(lengths, form.page_size)
        pages = KVPages.empty(form, max(1, num_pages), HEADS)
        for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            here = slice(start, start + length)
            k_1HTD, v_1HTD = k_BHTD[b : b + 1, :, here], v_BHTD[b : b + 1, :, here]
            position_1T = torch.arange(start, start + length)[None]
            slot_1T = slot_BT[b : b + 1, :length]
            encode_kv_reference(k_1HTD, v_1HTD, position_1T, slot_1T, constants, pages)
        history = history_of(pages, constants, table_BJ)
        history.length_B = torch.tensor(lengths, dtype=torch.int32)
        history.start_B = torch.tensor(starts, dtype=torch.int32)
        history.dense = dense
        if lengths is LENGTHS:
            history.hidden_B = torch.tensor(hidden, dtype=torch.int32)
            answers.append(packed_attention_reference(q_BMTD, position_BT, history, scale=0.2))
        answers.append(attend(q_BMTD, position_BT, history, scale=0.2))
    for found in answers[:2]:
        torch.testing.assert_close(found, answers[2], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("attend", [packed_attention, attend_by_kernel])
@pytest.mark.parametrize("window", [7])
def test_a_window_and_hidden_tokens(window: int, attend: Attend) -> None:
    form = FORMATS["k3v3 width 64"]
    pages = KVPages.empty(form, paged_slots(LENGTHS, form.page_size)[2], HEADS)
    history = history_of(pages, *encoded(form, pages, encode_kv_reference))
    history.window, history.hidden_B = window, torch.tensor([10, 19], dtype=torch.int32)
    q_BMTD, position_BT = asked(form, 3)
    found = attend(q_BMTD, position_BT, history, scale=0.2)
    # a query sees what is both near and not hidden: each as far as the nearer bound says
    for b, t in ((0, 0), (0, 2), (1, 0), (1, 2)):
        near = int(position_BT[b, t]) - int(history.hidden_B[b]) + 1
        alone = replace(history, hidden_B=None, window=min(window, near))
        expected = packed_attention_reference(q_BMTD, position_BT, alone, scale=0.2)
        torch.testing.assert_close(found[b, :, t], expected[b, :, t], rtol=2e-5, atol=2e-5)


def test_hidden_numbers_are_checked() -> None:
    form = FORMATS["k3v3 width 64"]
    pages = KVPages.empty(form, 2, HEADS)
    history = history_of(pages, *encoded(form, pages, encode_kv_reference))
    history.hidden_B = torch.tensor([4, 4])
    q_BMTD, position_BT = asked(form, 1)
    with pytest.raises(ValueError, match=r"hidden must be int32 \(2,\)"):
        packed_attention(q_BMTD, position_BT, history, scale=0.2)
