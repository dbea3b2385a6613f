"""Texts of any length meet the kernels that a short one has met: nothing is compiled in between."""

from collections import Counter

import pytest
import torch
from kv_cases import transform_of
from specializations import Variants
from stubbed_step import stubbed

from rotq_kernels.kv.attention import packed_attention_triton
from rotq_kernels.kv.encode.launch import encode_kv_triton
from rotq_kernels.kv.format import DenseKV, KVFormat, KVHistory, KVPages

FORM = KVFormat(head_dim=128, k_bits=3, v_bits=3)
CONSTANTS = transform_of(FORM, 2)
PAGES = KVPages.empty(FORM, 1, 2)


def attend(pages: int, tokens: int, splits: int | None = None, dense: int = 4) -> None:
    """A chunk of a sequence that has so many pages."""
    k_BHND = torch.zeros(1, 2, dense + tokens, 128)
    position_BT = torch.zeros(1, tokens, dtype=torch.int32)
    none_B = torch.zeros(1, dtype=torch.int32)
    history = KVHistory(
        pages=PAGES,
        page_table_BJ=torch.zeros(1, pages, dtype=torch.int32),
        length_B=none_B,
        start_B=none_B,
        constants=CONSTANTS,
        dense=DenseKV(
            k_BHND=k_BHND,
            v_BHND=k_BHND,
            position_BN=torch.zeros(1, dense + tokens, dtype=torch.int32),
        ),
    )
    packed_attention_triton(
        torch.zeros(1, 8, tokens, 128), position_BT, history, scale=1.0, splits=splits
    )


@pytest.mark.parametrize("tokens", [1, 33], ids=["decode", "prefill"])
def test_attention_of_any_length(tokens: int) -> None:
    variants = Variants()
    with stubbed(Counter(), variants.note):
        for pages, splits in [(1, 1), (2, 2), (16, 16), (17, 33), (2048, 256), (2049, 5)]:
            for dense in (4, 132):
                attend(pages, tokens + (pages % 3) * (tokens > 1), splits, dense)
    names = ("turn", "decode", "merge") if tokens == 1 else ("packed", "dense_chunk")
    assert variants.counts() == {f"{name}_kernel": 1 for name in names}


def test_encoding_of_any_length() -> None:
    variants = Variants()
    with stubbed(Counter(), variants.note):
        for tokens in (1, 2, 16, 17, 256, 1000):
            k_BHTD = torch.zeros(1, tokens, 2, 128).transpose(1, 2)
            place_BT = torch.zeros(1, tokens, dtype=torch.int64)
            encode_kv_triton(k_BHTD, k_BHTD, place_BT, place_BT, CONSTANTS, PAGES)
    # keys and values
    assert variants.counts() == {"encode_kernel": 2}


def test_a_number_that_is_not_excluded_shows() -> None:
    variants = Variants()
    with stubbed(Counter(), variants.note):
        for width in (2, 3):
            pages = KVPages.empty(KVFormat(head_dim=128, k_bits=width, v_bits=3), 1, 2)
            constants = transform_of(pages.format, 2)
            k_BHTD, place_BT = torch.zeros(1, 2, 1, 128), torch.zeros(1, 1, dtype=torch.int64)
            encode_kv_triton(k_BHTD, k_BHTD, place_BT, place_BT, constants, pages)
    assert variants.counts() == {"encode_kernel": 3}
