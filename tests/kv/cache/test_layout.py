"""A layout on another device: the same kind, made once; and what the host knows of a long chunk."""

import pytest
import torch
from torch import Tensor

from rotq.kv.cache import layout as layouts
from rotq.kv.cache.layout import Layout, extent_of
from rotq.kv.cache.pages import PageTable
from rotq.kv.cache.placement import Placement
from rotq.kv.cache.sequences import Sequences
from rotq.kv.pool.pool import Row, lay_out


def test_other_device() -> None:
    layout = lay_out([Row(pages=[0], sink=1, fresh=3)], 3, sinks=2, table_width=1)
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to(torch.device("meta"))
    assert layout.to(torch.device("meta")) is moved
    assert type(moved) is type(layout)
    tensors = {name: value for name, value in vars(layout).items() if torch.is_tensor(value)}
    assert len(tensors) == 9
    for name, tensor in tensors.items():
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == tensor.shape


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "WHOLE_TOKENS", 5)


def holds(layout: Layout) -> bool:
    """Whether its extent says what its positions do, by ``packed_attention``'s definition."""
    extent, query_BT = layout.extent, layout.query_position_BT
    assert extent is not None
    token_N = torch.arange(extent.packed)
    packed_BN = (layout.start_B[:, None] + token_N).where(token_N < layout.length_B[:, None], -1)
    before_BN = layout.dense_position_BN[:, : extent.skipped]
    key_BN = torch.cat((packed_BN, layout.dense_position_BN[:, extent.skipped :]), dim=1)
    ahead_BTN = query_BT[:, :, None] - key_BN[:, None]
    seen_BTN = (key_BN[:, None] >= 0) & (ahead_BTN >= 0)
    (T, N), there_BT = seen_BTN.shape[1:], query_BT >= 0
    wanted_TN = torch.ones(T, N, dtype=torch.bool).tril(N - T)
    same = bool((seen_BTN == wanted_TN).all(-1)[there_BT].all())
    return same and bool((before_BN < 0).all()) and int(query_BT.max()) + 1 == extent.end


@pytest.mark.parametrize(("count", "fresh"), [(0, 9), (0, 4), (3, 9), (70, 2), (67, 9)])
def test_the_extent_of_a_pools_chunk(count: int, fresh: int) -> None:
    rows = [Row(pages=[3, 1], count=count, fresh=fresh)]
    assert holds(lay_out(rows, 9, sinks=3, table_width=2))


def test_chunks_without_an_extent() -> None:
    def of(*rows: Row, length: int = 9) -> Layout:
        return lay_out(rows, length, sinks=3, table_width=2)

    assert of(Row(pages=[0], count=20, fresh=4), length=4).extent is None
    # some sinks are there, and some are not
    assert of(Row(pages=[0], count=2, fresh=9)).extent is None
    assert of(Row(pages=[0], count=20, fresh=9), Row(pages=[1], count=21, fresh=9)).extent is None
    both = of(Row(pages=[0], count=20, fresh=9), Row(pages=[1], count=20, fresh=7))
    assert holds(both)


def caches_layout(sizes: list[int], mask_BN: Tensor | None, *, recent: int = 4) -> Layout:
    """Of the last of some passes with two sequences."""
    sequences = Sequences(sinks=2, recent=recent)
    placement = Placement(sequences=sequences, table=PageTable(page_size=16), window=0)
    for size in sizes:
        end = sequences.num_columns + size
        mask = None if mask_BN is None else mask_BN[:, :end]
        position_BT = None
        if mask is not None:
            position_BT = (mask.cumsum(1) - 1).clamp(min=0)[:, -size:]
        step = sequences.plan(2, size, mask, position_BT)
        found = placement.begin(step, recording=False)
        sequences.advance(step)
    return found


@pytest.mark.parametrize("sizes", [[9], [3, 9], [30, 1, 9]])
@pytest.mark.parametrize("recent", [0, 4])
def test_the_extent_of_a_caches_chunk(sizes: list[int], recent: int) -> None:
    assert holds(caches_layout(sizes, None, recent=recent))


def test_padding_in_front_has_no_extent() -> None:
    mask_BN = torch.ones(2, 12, dtype=torch.bool)
    mask_BN[1, :2] = False
    assert caches_layout([12], mask_BN).extent is None
    # nor has what is of another length for it
    assert caches_layout([5, 7], mask_BN).extent is None
    assert extent_of(*[torch.zeros(1, 0, dtype=torch.int32)] * 3) is None
