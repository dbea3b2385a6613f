"""Promises, sharing and eviction of pages."""

import random

import pytest

from rotq.serve.engine.page_allocator import Allocation, PageAllocator, PagePool


def new_allocator(
    pages: int = 8, sinks: int = 2, held: int = 4, chunk_pages: int = 1
) -> PageAllocator:
    return PageAllocator(
        num_pages=pages, num_sinks=held, page_size=4, sinks=sinks, chunk_pages=chunk_pages
    )


def admit(allocator: PageAllocator, prompt: list[int], tokens: int) -> Allocation:
    allocation = allocator.admit(allocator.keys(prompt), tokens)
    assert allocation is not None
    return allocation


def compute(allocator: PageAllocator, prompt: list[int], tokens: int) -> Allocation:
    """A sequence that has computed its whole prompt."""
    allocation = admit(allocator, prompt, tokens)
    allocator.extend(allocation, len(prompt))
    allocator.publish(allocation, len(prompt))
    return allocation


def test_pages_for_counts_what_is_behind_the_sinks() -> None:
    assert [new_allocator().pages_for(n) for n in (0, 2, 3, 6, 7)] == [0, 0, 1, 1, 2]


def test_keys_stop_before_the_last_token_and_know_all_before_them() -> None:
    keys = new_allocator().keys(list(range(11)))
    assert len(keys) == 2
    assert new_allocator().keys(list(range(10))) == keys[:1]
    changed = new_allocator().keys([9, *range(1, 11)])
    assert not set(keys) & set(changed)


def test_a_prompt_is_found_with_its_sinks() -> None:
    allocator = new_allocator()
    first = compute(allocator, list(range(11)), 11)
    second = admit(allocator, [*range(10), 7, 7], 12)
    assert second.pages == first.pages[:2]
    assert second.sink == first.sink
    other = admit(allocator, [*range(6), 50, 51, 52, 53, 54], 11)
    assert other.pages == first.pages[:1]


def test_nothing_is_found_before_it_is_computed() -> None:
    allocator = new_allocator()
    first = admit(allocator, list(range(11)), 11)
    allocator.extend(first, 6)
    second = admit(allocator, list(range(11)), 11)
    assert second.pages == []
    allocator.publish(first, 5)
    assert not allocator.reuse(second)
    allocator.publish(first, 6)
    assert allocator.reuse(second)
    assert not allocator.reuse(second)
    assert (second.pages, second.sink) == (first.pages, first.sink)


def test_promises_are_kept() -> None:
    allocator = new_allocator(pages=4)
    first = admit(allocator, [1], 2 + 3 * 4)
    assert allocator.admit([], 2 + 2 * 4) is None
    second = admit(allocator, [2], 2 + 1 * 4)
    allocator.extend(second, 6)
    allocator.extend(first, 14)
    assert len({*first.pages, *second.pages}) == 4
    allocator.release(first)
    assert allocator.admit([], 2 + 3 * 4) is not None


def test_a_refused_sequence_leaves_no_trace() -> None:
    allocator = new_allocator(pages=4)
    kept = compute(allocator, list(range(11)), 11)
    assert allocator.admit(allocator.keys(list(range(11))), 2 + 5 * 4) is None
    allocator.release(kept)
    assert allocator.pages.available == 4
    assert allocator.admit([], 2 + 4 * 4) is not None


def test_sharing_makes_room() -> None:
    allocator = new_allocator(pages=4)
    compute(allocator, list(range(14)), 2 + 3 * 4)
    assert allocator.admit([], 2 + 2 * 4) is None
    assert allocator.admit(allocator.keys(list(range(14))), 2 + 3 * 4) is not None


def test_an_outgrown_promise_is_our_bug() -> None:
    allocator = new_allocator()
    allocation = admit(allocator, [1], 6)
    with pytest.raises(AssertionError, match="outgrew"):
        allocator.extend(allocation, 7)


