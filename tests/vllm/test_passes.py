"""Where batches are cut."""

import pytest

from rotq.vllm.passes import Request, batches, requests_of, tokens_to_run


def test_requests_of_a_batch() -> None:
    found = requests_of([0, 3, 3, 4], [10, 5, 1])
    assert found == [
        Request(row=0, first=0, count=3, before=7),
        Request(row=2, first=3, count=1, before=0),
    ]


@pytest.mark.parametrize(
    ("before", "count", "ends"),
    [(0, 150, [64, 128, 150]), (128, 22, [150]), (60, 5, [64, 65]), (0, 64, [64]), (70, 1, [71])],
)
def test_passes_end_where_blocks_do(before: int, count: int, ends: list[int]) -> None:
    parts = list(Request(row=1, first=9, count=count, before=before).passes(64))
    assert [part.before + part.count for part in parts] == ends
    assert [part.first for part in parts] == [9 + part.before - before for part in parts]
    assert parts[0].before == before
    assert {part.row for part in parts} == {1}


def test_single_tokens_are_one_pass() -> None:
    requests = requests_of([0, 1, 71, 72], [5, 70, 100])
    found = list(batches(requests, 64))
    assert [[(part.row, part.count) for part in parts] for parts in found] == [
        [(0, 1), (2, 1)],
        [(1, 64)],
        [(1, 6)],
    ]


@pytest.mark.parametrize(
    ("number", "before", "prompt", "kept"),
    [
        (100, 0, 300, 64),
        (100, 64, 300, 64),
        (100, 64, 164, 100),
        (40, 0, 300, 0),
        (40, 64, 300, 0),
        (1, 170, 170, 1),
        (9, 170, 170, 1),
        (30, 150, 170, 20),
        (0, 170, 170, 0),
        (64, 0, 300, 64),
        (30, 40, 300, 24),
    ],
)
def test_prompts_are_cut_where_blocks_end(number: int, before: int, prompt: int, kept: int) -> None:
    assert tokens_to_run(number, before, prompt, 64) == kept
