"""Turns, bounds and leaving."""

from rotq.serve.engine.generation import Generation
from rotq.serve.engine.queue import FairQueue
from rotq.serve.engine.sampling import Sampling


def of(client: str, number: int = 0) -> Generation:
    return Generation(
        prompt=[number],
        max_tokens=1,
        sampling=Sampling(),
        decode=lambda _: "",
        emit=lambda _: None,
        client=client,
    )


def order(queue: FairQueue) -> list[tuple[str, int]]:
    found = []
    while (sequence := queue.admit(lambda _: True)) is not None:
        found.append((sequence.client, sequence.prompt[0]))
    return found


def test_clients_take_turns_and_keep_their_own_order() -> None:
    queue = FairQueue(10)
    assert queue.enter([of("a", n) for n in range(3)])
    assert queue.enter([of("b", 0)])
    assert queue.enter([of("c", n) for n in range(2)])
    assert order(queue) == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    assert len(queue) == 0


def test_nobody_overtakes_the_one_whose_turn_it_is() -> None:
    queue = FairQueue(10)
    big, small = of("a"), of("b")
    queue.enter([big])
    queue.enter([small])
    assert queue.admit(lambda sequence: sequence is small) is None
    assert len(queue) == 2


def test_a_request_enters_whole_or_not_at_all() -> None:
    queue = FairQueue(3)
    assert queue.enter([of("a"), of("a")])
    assert not queue.enter([of("b"), of("b")])
    assert len(queue) == 2
    assert queue.enter([of("b")])
    assert not queue.enter([of("c")])


def test_leaving() -> None:
    queue = FairQueue(5)
    queue.enter([of("a", 1), of("a", 2)])
    queue.enter([of("b", 3)])
    gone = queue.leave(lambda sequence: sequence.prompt[0] != 2)
    assert [sequence.prompt[0] for sequence in gone] == [1, 3]
    assert order(queue) == [("a", 2)]


def test_a_closed_queue() -> None:
    queue = FairQueue(5)
    queue.close()
    assert not queue.enter([of("a")])