def test_kept_pages_go_when_room_is_needed_the_oldest_first() -> None:
    allocator = new_allocator(pages=5)
    for start in (0, 100):
        allocator.release(compute(allocator, list(range(start, start + 11)), 11))
    assert allocator.pages.filled == 4
    allocator.release(admit(allocator, list(range(11)), 11))
    taken = admit(allocator, [5], 2 + 2 * 4)
    allocator.extend(taken, 10)
    allocator.release(taken)
    found = admit(allocator, list(range(11)), 11)
    assert len(found.pages) == 2
    allocator.release(found)
    # the end of a prompt goes before its beginning
    assert len(admit(allocator, list(range(100, 111)), 11).pages) == 1


def test_a_page_without_its_sinks_is_not_found() -> None:
    allocator = new_allocator(pages=8, held=1)
    allocator.release(compute(allocator, list(range(11)), 11))
    allocator.release(admit(allocator, [5], 6))
    assert admit(allocator, list(range(11)), 11).pages == []


def test_without_sinks() -> None:
    allocator = new_allocator(sinks=0, held=0)
    first = compute(allocator, list(range(9)), 9)
    assert admit(allocator, list(range(9)), 9).pages == first.pages[:2]
    assert first.sink is None


def test_a_chunk_is_found_whole_or_not_at_all() -> None:
    allocator = new_allocator(pages=24, chunk_pages=2)
    first = compute(allocator, list(range(20)), 20)
    assert len(first.keys) == 4
    assert admit(allocator, list(range(19)), 19).pages == first.pages[:4]
    # the third page is the same, the chunk that it is in is not
    assert admit(allocator, [*range(14), 70, 71, 72, 73, 74], 19).pages == first.pages[:2]
    assert admit(allocator, list(range(10)), 10).pages == []


def test_a_chunk_of_which_a_page_has_gone_is_not_found() -> None:
    allocator = new_allocator(pages=4, chunk_pages=2)
    allocator.release(compute(allocator, list(range(11)), 11))
    allocator.release(compute(allocator, list(range(50, 63)), 13))
    again = admit(allocator, list(range(11)), 11)
    assert again.pages == []
    assert again.promised == 3


def test_a_pool_takes_free_places_before_kept_ones() -> None:
    pool = PagePool(2)
    place = pool.take()
    pool.publish(place, b"a")
    pool.release(place)
    assert pool.take() != place
    assert pool.has(b"a")
    assert pool.hold(b"a") == place
    assert pool.available == 0


@pytest.mark.parametrize("chunk_pages", [1, 2])
def test_random_use_never_double_books(chunk_pages: int) -> None:
    """A model of the allocator: who wrote which page last, and that readers still find it."""
    random_ = random.Random(0)
    allocator = new_allocator(pages=12, held=5, chunk_pages=chunk_pages)
    running: list[tuple[list[int], Allocation, int]] = []
    written: dict[int, bytes] = {}
    for _ in range(4000):
        if running and random_.random() < 0.5:
            prompt, allocation, tokens = running.pop(random_.randrange(len(running)))
            for page, key in zip(allocation.pages, allocator.keys(prompt), strict=False):
                assert written[page] == key
            own = allocation.pages[len(allocator.keys(prompt)) :]
            allocator.extend(allocation, tokens)
            others = [page for _, other, _ in running for page in other.pages]
            assert not set(own) & set(others)
            allocator.release(allocation)
            continue
        prompt = [random_.randrange(2) for _ in range(random_.randrange(1, 16))]
        tokens = len(prompt) + random_.randrange(12)
        admitted = allocator.admit(allocator.keys(prompt), tokens)
        if admitted is None:
            continue
        found = len(admitted.pages)
        allocator.extend(admitted, len(prompt))
        for page, key in list(zip(admitted.pages, allocator.keys(prompt), strict=False))[found:]:
            written[page] = key
        for page in admitted.pages[len(allocator.keys(prompt)) :]:
            written[page] = b""
        allocator.publish(admitted, len(prompt))
        running.append((prompt, admitted, tokens))
    for _, allocation, _ in running:
        allocator.release(allocation)
    assert allocator.pages.available == 12
    assert allocator.first.available == 5
