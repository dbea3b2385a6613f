"""Every token is in one place, with its own content, after any order of operations."""

from dataclasses import dataclass, field

import pytest
import torch
from kv_cases import transform_of
from kv_oracle import calibration_with
from torch import Tensor

from rotq.kv.cache.layer import PackedLayer
from rotq.kv.cache.pages import PageTable
from rotq.kv.cache.placement import Placement
from rotq.kv.cache.sequences import Sequences
from rotq.ops import KVFormat, dequantize_kv_reference

FORM = KVFormat(head_dim=16, k_bits=3, v_bits=8, page_size=16)


@dataclass
class Walk:
    """A layer, and the value of every token of every sequence."""

    sinks: int
    recent: int
    window: int
    first: list[int]
    generator: torch.Generator
    values: list[Tensor] = field(default_factory=list)
    recording: bool = False

    def __post_init__(self) -> None:
        self.sequences = Sequences(sinks=self.sinks, recent=self.recent)
        table = PageTable(page_size=FORM.page_size)
        self.placement = Placement(sequences=self.sequences, table=table, window=self.window)
        self.layer = PackedLayer(calibration_with(transform_of(FORM, 1)), 0, self.placement)
        self.values = [torch.zeros(0, 16) for _ in self.first]
        self.columns: list[Tensor] = []

    def draw(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))

    def step(self, length: int) -> None:
        """Feed tokens and padding, and look at what the queries are shown."""
        batch = len(self.first)
        there = torch.rand(batch, length, generator=self.generator) < 0.8
        counts = torch.tensor([len(value) for value in self.values])
        number = counts[:, None] + there.cumsum(1) - 1
        position = torch.tensor(self.first)[:, None] + number
        mask = torch.cat([*self.columns, there], dim=1)
        step = self.sequences.plan(batch, length, mask, position)
        layout = self.placement.begin(step, recording=self.recording)
        fresh = torch.randn(batch, 1, length, 16, generator=self.generator)
        self.layer.layout = layout
        self.layer.update(fresh, fresh)
        visible = self.layer.visible
        assert visible is not None
        history, dense = visible.history, visible.history.dense
        assert dense is not None
        for b in range(batch):
            self.values[b] = torch.cat((self.values[b], fresh[b, 0, there[b]]))
        self.columns.append(there)
        _, v_hat = dequantize_kv_reference(
            history.pages, layout.page_table_BJ, layout.length_B, layout.start_B, history.constants
        )
        for b in range(batch):
            found = {}
            for j in range(int(layout.length_B[b])):
                found[int(layout.start_B[b]) + j] = v_hat[b, 0, j]
            for n, at in enumerate(dense.position_BN[b].tolist()):
                if at >= 0:
                    assert at not in found, "a token in two places"
                    found[at] = dense.v_BHND[b, 0, n]
            self.check(b, int(counts[b]), found)
        self.layer.encode_rest()
        self.layer.layout = self.layer.visible = None
        self.sequences.advance(step)

    def check(self, b: int, before: int, found: dict[int, Tensor]) -> None:
        """Whatever the first new token sees is there, and is what it should be."""
        oldest = max(0, before + 1 - self.window) if self.window else 0
        whole = {*range(self.sinks), *range(max(0, before - self.recent), len(self.values[b]))}
        for number in range(oldest, len(self.values[b])):
            value = found[self.first[b] + number]
            expected = self.values[b][number]
            error = (value - expected).norm() / expected.norm()
            assert error == 0 if number in whole else 0 < error < 0.1

    def select(self, indices: list[int]) -> None:
        self.first = [self.first[index] for index in indices]
        self.values = [self.values[index] for index in indices]
        self.columns = [torch.cat(self.columns, dim=1)[indices]]
        self.sequences.select(indices)
        self.placement.select(indices)
        self.layer.select(indices)

    def crop(self, columns: int) -> None:
        counts = self.sequences.without_last(columns)
        self.placement.check_crop(counts)
        self.layer.hold(self.placement.crop(counts, columns))
        self.sequences.crop(columns)
        there = torch.cat(self.columns, dim=1)
        self.columns = [there[:, : there.shape[1] - columns]]
        self.values = [value[:count] for value, count in zip(self.values, counts, strict=True)]


@pytest.mark.parametrize("window", [0, 9, 40])
@pytest.mark.parametrize("recent", [0, 5])
def test_random_walk(window: int, recent: int) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        walk = Walk(3, recent, window, first=[0, 7, 100], generator=generator)
        for _ in range(25):
            kind = walk.draw(10)
            if kind < 6:
                walk.step(1 + walk.draw(3))
            elif kind < 7:
                walk.step(1 + walk.draw(70))
            elif kind < 8 and walk.columns:
                walk.select([walk.draw(len(walk.first)) for _ in range(3)])
            elif walk.columns:
                walk.recording = True
                lengths = [1 + walk.draw(30) for _ in range(1 + walk.draw(3))]
                for length in lengths:
                    walk.step(length)
                walk.crop(walk.draw(sum(lengths) + 1))
                walk.recording = False


def test_long_prefill_of_a_sliding_layer_holds_its_window_only() -> None:
    walk = Walk(3, 0, 20, first=[0], generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        walk.step(400)
    # three pages that the queries see, and three for the tokens that will be seen
    assert walk.placement.table.num_pages <= 6
