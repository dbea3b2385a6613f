"""PackedCache on pages as vLLM's blocks have them, against pages of its own.

There are gaps between the pages of each plane, full of other bytes, and the first packed tokens of
a sequence are hidden behind others.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import in_blocks
from kv_oracle import calibration_of
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.kv.cache import attention, layer
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.cache.pages import PageStore
from rotq.ops import KVFormat, KVHistory, packed_attention

HIDDEN = (4, 17)
"""Tokens before the first packed one: less than a page, and more."""


class BlockStore(PageStore):
    """Pages that are parts of blocks; every other byte of a block stays as it is."""

    made: list["BlockStore"]

    def __init__(self, format: KVFormat, num_heads: int, device: torch.device) -> None:
        self.num_heads = num_heads
        self.pages, self.block_PC = in_blocks(format, 0, num_heads)
        self.made.append(self)

    def _grow(self, num_pages: int) -> None:
        before = self.pages
        self.pages, self.block_PC = in_blocks(before.format, num_pages, self.num_heads)
        for old, new in zip(before.tensors(), self.pages.tensors(), strict=True):
            new[: len(old)] = old

    def assert_gaps_are_whole(self) -> None:
        assert all(gap for gap in self.pages.gaps.values() if gap is not None)
        assert bool(self.block_PC[:, :32].eq(0xA5).all())
        assert bool(self.block_PC[:, -32:].eq(0xA5).all())


def behind(history: KVHistory, count: int) -> KVHistory:
    """The same tokens, each sequence's ``count`` places further, behind codes that are nobody's."""
    pages, table_BJ = history.pages, history.page_table_BJ.long()
    size, batch = pages.format.page_size, len(table_BJ)
    length_B = history.length_B + count
    needed = -(-int(length_B.max()) // size)
    moved, block_PC = in_blocks(pages.format, batch * needed, pages.k_codes.shape[1])
    block_PC.random_(generator=torch.Generator().manual_seed(0))
    for b, length in enumerate(history.length_B.tolist()):
        here, there = torch.arange(length), torch.arange(length) + count
        for old, new in zip(pages.tensors(), moved.tensors(), strict=True):
            held = old[table_BJ[b, here // size], :, here % size]
            new[b * needed + there // size, :, there % size] = held
    table = torch.arange(batch * needed, dtype=torch.int32).view(batch, needed)
    return replace(
        history,
        pages=moved,
        page_table_BJ=table,
        length_B=length_B,
        start_B=history.start_B - count,
        hidden_B=torch.full_like(length_B, count),
    )


def walk(model: Any, **options: Any) -> Tensor:
    """Logits of a ragged batch in passes and steps, cropped, and with its rows exchanged."""
    cache = PackedCache(model, calibration_of(model, **options))
    cache.activate_past_recording()
    ids_BT, mask_BT = random_ids(3, 60), torch.ones(3, 60, dtype=torch.int64)
    mask_BT[1, :9] = 0
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    found, at = [], 0

    def run(length: int) -> None:
        nonlocal at
        now = slice(at, at + length)
        at += length
        logits = model(
            input_ids=ids_BT[:, now],
            past_key_values=cache,
            attention_mask=mask_BT[:, :at],
            position_ids=position_BT[:, now],
        ).logits
        found.append(torch.where(mask_BT[:, now, None].bool(), logits, 0))

    for length in (23, 1, 1, 12, 1):
        run(length)
    cache.crop(-5)
    at -= 5
    run(3)
    chosen = torch.tensor([2, 2, 1])
    cache.reorder_cache(chosen)
    mask_BT, position_BT = mask_BT[chosen], position_BT[chosen]
    for length in (1, 9, 1):
        run(length)
    return torch.cat(found, dim=1)


CASES = {
    "llama": {},
    "llama recent, qjl": {"recent": 3, "residual": "qjl"},
    "mistral sign": {"residual": "sign"},
    "gemma3 without sinks": {"sinks": 0},
    "qwen3 static": {"mean": "static"},
}
DTYPES = {"fp64": (torch.float64, 1e-10), "fp32": (torch.float32, 1e-5)}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_gaps_between_pages_change_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(case.split()[0], dtype=torch.float32)
    expected = walk(model, **CASES[case])
    monkeypatch.setattr(layer, "PageStore", BlockStore)
    monkeypatch.setattr(BlockStore, "made", [], raising=False)
    assert torch.equal(walk(model, **CASES[case]), expected)
    stores = [store for store in BlockStore.made if len(store.block_PC)]
    assert stores
    for store in stores:
        store.assert_gaps_are_whole()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hidden_tokens_change_nothing(
    case: str, hidden: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, near = DTYPES[dtype]
    model = tiny_model(case.split()[0], dtype=kind)
    expected = walk(model, **CASES[case])
    calls = 0

    def hiding(q: Tensor, position: Tensor, history: KVHistory, **more: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return packed_attention(q, position, behind(history, hidden), **more)

    monkeypatch.setattr(attention, "packed_attention", hiding)
    found = walk(model, **CASES[case])
    assert calls
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
