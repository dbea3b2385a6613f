"""Pages are found again, shared after a beam split, and nobody writes into another's."""

import random

import pytest
import torch

from rotq.kv.cache.pages import PageStore, PageTable
from rotq_kernels.kv.format import KVFormat

FORMAT = KVFormat(head_dim=16, k_bits=3, v_bits=2, page_size=16)


class Model:
    """Tokens as numbers, written through a table into one tensor, and what they should be."""

    def __init__(self, batch: int) -> None:
        self.table = PageTable(page_size=16, rows=[[] for _ in range(batch)])
        self.store = PageStore(FORMAT, 1, torch.device("cpu"))
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.next = 1

    def append(self, counts: list[int]) -> None:
        lengths = [len(row) for row in self.tokens]
        wanted = [length + count for length, count in zip(lengths, counts, strict=True)]
        copies = self.table.reserve(lengths, wanted)
        self.store.prepare(self.table.num_pages, copies)
        for b, count in enumerate(counts):
            for _ in range(count):
                at = len(self.tokens[b])
                page = self.table.rows[b][at // 16]
                self.store.pages.k_codes[page, 0, at % 16, 0] = self.next
                self.tokens[b].append(self.next)
                self.next += 1

    def select(self, indices: list[int]) -> None:
        self.table.select(indices)
        self.tokens = [list(self.tokens[index]) for index in indices]

    def crop(self, count: int) -> None:
        self.tokens = [row[: max(0, len(row) - count)] for row in self.tokens]
        self.table.crop([len(row) for row in self.tokens])

    def check(self) -> None:
        table_BJ = self.table.tensor()
        for b, tokens in enumerate(self.tokens):
            at = torch.arange(len(tokens))
            page = table_BJ[b, at // 16] if tokens else at
            assert self.store.pages.k_codes[page, 0, at % 16, 0].tolist() == tokens


def test_random_walk_of_all_operations() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    model = Model(3)
    for _ in range(200):
        kind = draw(10)
        if kind < 7:
            model.append([draw(9) if draw(4) else 20 for _ in model.tokens])
        elif kind < 8:
            model.crop(draw(12))
        else:
            model.select([draw(len(model.tokens)) for _ in range(1 + draw(4))])
        model.check()


def test_split_sequences_share_full_pages() -> None:
    model = Model(1)
    model.append([40])
    model.select([0, 0, 0])
    model.append([1, 1, 1])
    # two full pages are held by all, the last one is everybody's own
    assert [row[:2] for row in model.table.rows] == [model.table.rows[0][:2]] * 3
    assert len({row[2] for row in model.table.rows}) == 3
    assert model.table.num_pages == 5
    model.check()


def test_released_pages_are_used_again() -> None:
    model = Model(2)
    model.append([64, 64])
    before = model.table.num_pages
    model.crop(48)
    model.append([48, 48])
    assert model.table.num_pages == before
    model.check()


def test_front_pages_are_released() -> None:
    table = PageTable(page_size=16, rows=[[]])
    table.reserve([0], [64])
    first = table.rows[0][:2]
    table.drop_front(0, 2)
    table.reserve([32], [64])
    assert set(table.rows[0][2:]) == set(first)
    assert table.num_pages == 4


@pytest.mark.parametrize("length", [15, 16, 17, 1000, 8192])
def test_no_more_is_allocated_than_growth_allows(length: int) -> None:
    table = PageTable(page_size=16, rows=[[]])
    for have in range(0, length, 5):
        table.reserve([have], [min(have + 5, length)])
    assert table.num_pages <= (length + 15) // 16 * 65 / 64


def test_ragged_table_is_padded() -> None:
    table = PageTable(page_size=16, rows=[[], [], []])
    table.reserve([0, 0, 0], [0, 17, 3])
    assert table.tensor().tolist() == [[0, 0], [0, 1], [2, 0]]
    assert table.tensor().dtype == torch.int32


def test_store_of_no_pages() -> None:
    store = PageStore(FORMAT, 2, torch.device("cpu"))
    assert store.pages.nbytes == 0
    store.prepare(3, [])
    assert store.pages.nbytes == 3 * 16 * 2 * FORMAT.bytes_per_token


@pytest.mark.parametrize("seed", range(8))
def test_what_a_table_keeps_is_what_its_rows_say(seed: int) -> None:
    """After any calls: the tensor is that of the rows, and a page that is written has one owner."""
    draw, batch = random.Random(seed), 3
    table, lengths = PageTable(page_size=16), [0] * batch
    table.begin(batch)
    given_out: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(120):
        act = draw.choice(["reserve", "reserve", "reserve", "drop", "crop", "select", "release"])
        if act == "reserve":
            wanted = [length + draw.choice([0, 1, 1, 20]) for length in lengths]
            busy = list(table.rows[0]) if draw.random() < 0.2 else []
            for source, target in table.reserve(lengths, wanted, busy=busy):
                assert source != target
                assert target not in busy
            grown = [b for b in range(batch) if wanted[b] > lengths[b]]
            lengths = wanted
            for b in grown:
                written = table.rows[b][-1]
                assert sum(row.count(written) for row in table.rows) == 1
            assert all(page < table.num_pages for row in table.rows for page in row)
        elif act == "drop":
            b = draw.randrange(batch)
            pages = draw.randint(0, lengths[b] // 16)
            table.drop_front(b, pages)
            lengths[b] -= 16 * pages
        elif act == "crop":
            lengths = [draw.randint(0, length) for length in lengths]
            table.crop(lengths)
        elif act == "select":
            indices = [draw.randrange(batch) for _ in range(batch)]
            table.select(indices)
            lengths = [lengths[index] for index in indices]
        else:
            b = draw.randrange(batch)
            table.release(b)
            lengths[b] = 0
        found = table.tensor()
        assert found.shape == (batch, max(map(len, table.rows)))
        for b, row in enumerate(table.rows):
            assert found[b, : len(row)].tolist() == row
        given_out.append((found, found.clone()))
    assert all(torch.equal(*pair) for pair in given_out)
