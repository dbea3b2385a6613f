"""Texts of any length meet the kernels that a short one has met: nothing is compiled in between."""

import copy
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import in_blocks, transform_of
from specializations import Variants
from stubbed_step import stubbed

from rotq_kernels.kv.attention import packed_attention_triton
from rotq_kernels.kv.decode.tables import decode_tables
from rotq_kernels.kv.encode.launch import encode_kv_triton
from rotq_kernels.kv.format import DenseKV, KVFormat, KVHistory, KVPages

FORM = KVFormat(head_dim=128, k_bits=3, v_bits=3)
CONSTANTS = transform_of(FORM, 2)
PAGES = KVPages.empty(FORM, 1, 2)


def attend(
    number: int,
    tokens: int,
    splits: int | None = None,
    before: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 8,
    **changes: Any,
) -> None:
    """A chunk of a sequence that has so many pages."""
    k_BHND = torch.zeros(1, 2, before + tokens, 128, dtype=dtype)
    position_BT = torch.zeros(1, tokens, dtype=torch.int32)
    none_B = torch.zeros(1, dtype=torch.int32)
    history = KVHistory(
        pages=PAGES,
        page_table_BJ=torch.zeros(1, number, dtype=torch.int32),
        length_B=none_B,
        start_B=none_B,
        constants=CONSTANTS,
        dense=DenseKV(
            k_BHND=k_BHND,
            v_BHND=k_BHND,
            position_BN=torch.zeros(1, before + tokens, dtype=torch.int32),
        ),
    )
    q_BMTD = torch.zeros(1, heads, tokens, 128, dtype=dtype)
    changed = replace(history, **changes)
    packed_attention_triton(q_BMTD, position_BT, changed, scale=1.0, splits=splits)


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


def test_kernels_are_kept_by_all_that_they_are_compiled_for() -> None:
    """Of steps whose launches look at no argument, each meets the kernel that Triton would give."""
    variants, half = Variants(), torch.float16
    buffer = torch.zeros(1, 2, 6, 136, dtype=half)
    odd = DenseKV(
        k_BHND=buffer[..., 1:5, :128],
        v_BHND=buffer[..., 1:5, 8:],
        position_BN=torch.zeros(1, 4, dtype=torch.int32),
    )
    moved = replace(odd, k_BHND=buffer[..., 1:5, 1:129])
    one_B = torch.zeros(2, dtype=torch.int32)[1:]
    blocks, _ = in_blocks(FORM, 3, 2)
    with stubbed(Counter(), variants.note):
        for _ in range(2):
            for changes in (
                {},
                {"heads": 4},
                {"dtype": half},
                {"window": 100},
                {"dense": None},
                {"dense": odd},
                {"dense": moved, "dtype": half},
                {"hidden_B": torch.zeros(1, dtype=torch.int32)},
                {"length_B": one_B},
                {"pages": blocks},
            ):
                attend(3, 1, **changes)
                attend(40, 2, 7, 12, **changes)
    assert {len(keys) for keys in variants.keys.values()} == {1}
    # three kernels each; two that are not aligned are looked at
    assert len(variants.keys) == 3 * 2 * 8


def test_copies_of_constants_know_no_kernels() -> None:
    tables = decode_tables(CONSTANTS, 64, exact=False)
    tables.known["key"][test_copies_of_constants_know_no_kernels] = object(), ()
    copied = copy.deepcopy(CONSTANTS)
    assert not decode_tables(copied, 64, exact=False).known["key"]
    assert pickle.loads(pickle.dumps(tables)).known["key"] == {}
