"""Promises, sharing and eviction of pages."""

import random

import pytest

from rotq.serve.engine.page_allocator import Lease, Ledger, Shelf


def ledger(pages: int = 8, sinks: int = 2, held: int = 4) -> Ledger:
    return Ledger(num_pages=pages, num_sinks=held, page_size=4, sinks=sinks)


def admit(ledger: Ledger, prompt: list[int], tokens: int) -> Lease:
    lease = ledger.admit(ledger.keys(prompt), tokens)
    assert lease is not None
    return lease


def compute(ledger: Ledger, prompt: list[int], tokens: int) -> Lease:
    """A sequence that has computed its whole prompt."""
    lease = admit(ledger, prompt, tokens)
    ledger.extend(lease, len(prompt))
    ledger.publish(lease, len(prompt))
    return lease


def test_pages_for_counts_what_is_behind_the_sinks() -> None:
    assert [ledger().pages_for(n) for n in (0, 2, 3, 6, 7)] == [0, 0, 1, 1, 2]


def test_keys_stop_before_the_last_token_and_know_all_before_them() -> None:
    keys = ledger().keys(list(range(11)))
    assert len(keys) == 2
    assert ledger().keys(list(range(10))) == keys[:1]
    changed = ledger().keys([9, *range(1, 11)])
    assert not set(keys) & set(changed)


def test_a_prompt_is_found_with_its_sinks() -> None:
    book = ledger()
    first = compute(book, list(range(11)), 11)
    second = admit(book, [*range(10), 7, 7], 12)
    assert second.pages == first.pages[:2]
    assert second.sink == first.sink
    other = admit(book, [*range(6), 50, 51, 52, 53, 54], 11)
    assert other.pages == first.pages[:1]


def test_nothing_is_found_before_it_is_computed() -> None:
    book = ledger()
    first = admit(book, list(range(11)), 11)
    book.extend(first, 6)
    second = admit(book, list(range(11)), 11)
    assert second.pages == []
    book.publish(first, 5)
    assert not book.reuse(second)
    book.publish(first, 6)
    assert book.reuse(second)
    assert not book.reuse(second)
    assert (second.pages, second.sink) == (first.pages, first.sink)


def test_promises_are_kept() -> None:
    book = ledger(pages=4)
    first = admit(book, [1], 2 + 3 * 4)
    assert book.admit([], 2 + 2 * 4) is None
    second = admit(book, [2], 2 + 1 * 4)
    book.extend(second, 6)
    book.extend(first, 14)
    assert len({*first.pages, *second.pages}) == 4
    book.release(first)
    assert book.admit([], 2 + 3 * 4) is not None


def test_a_refused_sequence_leaves_no_trace() -> None:
    book = ledger(pages=4)
    kept = compute(book, list(range(11)), 11)
    assert book.admit(book.keys(list(range(11))), 2 + 5 * 4) is None
    book.release(kept)
    assert book.pages.available == 4
    assert book.admit([], 2 + 4 * 4) is not None


def test_sharing_makes_room() -> None:
    book = ledger(pages=4)
    compute(book, list(range(14)), 2 + 3 * 4)
    assert book.admit([], 2 + 2 * 4) is None
    assert book.admit(book.keys(list(range(14))), 2 + 3 * 4) is not None


def test_an_outgrown_promise_is_our_bug() -> None:
    book = ledger()
    lease = admit(book, [1], 6)
    with pytest.raises(AssertionError, match="outgrew"):
        book.extend(lease, 7)


def test_kept_pages_go_when_room_is_needed_the_oldest_first() -> None:
    book = ledger(pages=5)
    for start in (0, 100):
        book.release(compute(book, list(range(start, start + 11)), 11))
    assert book.pages.filled == 4
    book.release(admit(book, list(range(11)), 11))
    taken = admit(book, [5], 2 + 2 * 4)
    book.extend(taken, 10)
    book.release(taken)
    found = admit(book, list(range(11)), 11)
    assert len(found.pages) == 2
    book.release(found)
    # the end of a prompt goes before its beginning
    assert len(admit(book, list(range(100, 111)), 11).pages) == 1


def test_a_page_without_its_sinks_is_not_found() -> None:
    book = ledger(pages=8, held=1)
    book.release(compute(book, list(range(11)), 11))
    book.release(admit(book, [5], 6))
    assert admit(book, list(range(11)), 11).pages == []


def test_without_sinks() -> None:
    book = ledger(sinks=0, held=0)
    first = compute(book, list(range(9)), 9)
    assert admit(book, list(range(9)), 9).pages == first.pages[:2]
    assert first.sink is None


def test_shelf_takes_free_places_before_kept_ones() -> None:
    shelf = Shelf(2)
    place = shelf.take()
    shelf.publish(place, b"a")
    shelf.release(place)
    assert shelf.take() != place
    assert shelf.find(b"a") == place
    assert shelf.available == 0


def test_random_use_never_double_books() -> None:
    """A model of the ledger: who wrote which page last, and that readers still find it."""
    random_ = random.Random(0)
    book = ledger(pages=12, held=5)
    running: list[tuple[list[int], Lease, int]] = []
    written: dict[int, bytes] = {}
    for _ in range(4000):
        if running and random_.random() < 0.5:
            prompt, lease, tokens = running.pop(random_.randrange(len(running)))
            for page, key in zip(lease.pages, book.keys(prompt), strict=False):
                assert written[page] == key
            own = lease.pages[len(book.keys(prompt)) :]
            book.extend(lease, tokens)
            others = [page for _, other, _ in running for page in other.pages]
            assert not set(own) & set(others)
            book.release(lease)
            continue
        prompt = [random_.randrange(2) for _ in range(random_.randrange(1, 16))]
        tokens = len(prompt) + random_.randrange(12)
        admitted = book.admit(book.keys(prompt), tokens)
        if admitted is None:
            continue
        found = len(admitted.pages)
        book.extend(admitted, len(prompt))
        for page, key in list(zip(admitted.pages, book.keys(prompt), strict=False))[found:]:
            written[page] = key
        for page in admitted.pages[len(book.keys(prompt)) :]:
            written[page] = b""
        book.publish(admitted, len(prompt))
        running.append((prompt, admitted, tokens))
    for _, lease, _ in running:
        book.release(lease)
    assert book.pages.available == 12
    assert book.first.available == 5
